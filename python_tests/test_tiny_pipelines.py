"""The tiny pipelines of the tests: what diffusers loads from them draws, and every parameter counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import TINY_PIPELINES, tiny_pipeline


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_the_stock_pipeline_draws_from_the_folder(name: str, tmp_path: Path) -> None:
    pipeline = _load(tiny_pipeline(name, tmp_path / name))
    first = _draw(pipeline, "a red circle")
    assert first.shape == (1, 3, 32, 48)
    assert first.isfinite().all()
    assert first.std() > 0.01
    assert not torch.allclose(first, _draw(pipeline, "a blue square"), atol=1e-4)


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_no_parameter_is_constant(name: str, tmp_path: Path) -> None:
    pipeline = _load(tiny_pipeline(name, tmp_path))
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            constant = [n for n, p in module.named_parameters() if p.numel() > 1 and (p == p.flatten()[0]).all()]
            assert not constant, (part, constant)


def test_the_tiny_vocabulary_has_the_words_of_qwens_template(tmp_path: Path) -> None:
    # The pipeline drops as many tokens as the published vocabulary needs for the text in front of the prompt.
    pipeline = _load(tiny_pipeline("qwen_image", tmp_path))
    in_front = pipeline.prompt_template_encode.split("{}")[0]
    assert len(pipeline.tokenizer(in_front).input_ids) == pipeline.prompt_template_encode_start_idx


def _load(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _draw(pipeline: Any, prompt: str) -> torch.Tensor:
    more = {"use_resolution_binning": False} if type(pipeline).__name__.startswith("PixArt") else {}
    generator = torch.Generator().manual_seed(0)
    call = dict(num_inference_steps=2, height=32, width=48, generator=generator, output_type="pt", **more)
    return pipeline(prompt=prompt, **call).images
