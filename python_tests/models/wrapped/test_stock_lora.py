"""LoRAs over a pipeline, read as diffusers and PEFT read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_weights import same, weights_of
from tiny_pipelines import tiny_pipeline

from pyard.errors import InputError
from pyard.models.wrapped.stock_lora import add_stock_lora
from pyard.teachers import load_teacher

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("sd3", tmp_path_factory.mktemp("pipelines") / "sd3")


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


def test_a_folder_of_several_loras_is_refused(pipeline: Path, tmp_path: Path) -> None:
    """diffusers takes any of them, by the order of the disk."""
    saved_lora(pipeline, "sd3", 2, "", tmp_path)
    expected = weights_of(pipeline, lora=tmp_path / LORA)
    shutil.copy(tmp_path / LORA, tmp_path / "another.safetensors")
    assert same(weights_of(pipeline, lora=tmp_path), expected)  # the one of diffusers' own name
    (tmp_path / LORA).rename(tmp_path / "8-steps.safetensors")
    with pytest.raises(InputError, match=r"it holds 8-steps.safetensors, another.safetensors; give one of these files"):
        load_teacher(pipeline, lora=tmp_path)
    assert same(weights_of(pipeline, lora=tmp_path / "8-steps.safetensors"), expected)
    (tmp_path / "another.safetensors").rename(tmp_path / "optimizer.safetensors")
    assert same(weights_of(pipeline, lora=tmp_path), expected)
    (tmp_path / "8-steps.safetensors").unlink()
    with pytest.raises(InputError, match=r"there is no LoRA in it; expected a \.safetensors file"):
        load_teacher(pipeline, lora=tmp_path)


def saved_adapter(pixart: Path, out: Path, scale: float = 1.0, **settings: Any) -> dict[str, torch.Tensor]:
    """Write a PEFT adapter folder for PixArt's transformer; returns the weights to which PEFT merges it."""
    from diffusers import PixArtTransformer2DModel
    from peft import LoraConfig, PeftModel, get_peft_model

    def base() -> Any:
        return PixArtTransformer2DModel.from_pretrained(pixart, subfolder="transformer")

    adapted = get_peft_model(base(), LoraConfig(r=2, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    adapted.save_pretrained(out)
    merged: dict[str, torch.Tensor] = PeftModel.from_pretrained(base(), out).merge_and_unload().state_dict()
    return merged


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=["attn1.to_q", "proj_out"]),
        dict(target_modules=["to_q", "proj"]),  # with the patch embedding, a convolution
        dict(target_modules=["to_q"], use_dora=True),
        dict(target_modules=["to_q"], bias="all"),
        dict(target_modules=["to_q"], lora_bias=True),
        dict(target_modules=["to_q"], init_lora_weights="pissa"),
        dict(target_modules=["to_q"], modules_to_save=["proj_out", "adaln_single.linear"]),
        dict(target_modules=["to_q"], use_rslora=True),
    ],
    ids=lambda settings: "-".join(settings),
)
def test_what_a_peft_adapter_changes_beyond_its_factors_is_read_and_named(settings: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    pixart = tiny_pipeline("pixart_sigma", tmp_path / "pixart")
    expected = saved_adapter(pixart, tmp_path / "adapter", **settings)
    mine = weights_of(pixart, lora=tmp_path / "adapter")
    assert mine.keys() == expected.keys()
    assert all(torch.allclose(mine[name], expected[name], atol=1e-6) for name in mine)
    transformer = PixArtTransformer2DModel.from_pretrained(pixart, subfolder="transformer")
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    found = add_stock_lora(transformer, PixArtSigmaPipeline, tmp_path / "adapter")
    for name, (down, up) in found.factors.items():
        before[f"{name}.weight"] += up @ down
    complete = all(torch.allclose(before[name], tensor, atol=1e-5) for name, tensor in expected.items())
    assert complete == (not found.others)
    assert complete == (settings["target_modules"][-1] == "proj_out" or "use_rslora" in settings)


def test_adapters_of_older_peft_are_pickles(tmp_path: Path) -> None:
    pixart, adapter = tiny_pipeline("pixart_sigma", tmp_path / "pixart"), tmp_path / "adapter"
    expected = saved_adapter(pixart, adapter, target_modules=["to_q"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    mine = weights_of(pixart, lora=adapter)
    assert all(torch.allclose(mine[name], expected[name], atol=1e-6) for name in mine)
    torch.save([1, 2], adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.bin: expected the tensors of a PEFT adapter"):
        load_teacher(pixart, lora=adapter)
    torch.save({"a": tmp_path}, adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="holds an object of type pathlib"):
        load_teacher(pixart, lora=adapter)


def test_adapters_that_are_no_lora_are_refused(tmp_path: Path) -> None:
    from diffusers import PixArtTransformer2DModel
    from peft import LoKrConfig, get_peft_model

    pixart = tiny_pipeline("pixart_sigma", tmp_path / "pixart")
    base = PixArtTransformer2DModel.from_pretrained(pixart, subfolder="transformer")
    get_peft_model(base, LoKrConfig(r=2, target_modules=["to_q"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"an adapter of type LOKR; expected LORA, or merge it .*merge_and_unload"):
        load_teacher(pixart, lora=tmp_path / "adapter")


def test_loras_of_other_models_are_refused(pipeline: Path, tmp_path: Path) -> None:
    saved_adapter(tiny_pipeline("pixart_sigma", tmp_path / "pixart"), tmp_path / "adapter", target_modules=["attn1.to_q"])
    with pytest.raises(InputError, match=r"PEFT cannot read it|is not a layer"):
        load_teacher(pipeline, lora=tmp_path / "adapter")
    with pytest.raises(InputError, match="no such file or folder"):
        load_teacher(pipeline, lora=tmp_path / "nothing")
