"""Fine-tuned transformers over a pipeline, sharded weights and variants: read as diffusers reads them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_weights import same, weights_of
from tiny_pipelines import randomise, tiny_pipeline

import pyard
from pyard.errors import InputError
from pyard.teachers import load_teacher
from pyard.teachers.text_to_image.outline import pipeline_outline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("sd3", tmp_path_factory.mktemp("pipelines") / "sd3")


def stock(folder: Path) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")


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


@pytest.mark.parametrize("shards", ["none", "new names", "old names"])
def test_components_without_the_variant_use_the_weights_that_they_have(shards: str, pipeline: Path, tmp_path: Path) -> None:
    """As in SD 3.5, where encoders and VAE have the variant, and the transformer has none."""
    from diffusers import StableDiffusion3Pipeline

    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline, folder)
    shutil.rmtree(folder / "transformer")
    stock(pipeline).save_pretrained(folder / "transformer", max_shard_size="40KB")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        file = folder / name / "model.safetensors"
        save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        file.rename(folder / name / "model.fp16.safetensors")
    theirs = StableDiffusion3Pipeline.from_pretrained(folder, variant="fp16").transformer.state_dict()
    assert same(weights_of(folder, variant="fp16"), theirs)
    stock(pipeline).half().save_pretrained(
        folder / "transformer", variant="fp16", max_shard_size="10GB" if shards == "none" else "20KB"
    )
    if shards == "old names":
        _rename_shards(folder / "transformer")
    halves = weights_of(folder, variant="fp16")
    assert all(torch.equal(halves[name], tensor.half().float()) for name, tensor in theirs.items())
    assert same(weights_of(folder), theirs)
    with pytest.raises(InputError, match="no file of the variant 'bf16'; found fp16"):
        load_teacher(folder, variant="bf16")


def _rename_shards(folder: Path) -> None:
    """From model.fp16-00001-of-00002 to the older model-00001-of-00002.fp16."""
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(re.sub(r"\.fp16(-\d+-of-\d+)", r"\1.fp16", index.read_text(encoding="utf-8")), encoding="utf-8")
    for file in list(folder.glob("*.fp16-*")):
        file.rename(folder / re.sub(r"\.fp16(-\d+-of-\d+)", r"\1.fp16", file.name))
