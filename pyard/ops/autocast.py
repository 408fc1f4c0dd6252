"""The regime of autocast: a float32 residual stream with 16-bit linear layers on it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyard.ops import limits

# Where the row operators have kernels for it; elsewhere tensors are converted first.
MIXED_DEVICES = frozenset({"cpu", "cuda"})
NARROW_DTYPES = frozenset({torch.bfloat16, torch.float16})


def dtype_of_linears(x: Tensor) -> torch.dtype:
    """What a linear layer computes in when it is given x: the dtype of the autocast in force, or that of x."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def takes_mixed(operator: str, x: Tensor, *others: torch.dtype) -> bool:
    """Whether the operator's kernel, which serves x, also serves a float32 x beside 16-bit tensors.

    Args:
        operator: One of the row operators.
        x: [B, S, T, D], the residual stream.
        others: The dtypes of all other tensors, the result of the norm among them.
    """
    if x.device.type not in MIXED_DEVICES or x.dtype != torch.float32 or len(set(others)) != 1:
        return False
    return others[0] in NARROW_DTYPES and not (x.is_cuda and limits.shape_obstacle(operator, x.shape, others[0]))
