"""Transformers in a single file, in diffusers' names and in the original ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_weights import same, weights_of
from tiny_pipelines import randomise, tiny_pipeline

from pyard.errors import InputError
from pyard.models.wrapped.single_file import _own_tensors, _require_no_more_blocks
from pyard.teachers import load_teacher


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("sd3", tmp_path_factory.mktemp("pipelines") / "sd3")


def stock(folder: Path) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")


def test_a_converted_file_of_more_numbers_than_the_model_is_refused(pipeline: Path) -> None:
    """What diffusers' converters of original names drop has no name that could be compared."""
    model = stock(pipeline)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in model.state_dict().items()}
    others = {"first_stage_model.decoder.weight": torch.ones(10**6)}  # another component in the same file
    _require_no_more_blocks(_own_tensors({**others, **tensors}, {}), model, Path("original.safetensors"), pipeline)
    more = {"model.diffusion_model.joint_blocks.9.weight": torch.ones(sum(t.numel() for t in tensors.values()) // 50)}
    with pytest.raises(InputError, match=r"original.safetensors: it has .* M numbers, and a transformer with .* has"):
        _require_no_more_blocks(_own_tensors({**tensors, **more}, {}), model, Path("original.safetensors"), pipeline)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_quantised_text_encoders_beside_a_whole_transformer_are_not_read(layout: str, tmp_path: Path) -> None:
    """Checkpoints with all of a pipeline's components have factors of quantised encoders, and tokenizers as bytes."""
    folder = tiny_pipeline("z_image", tmp_path / "pipeline")
    names = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    own = {
        f"model.diffusion_model.{name}": tensor for name, tensor in (original(names) if layout == "original" else names).items()
    }
    encoder = "text_encoders.qwen3_4b.transformer."
    others = {
        f"{encoder}model.layers.0.mlp.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        f"{encoder}model.layers.0.mlp.scale_weight": torch.tensor(1.0),
        "text_encoders.t5xxl.spiece_model": torch.zeros(20, dtype=torch.uint8),
    }
    file = tmp_path / "whole.safetensors"
    save_file({**own, **others}, file)
    assert same(weights_of(folder, transformer=file), weights_of(folder))
    save_file({**own, **others, "model.diffusion_model.layers.0.feed_forward.w1.scale_weight": torch.tensor(1.0)}, file)
    with pytest.raises(InputError, match=r"it is quantised \(layers.0.feed_forward.w1.scale_weight\)"):
        load_teacher(folder, transformer=file)


def original(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of Z-Image's diffusers transformer under the names of its authors, with one matrix for q, k and v."""
    names = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.", ".to_out.0.": ".out.",
             ".norm_k.": ".k_norm.", ".norm_q.": ".q_norm."}  # fmt: skip
    found = dict(tensors)
    for name in [name for name in found if name.endswith(".to_q.weight")]:
        parts = [found.pop(name.replace("to_q", f"to_{each}")) for each in "qkv"]
        found[name.replace("to_q", "qkv")] = torch.cat(parts)
    for ours, theirs in names.items():
        found = {name.replace(ours, theirs): tensor for name, tensor in found.items()}
    return found


@pytest.mark.parametrize("name", ["time_text_embed.guidance_embedder.linear_1.weight", "guidance_in.in_layer.weight"])
def test_a_guidance_embedder_that_the_configuration_lacks_is_refused(name: str, tmp_path: Path) -> None:
    """Dropped, it would leave another model: FLUX.1 dev without its guidance, read over the folder of schnell."""
    from diffusers import FluxTransformer2DModel

    folder = tiny_pipeline("flux", tmp_path / "pipeline")
    dev = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    config = folder / "transformer" / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    randomise(FluxTransformer2DModel.from_config({**settings, "guidance_embeds": False}), 1).save_pretrained(config.parent)
    without = {key: tensor for key, tensor in dev.items() if "guidance" not in key}
    file = tmp_path / "dev.safetensors"
    save_file(without, file)
    assert weights_of(folder, transformer=file).keys() == without.keys()
    for prefix in ("", "model.diffusion_model."):
        save_file({f"{prefix}{key}": tensor for key, tensor in {**without, name: torch.ones(2, 2)}.items()}, file)
        with pytest.raises(
            InputError, match=rf"it has a guidance embedder \({name}\), .*give a folder with its own config.json"
        ):
            load_teacher(folder, transformer=file)
    save_file(dev, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"no place for, such as time_text_embed\.guidance_embedder"):
        load_teacher(folder)


def test_a_converted_file_without_some_tensors_names_them(tmp_path: Path) -> None:
    folder = tiny_pipeline("z_image", tmp_path / "pipeline")
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "part.safetensors"
    for prefix, layout in (("", tensors), ("model.diffusion_model.", original(tensors))):
        save_file({f"{prefix}{key}": tensor for key, tensor in layout.items() if "cap_embedder.0" not in key}, file)
        with pytest.raises(
            InputError, match=r"it lacks 1 tensors of a ZImageTransformer2DModel, such as cap_embedder\.0\.weight"
        ):
            load_teacher(folder, transformer=file)


def test_files_that_diffusers_cannot_convert_for_what_they_lack(tmp_path: Path) -> None:
    folder = tiny_pipeline("flux", tmp_path / "pipeline")
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "part.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if "guidance" not in key}, file)
    with pytest.raises(InputError, match=r"it lacks 4 tensors of a FluxTransformer2DModel, such as time_text_embed\.guidance"):
        load_teacher(folder, transformer=file)
    blocks = [f"{name}_blocks.{number}.linear1.weight" for name in ("double", "single") for number in range(2)]
    save_file({name: torch.ones(2, 2) for name in blocks}, file)
    with pytest.raises(
        InputError, match=r"part.safetensors: diffusers cannot read it as a .*: there is no time_in\.in_layer\.weight"
    ):
        load_teacher(folder, transformer=file)
