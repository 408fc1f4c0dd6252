"""A second's worth of checks that the kernels equal their twins on this machine; `pyard doctor` runs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyard.ops import reference
from pyard.ops.backend import KERNELS

# In float64 kernel and twin differ by rounding alone.
TOLERANCE = 1e-10

Operator = Callable[..., Tensor]


def self_test(device: str = "cpu") -> dict[str, float]:
    """The largest difference between kernel and twin, outputs and gradients, of every operator with a kernel.

    Args:
        device: Device type to test on.

    Returns:
        By operator, the largest absolute difference in float64; fine up to `TOLERANCE`.
    """
    tested = {"modulated_layer_norm": _modulated_layer_norm}
    return {operator: tested[operator](device) for operator, devices in KERNELS.items() if device in devices}


def _modulated_layer_norm(device: str) -> float:
    B, S, T, D = 2, 3, 67, 45
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, S, T, D), (B, S, D), (B, S, D)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]
    return _difference(torch.ops.pyard.modulated_layer_norm, reference.modulated_layer_norm, inputs, 1e-6)


def _difference(kernel: Operator, twin: Operator, inputs: list[Tensor], *options: object) -> float:
    leaves = [tensor.requires_grad_() for tensor in inputs]
    ours, expected = kernel(*leaves, *options), twin(*leaves, *options)
    grad = torch.cos(expected.detach())
    pairs = [(ours, expected)]
    pairs += zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)
