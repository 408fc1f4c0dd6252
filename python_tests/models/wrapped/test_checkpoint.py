"""Fine-tuned transformers and LoRAs over a pipeline, sharded weights and variants: read as diffusers reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import randomise, tiny_pipeline

import pyard
from pyard.errors import InputError
from pyard.models.wrapped.checkpoint import _require_no_more_blocks
from pyard.teachers import load_teacher
from pyard.teachers.text_to_image.outline import pipeline_outline

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("sd3", tmp_path_factory.mktemp("pipelines") / "sd3")


def weights_of(folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Of the stock transformer that a teacher's network is."""
    network = load_teacher(folder, **settings).network
    return network.trunk.stock(network.head).state_dict()


def stock(folder: Path) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_fine_tuned_transformer_takes_the_pipelines_place(pipeline: Path, tmp_path: Path) -> None:
    other = randomise(stock(pipeline), 9)
    other.save_pretrained(tmp_path / "tuned")
    plain, tuned = weights_of(pipeline), weights_of(pipeline, transformer=tmp_path / "tuned")
    assert same(tuned, other.state_dict())
    assert not same(tuned, plain)
    for prefix in ("", "transformer.", "model.diffusion_model."):
        named = {f"{prefix}{name}": tensor.contiguous() for name, tensor in other.state_dict().items()}
        save_file(named, tmp_path / "tuned.safetensors")
        assert same(weights_of(pipeline, transformer=tmp_path / "tuned.safetensors"), tuned)
    assert load_teacher(pipeline).fingerprint != load_teacher(pipeline, transformer=tmp_path / "tuned").fingerprint


def test_a_transformer_of_another_model_is_one_line(pipeline: Path, tmp_path: Path) -> None:
    flux = tiny_pipeline("flux", tmp_path / "flux")
    with pytest.raises(InputError, match="holds a FluxTransformer2DModel; expected a SD3Transformer2DModel"):
        load_teacher(pipeline, transformer=flux / "transformer")
    tensors = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    narrow = {name: tensor[:3].contiguous() if name.startswith("proj_out") else tensor for name, tensor in tensors.items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(InputError, match=r"proj_out.* is .*expected"):
        load_teacher(pipeline, transformer=tmp_path / "narrow.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"<html>")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_teacher(pipeline, transformer=tmp_path / "broken.safetensors")


def test_a_model_that_would_be_read_in_part_is_refused(pipeline: Path, tmp_path: Path) -> None:
    """More blocks than the configuration has, in a file and in a folder, and weights without the factors beside them."""
    tensors = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    block = f"transformer_blocks.{last}."
    after = f"transformer_blocks.{last + 1}."
    another = {name.replace(block, after): tensors[name].clone() for name in tensors if name.startswith(block)}
    file = tmp_path / "deep.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in {**tensors, **another}.items()}, file)
    left = f"has {len(another)} tensors that the SD3Transformer2DModel of .* has no place for, such as {after}"
    with pytest.raises(InputError, match=left):
        load_teacher(pipeline, transformer=file)
    shutil.copytree(pipeline, tmp_path / "deep")
    save_file({**tensors, **another}, tmp_path / "deep" / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        InputError, match=f"{len(another)} tensors that the SD3Transformer2DModel of its config.json has no place"
    ):
        load_teacher(tmp_path / "deep")

    name = f"{block}attn.to_q.weight"
    scale = tensors[name].abs().max() / 448
    scaled = {name: (tensors[name] / scale).to(torch.float8_e4m3fn), name.replace(".weight", ".scale_weight"): scale}
    for quantised in (scaled, {name: torch.ones(tensors[name].shape, dtype=torch.int8)}):
        save_file({**tensors, **quantised}, file)
        with pytest.raises(InputError, match=r"it is quantised \(transformer_blocks.*give the file in bfloat16"):
            load_teacher(pipeline, transformer=file)


def test_a_published_folder_of_pixart_is_read(tmp_path: Path) -> None:
    """Its files name the class that diffusers had before PixArt's own, and hold an embedding that newer versions do not use."""
    new = tiny_pipeline("pixart_alpha", tmp_path / "new")
    old = tmp_path / "old"
    shutil.copytree(new, old)
    index, config = old / "model_index.json", old / "transformer" / "config.json"
    text = index.read_text(encoding="utf-8").replace("PixArtTransformer2DModel", "Transformer2DModel")
    index.write_text(text, encoding="utf-8")
    settings = json.loads(config.read_text(encoding="utf-8"))
    for name in ("use_additional_conditions", "interpolation_scale"):
        settings.pop(name, None)
    others = dict(double_self_attention=False, num_vector_embeds=None, only_cross_attention=False, use_linear_projection=False)
    config.write_text(json.dumps({**settings, **others, "_class_name": "Transformer2DModel", "dropout": 0.0}), encoding="utf-8")
    file = old / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "caption_projection.y_embedding": torch.ones(120, 20)}, file, metadata={"format": "pt"})
    assert same(weights_of(old), weights_of(new))
    outline = pipeline_outline(old)
    assert outline is not None
    teacher = load_teacher(old)
    assert outline.network.config == teacher.network.config
    options: dict[str, Any] = dict(prompts=["a dog"], num_steps=2, teacher_steps=4, keep="state", batch_size=2, progress=False)
    ends = []
    for folder in (old, new):
        store = pyard.generate_trajectories(folder, tmp_path / f"store-{folder.name}", 2, **options)
        ends.append(pyard.TrajectoryReader(store, 2, target="state").gather(range(2)).target[:, -1])
    assert torch.equal(*ends)
    config.write_text(
        json.dumps({**settings, "_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}), encoding="utf-8"
    )
    with pytest.raises(InputError, match="holds a Transformer2DModel; expected a PixArtTransformer2DModel"):
        load_teacher(old)


def test_a_converted_file_of_more_numbers_than_the_model_is_refused(pipeline: Path) -> None:
    """What diffusers' converters of original names drop has no name that could be compared."""
    model = stock(pipeline)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in model.state_dict().items()}
    others = {"first_stage_model.decoder.weight": torch.ones(10**6)}  # another component in the same file
    _require_no_more_blocks({**others, **tensors}, model, Path("original.safetensors"), pipeline)
    more = {"model.diffusion_model.joint_blocks.9.weight": torch.ones(sum(t.numel() for t in tensors.values()) // 50)}
    with pytest.raises(InputError, match=r"original.safetensors: it has .* M numbers, and a transformer with .* has"):
        _require_no_more_blocks({**tensors, **more}, model, Path("original.safetensors"), pipeline)


def saved_lora(folder: Path, name: str, alpha: int, where: str, out: Path) -> Any:
    """Write a LoRA of rank 2 for a pipeline; returns the transformer to which the stock pipeline has added it."""
    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    kind = getattr(diffusers, json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    base = kind.from_pretrained(folder).transformer
    base.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "to_k"]))
    with torch.no_grad():
        for number, (_, parameter) in enumerate(one for one in base.named_parameters() if "lora" in one[0]):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    metadata = base.peft_config["default"].to_dict() if where == "metadata" else None
    layers = get_peft_model_state_dict(base)
    kind.save_lora_weights(out, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)
    if where == "tensors":
        tensors = load_file(out / LORA)
        alphas = {key.replace(".lora_A.weight", ".alpha"): torch.tensor(float(alpha)) for key in tensors if ".lora_A." in key}
        save_file({**tensors, **alphas}, out / LORA)
    pipe = kind.from_pretrained(folder)
    pipe.load_lora_weights(out)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.transformer


@pytest.mark.parametrize(
    ("name", "where", "as_file"),
    [
        ("sd3", "", True),
        ("sd3", "metadata", False),
        ("flux", "tensors", False),
        *(
            pytest.param(name, "metadata", True, marks=pytest.mark.slow)
            for name in ("flux", "flux2_klein", "qwen_image", "z_image", "aura_flow")
        ),
    ],
)
def test_a_lora_is_added_as_the_stock_pipeline_adds_it(name: str, where: str, as_file: bool, tmp_path: Path) -> None:
    """Whether the weight of the additions is nowhere, so that it is 1, in the file's metadata or in tensors of their own."""
    folder = tiny_pipeline(name, tmp_path / "pipeline")
    theirs = saved_lora(folder, name, 8, where, tmp_path / "lora").state_dict()
    mine = weights_of(folder, lora=tmp_path / "lora" / LORA if as_file else tmp_path / "lora")
    plain = weights_of(folder)
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[key], theirs[key], atol=1e-6) for key in mine)
    assert sum(not torch.equal(mine[key], plain[key]) for key in mine) >= 4


