"""Autocast: a float32 residual stream whose linear layers compute in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from pyard.ops import limits

# Where the row operators have kernels for it; elsewhere tensors are converted first.
MIXED_DEVICES = frozenset({"cpu", "cuda"})
NARROW_DTYPES = frozenset({torch.bfloat16, torch.float16})


def dtype_of_linears(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes when given x: the current autocast dtype, or that of x without autocast."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def takes_mixed(operator: str, x: Tensor, *others: torch.dtype) -> bool:
    """Whether the operator's kernel also accepts this mix of dtypes: a float32 x with 16-bit tensors.

    Args:
        operator: One of the row operators.
        x: [B, S, T, D], the residual stream.
        others: dtypes of all other tensors, including the result of the norm.
    """
    if x.device.type not in MIXED_DEVICES or x.dtype != torch.float32 or len(set(others)) != 1:
        return False
    return others[0] in NARROW_DTYPES and not (x.is_cuda and limits.shape_obstacle(operator, x.shape, others[0]))
