"""Checks that a folder of graphs draws what its student draws in PyTorch, from prompts to pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyard.conditions import Condition
from pyard.diffusion.noise import standard_normal
from pyard.export import ExportError
from pyard.export.condition_inputs import as_arrays
from pyard.export.decoder import Decoder, expected_pictures
from pyard.export.text_encoders import TextEncoders
from pyard.models.student import Student
from pyard.runtime import OnnxPipeline
from pyard.runtime.onnx_pipeline import to_pictures

# Prompts of different lengths; the last one is longer than most captions.
PARITY_PROMPTS = (
    "a red circle",
    "a large green square above a small blue circle",
    "three small yellow triangles to the left of a large white star, and below them a blue circle",
)
_SEED = 1
# What a transformer of each family takes: settings with the width of tokens and of the pooled embedding.
_WIDTHS = {
    "pixart": ("caption_channels", None),
    "sd3": ("joint_attention_dim", "pooled_projection_dim"),
    "aura_flow": ("joint_attention_dim", None),
    "flux": ("joint_attention_dim", "pooled_projection_dim"),
    "flux2": ("joint_attention_dim", None),
    "qwen_image": ("joint_attention_dim", None),
    "z_image": ("cap_feat_dim", None),
}


def measure_pipeline(
    pipeline: OnnxPipeline,
    student: Student,
    conditions: Sequence[Condition],
    decoder: Decoder | None,
    encoders: TextEncoders | None,
) -> dict[str, float]:
    """The errors of the text encoders' embeddings and, for each size, of samples and pictures drawn from prompts."""
    condition = Condition.cat(list(conditions))
    expected, parity = as_arrays(condition), dict[str, float]()
    given = expected if encoders is None else pipeline.encode(PARITY_PROMPTS)
    if encoders is not None:
        seen = expected["mask"]
        errors = [
            _relative(given["tokens"][seen], expected["tokens"][seen]) if given["mask"].tolist() == seen.tolist() else np.inf
        ]
        errors += [_relative(given["pooled"], expected["pooled"])] if "pooled" in expected else []
        parity["text_encoder"] = max(errors)
    worst_sample = worst_picture = 0.0
    for size in pipeline.sizes:
        noise = standard_normal(_SEED, np.arange(len(PARITY_PROMPTS)), size.sample_shape)
        with torch.inference_mode():
            *_, last = student.rollout(torch.from_numpy(noise), condition)
        sample = last.numpy()
        pictures = to_pictures(sample) if decoder is None else expected_pictures(decoder.codec, last)
        drawn = pipeline.sample(condition=given, noise=noise, height=size.height, width=size.width)
        worst_picture = max(worst_picture, float(np.abs(drawn.astype(np.float32) - pictures).max()) / 255)
        worst_sample = max(
            worst_sample, _relative(pipeline.latents(given, noise, height=size.height, width=size.width), sample)
        )
        if size.step is not None:
            *_, streamed = pipeline.stream(condition=given, noise=noise, height=size.height, width=size.width)
            worst_picture = max(worst_picture, float(np.abs(streamed.astype(np.float32) - pictures).max()) / 255)
    return {**parity, "sample": worst_sample, "picture": worst_picture}


def _relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check_pipeline(parity: Mapping[str, float], bound: float, precision: str, folder: Path) -> None:
    """Raise an ExportError that names the component if a deviation is above the bound."""
    for name, error in parity.items():
        # A picture's levels are integers, so the smallest difference may become a whole level of 255.
        allowed = bound + (1.01 / 255 if name == "picture" else 0)
        if not error <= allowed:
            raise ExportError(
                f"{folder} was not written: {name} differs from PyTorch by {error:.4g} of the largest value in "
                f"{precision}; expected at most {allowed:.6g}. Use --precision fp32, or, if that error is acceptable, "
                "--parity-bound"
            )


def random_conditions(student: Student) -> list[Condition]:
    """Random conditions of the shapes that a text-to-image student takes, for use without text encoders."""
    config = student.config
    assert config.text is not None
    generator = torch.Generator().manual_seed(0)
    settings = config.network.transformer  # type: ignore[attr-defined]
    width, pooled = (None if name is None else int(settings[name]) for name in _WIDTHS[config.family])
    assert width is not None
    conditions = []
    for length in (5, 12, 29):
        tensors = {
            "tokens": torch.randn(1, length, width, generator=generator),
            "mask": torch.ones(1, length, dtype=torch.bool),
        }
        if pooled is not None:
            tensors["pooled"] = torch.randn(1, pooled, generator=generator)
        constants = {name: torch.tensor([value]) for name, value in config.text.constants.items()}
        conditions.append(Condition({**tensors, **constants}))
    return conditions
