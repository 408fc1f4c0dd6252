"""Checks within a second that the kernels agree with plain PyTorch on this machine; `pyard doctor` runs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyard.ops import reference
from pyard.ops.backend import KERNELS
from pyard.ops.masks import mask_number

# In float64 kernel and plain PyTorch differ by rounding alone.
TOLERANCE = 1e-10

Operator = Callable[..., Tensor]


def self_test() -> dict[str, float]:
    """The largest difference from plain PyTorch, in outputs and gradients, for every operator with a CPU kernel.

    Returns:
        For each operator the largest absolute difference in float64, NaN if either side has one; up to `TOLERANCE` is fine.
    """
    tested = {
        "modulated_layer_norm": _modulated_layer_norm,
        "gated_residual": _gated_residual,
        "gelu_tanh": _gelu_tanh,
        "timestep_embedding": _timestep_embedding,
        "block_attention": _block_attention,
        "gather_trajectories": _gather_trajectories,
    }
    return {operator: test().item() for operator, test in tested.items() if "cpu" in KERNELS[operator]}


def _modulated_layer_norm() -> Tensor:
    B, S, T, D = 2, 3, 67, 45
    inputs = _random([(B, S, T, D), (B, S, D), (B, S, D)])
    return _difference(torch.ops.pyard.modulated_layer_norm, reference.modulated_layer_norm, inputs, 1e-6)


def _gated_residual() -> Tensor:
    B, S, T, D = 2, 3, 67, 45
    inputs = _random([(B, S, T, D), (B, S, D), (B, S, T, D)])
    return _difference(torch.ops.pyard.gated_residual, reference.gated_residual, inputs)


def _gelu_tanh() -> Tensor:
    return _difference(torch.ops.pyard.gelu_tanh, reference.gelu_tanh, _random([(67, 45), (45,)]))


def _timestep_embedding() -> Tensor:
    times = torch.tensor([0.0, 0.25, 1.5, 7.0])
    ours = torch.ops.pyard.timestep_embedding(times, 33, 10000.0, 0.0)
    difference = _largest([(ours, reference.timestep_embedding(times, 33, 10000.0, 0.0))])
    return (difference - 4e-6).clamp(min=0)  # in float32 kernel and plain PyTorch round differently


def _block_attention() -> Tensor:
    B, H, S, T, head_dim = 2, 3, 3, 37, 24
    inputs = _random([(B, H, S * T, head_dim)] * 3 + [(H,)])

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = torch.ops.pyard.block_attention(q, k, v, T, mask_number("causal"), None, bias)[0]
        return out

    def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return reference.block_attention(q, k, v, T, "causal", None, bias)

    return _difference(kernel, plain, inputs)


def _gather_trajectories() -> Tensor:
    noise, steps = (tensor.float() for tensor in _random([(5, 3, 7), (5, 4, 3, 7)]))
    indices = torch.tensor([4, 0, 2, 2])
    ours = torch.ops.pyard.gather_trajectories(noise, steps, indices, torch.bfloat16)
    expected = reference.gather_trajectories(noise, steps, indices, torch.bfloat16)
    return _largest(list(zip(ours, expected, strict=True)))


def _random(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _difference(kernel: Operator, plain: Operator, inputs: list[Tensor], *options: object) -> Tensor:
    leaves = [tensor.requires_grad_() for tensor in inputs]
    ours, expected = kernel(*leaves, *options), plain(*leaves, *options)
    grad = torch.cos(expected.detach())
    pairs = [(ours, expected)]
    pairs += zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    return _largest(pairs)


def _largest(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([(a - b).abs().max() for a, b in pairs]).max()  # unlike Python's `max`, NaN where there is one
