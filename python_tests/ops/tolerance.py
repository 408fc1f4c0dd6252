"""The one tolerance policy: our error is at most twice that of plain PyTorch in the same dtype, plus a floor."""

from __future__ import annotations

import torch
from torch import Tensor

# A few units in the last place of a value of size one: where plain PyTorch happens to be exact, rounding is allowed.
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_as_exact_as_plain(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Compares the largest errors against `exact`, the same quantity computed in float64."""
    assert ours.dtype == plain.dtype
    assert ours.shape == exact.shape
    if exact.numel() == 0:
        return
    size = exact.abs().max().clamp(min=1.0).item()
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + FLOOR[plain.dtype] * size
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g} in {plain.dtype}"
