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
    tested = {
        "modulated_layer_norm": _modulated_layer_norm,
        "gated_residual": _gated_residual,
        "gelu_tanh": _gelu_tanh,
        "timestep_embedding": _timestep_embedding,
        "block_attention": _block_attention,
        "gather_trajectories": _gather_trajectories,
    }
    return {operator: test(device) for operator, test in tested.items() if device in KERNELS[operator]}


def _modulated_layer_norm(device: str) -> float:
    B, S, T, D = 2, 3, 67, 45
    inputs = _random([(B, S, T, D), (B, S, D), (B, S, D)], device)
    return _difference(torch.ops.pyard.modulated_layer_norm, reference.modulated_layer_norm, inputs, 1e-6)


def _gated_residual(device: str) -> float:
    B, S, T, D = 2, 3, 67, 45
    inputs = _random([(B, S, T, D), (B, S, D), (B, S, T, D)], device)
    return _difference(torch.ops.pyard.gated_residual, reference.gated_residual, inputs)


def _gelu_tanh(device: str) -> float:
    return _difference(torch.ops.pyard.gelu_tanh, reference.gelu_tanh, _random([(67, 45), (45,)], device))


def _timestep_embedding(device: str) -> float:
    times = torch.tensor([0.0, 0.25, 1.5, 7.0], device=device)
    ours = torch.ops.pyard.timestep_embedding(times, 33, 10000.0, 0.0)
    difference = (ours - reference.timestep_embedding(times, 33, 10000.0, 0.0)).abs().max().item()
    return _beyond_rounding(difference, 4e-6)


def _block_attention(device: str) -> float:
    B, H, S, T, head_dim = 2, 3, 3, 37, 24
    inputs = _random([(B, H, S * T, head_dim)] * 3 + [(H,)], device)

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = torch.ops.pyard.block_attention(q, k, v, T, "causal", None, bias)[0]
        return out

    def twin(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return reference.block_attention(q, k, v, T, "causal", None, bias)

    return _difference(kernel, twin, inputs)


def _gather_trajectories(device: str) -> float:
    noise, steps = (tensor.float() for tensor in _random([(5, 3, 7), (5, 4, 3, 7)], device))
    indices = torch.tensor([4, 0, 2, 2], device=device)
    ours = torch.ops.pyard.gather_trajectories(noise, steps, indices, torch.bfloat16)
    expected = reference.gather_trajectories(noise, steps, indices, torch.bfloat16)
    return max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))


def _random(shapes: list[tuple[int, ...]], device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]


def _beyond_rounding(difference: float, rounding: float) -> float:
    """What is left of a difference in float32, where kernel and twin round differently."""
    return max(0.0, difference - rounding)


def _difference(kernel: Operator, twin: Operator, inputs: list[Tensor], *options: object) -> float:
    leaves = [tensor.requires_grad_() for tensor in inputs]
    ours, expected = kernel(*leaves, *options), twin(*leaves, *options)
    grad = torch.cos(expected.detach())
    pairs = [(ours, expected)]
    pairs += zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)
