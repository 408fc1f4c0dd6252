"""The CUDA operators beside what PyTorch offers, and the two ceilings of the machine, all in one run.

B batch, S num_steps, T tokens_per_step, D hidden size, H heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.gpu_timing import Results, median_ms, options
from pyard import ops
from pyard.ops import reference

Backend = ops.Backend
ANY_SDPA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


def dtype_of(smoke: bool) -> torch.dtype:
    """bfloat16, which a CPU may have no instructions for."""
    return torch.float32 if smoke else torch.bfloat16


def ceilings(results: Results, device: str, smoke: bool) -> None:
    """A large copy, counting bytes read and written, and a large product of random matrices."""
    size = 2**20 if smoke else 2**32
    source, target = torch.randn(size // 4, device=device), torch.empty(size // 4, device=device)

    def copy() -> dict[str, Any]:
        ms = median_ms(lambda: target.copy_(source), device)
        return {"ms": ms, "tb_per_s": 2 * size / ms / 1e9}  # gpu_table takes the floors of all other rows from these two

    n = 256 if smoke else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype_of(smoke)) for _ in range(2))

    def product() -> dict[str, Any]:
        ms = median_ms(lambda: a @ b, device)
        return {"ms": ms, "tflop_per_s": 2 * n**3 / ms / 1e9}

    results.measure("copy", copy)
    results.measure("matmul bf16", product)


def timed(forward: Callable[[], Any], leaves: list[Tensor], device: str) -> tuple[float, float]:
    """Milliseconds of forward alone and of forward and backward."""

    def both() -> None:
        outputs = forward()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, outputs)

    def alone() -> None:
        with torch.no_grad():
            forward()

    return median_ms(alone, device), median_ms(both, device)


def rows(results: Results, device: str, smoke: bool) -> None:
    """modulated_layer_norm, gated_residual and both, with the bytes that must move."""
    B, S, T, D = (2, 2, 4, 64) if smoke else (64, 4, 256, 1152)
    dtype = dtype_of(smoke)
    x, branch = (torch.randn(B, S, T, D, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    gate, shift, scale = (torch.randn(B, S, D, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    size = x.numel() * x.element_size()
    # Tensors of x's size that forward, then forward and backward, must read or write once.
    cases: dict[str, tuple[Callable[..., Any], list[Tensor], int, int]] = {
        "modulated_layer_norm": (ops.modulated_layer_norm, [x, shift, scale], 2, 5),
        "gated_residual": (ops.gated_residual, [x, gate, branch], 3, 6),
        "gated_residual_modulated_layer_norm": (
            ops.gated_residual_modulated_layer_norm,
            [x, gate, branch, shift, scale],
            4,
            10,
        ),
    }
    for name, (function, leaves, of_forward, of_both) in cases.items():

        def run(
            backend: Backend, compiled: bool, function: Any, leaves: list[Tensor], moved: tuple[int, int]
        ) -> dict[str, Any]:
            with ops.use_backend(backend):
                call = torch.compile(function) if compiled else function
                forward, both = timed(lambda: call(*leaves), leaves, device)
            return {
                "forward_ms": forward,
                "forward_gb": moved[0] * size / 1e9,
                "both_ms": both,
                "both_gb": moved[1] * size / 1e9,
            }

        for label, backend, compiled in (
            ("native", "native", False),
            ("plain", "reference", False),
            ("plain compiled", "reference", True),
        ):
            if compiled and smoke:
                continue
            results.measure(f"{name} {label}", partial(run, backend, compiled, function, leaves, (of_forward, of_both)))


def attention(results: Results, device: str, smoke: bool) -> None:
    """block_attention at DiT-XL/2's lower layers, beside every other way to compute it."""
    B, H, S, T, head_dim = (1, 2, 2, 8, 24) if smoke else (8, 16, 4, 256, 72)
    fused = torch.randn(B, S * T, 3, H, head_dim, device=device, dtype=dtype_of(smoke))
    q, k, v = (tensor.detach().requires_grad_() for tensor in fused.permute(2, 0, 3, 1, 4).unbind(0))
    flops = 4 * B * H * head_dim * T * T * S * (S + 1) / 2
    step = torch.arange(S * T, device=device) // T
    dense = step[:, None] >= step[None, :]
    block_mask = create_block_mask(lambda b, h, i, j: i // T >= j // T, None, None, S * T, S * T, device=device)
    flex = flex_attention if smoke else torch.compile(flex_attention, dynamic=False)
    exact = reference.block_attention(q.double(), k.double(), v.double(), T, "causal", None, None).detach()

    def dense_mask() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    def blocks() -> Tensor:
        return flex(q, k, v, block_mask=block_mask)

    def per_step() -> Tensor:
        return reference.block_attention(q, k, v, T, "causal", None, None)

    def native() -> Tensor:
        return ops.block_attention(q, k, v, T)

    # Forward moves q, k, v and out; backward reads these and grad, and writes three gradients.
    size = q.numel() * q.element_size()

    def run(forward: Callable[[], Tensor], sdpa: SDPBackend | None, backend: Backend, deterministic: bool) -> dict[str, Any]:
        torch.use_deterministic_algorithms(deterministic)
        # Otherwise every new tensor is filled with NaN first, which is no part of the work.
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            with ops.use_backend(backend), sdpa_kernel(ANY_SDPA if sdpa is None else sdpa):
                error = (forward().double() - exact).norm() / exact.norm()
                alone, both = timed(forward, [q, k, v], device)
        finally:
            torch.use_deterministic_algorithms(False)
        return {
            "forward_ms": alone,
            "forward_gflop": flops / 1e9,
            "forward_gb": 4 * size / 1e9,
            "both_ms": both,
            "both_gflop": 3.5 * flops / 1e9,
            "both_gb": 12 * size / 1e9,
            "relative_error": error.item(),
        }

    ways: dict[str, tuple[Callable[[], Tensor], SDPBackend | None, Backend, bool]] = {
        "native": (native, None, "native", False),
        "native deterministic": (native, None, "native", True),
        "per-step SDPA": (per_step, None, "reference", False),
        "per-step SDPA flash": (per_step, SDPBackend.FLASH_ATTENTION, "reference", False),
        "per-step SDPA cuDNN": (per_step, SDPBackend.CUDNN_ATTENTION, "reference", False),
        "dense-mask SDPA": (dense_mask, None, "reference", False),
        "FlexAttention, same BlockMask": (blocks, None, "reference", False),
    }
    for name, way in ways.items():
        results.measure(name, partial(run, *way))


def main() -> None:
    """Runs the three parts."""
    arguments = options(__doc__ or "")
    torch.manual_seed(0)
    for step, part in (("ceilings", ceilings), ("rows", rows), ("attention", attention)):
        path = arguments.out.with_name(f"{arguments.out.stem}_{step}.json")
        part(Results(path, step), arguments.device, arguments.smoke)


if __name__ == "__main__":
    main()