def test_a_lora_that_would_be_read_in_part_is_refused(pipeline: Path, tmp_path: Path) -> None:
    saved_lora(pipeline, "sd3", 2, "", tmp_path)
    tensors = load_file(tmp_path / LORA)
    for key, message in (
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "also changes the text encoders"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "also changes the text encoders"),
        ("transformer.transformer_blocks.0.attn.to_q.dora_scale", "it is a DoRA"),
    ):
        save_file({**tensors, key: torch.ones(2, 2)}, tmp_path / LORA)
        with pytest.raises(InputError, match=message) as refused:
            load_teacher(pipeline, lora=tmp_path / LORA)
        assert "\n" not in str(refused.value)
    (tmp_path / LORA).unlink()
    torch.save({**tensors, "text_encoder.a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(InputError, match="also changes the text encoders"):
        load_teacher(pipeline, lora=tmp_path / "pytorch_lora_weights.bin")


def test_peft_adapters_and_loras_of_other_models(pipeline: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    pixart = tiny_pipeline("pixart_sigma", tmp_path / "pixart")
    from diffusers import PixArtTransformer2DModel

    base = PixArtTransformer2DModel.from_pretrained(pixart, subfolder="transformer")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["attn1.to_q", "proj_out"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    mine = weights_of(pixart, lora=tmp_path / "adapter")
    assert all(torch.allclose(mine[name], merged[name], atol=1e-6) for name in mine)
    with pytest.raises(InputError, match=r"PEFT cannot read it|is not a layer"):
        load_teacher(pipeline, lora=tmp_path / "adapter")
    with pytest.raises(InputError, match="no such file or folder"):
        load_teacher(pipeline, lora=tmp_path / "nothing")


def test_shards_and_variants(pipeline: Path, tmp_path: Path) -> None:
    plain = weights_of(pipeline)
    sharded = tmp_path / "sharded"
    shutil.copytree(pipeline, sharded)
    shutil.rmtree(sharded / "transformer")
    stock(pipeline).save_pretrained(sharded / "transformer", max_shard_size="40KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    assert same(weights_of(sharded), plain)
    half = tmp_path / "half"
    shutil.copytree(pipeline, half)
    shutil.rmtree(half / "transformer")
    stock(pipeline).half().save_pretrained(half / "transformer", variant="fp16", max_shard_size="20KB")
    read = weights_of(half)
    assert all(torch.equal(read[name], tensor.half().float()) for name, tensor in plain.items())
    assert {tensor.dtype for tensor in weights_of(pipeline, dtype="bfloat16").values()} == {torch.bfloat16}
