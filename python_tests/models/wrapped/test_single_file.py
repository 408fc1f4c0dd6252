"""Transformers in a single file, in diffusers' names and in the original ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_pipeline

from pyard.errors import InputError
from pyard.models.wrapped.single_file import _require_no_more_blocks


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
    _require_no_more_blocks({**others, **tensors}, model, Path("original.safetensors"), pipeline)
    more = {"model.diffusion_model.joint_blocks.9.weight": torch.ones(sum(t.numel() for t in tensors.values()) // 50)}
    with pytest.raises(InputError, match=r"original.safetensors: it has .* M numbers, and a transformer with .* has"):
        _require_no_more_blocks({**tensors, **more}, model, Path("original.safetensors"), pipeline)
