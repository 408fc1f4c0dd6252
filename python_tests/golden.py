"""Numeric vectors of independent implementations, in `../shared/golden` beside the repository where that folder exists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[2] / "shared" / "golden"
TOLERANCE = 2e-5  # of the largest value, as that folder's README says


def golden_file(name: str) -> Path:
    """A file of the golden vectors; the test is skipped where there are none."""
    if not FOLDER.is_dir():
        pytest.skip(f"no golden vectors in {FOLDER}")
    return FOLDER / f"{name}.safetensors"


def golden(name: str) -> dict[str, torch.Tensor]:
    """The tensors of such a file."""
    return load_file(golden_file(name))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error over the largest value."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
