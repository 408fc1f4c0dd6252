"""The operators beside what PyTorch offers, and the two ceilings of the machine.

B batch, S num_steps, T tokens_per_step, D hidden size, H heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.backends import row_backends
from benchmarks.gpu.measure import Results, Setting, time_call
from pyard import ops


def ceilings(results: Results, setting: Setting) -> None:
    """A large copy, counting bytes read and written, and a large product of random matrices: the floors of all other rows."""
    size = 2**20 if setting.smoke else 2**32
    n = 256 if setting.smoke else 8192

    def copy() -> dict[str, Any]:
        source = torch.randn(size // 4, device=setting.device)
        target = torch.empty_like(source)
        time = time_call(lambda: target.copy_(source), setting.device)
        return {**time.row(), "tb_per_s": 2 * size / time.ms / 1e9}

    def product() -> dict[str, Any]:
        a, b = (torch.randn(n, n, device=setting.device, dtype=setting.half) for _ in range(2))
        time = time_call(lambda: a @ b, setting.device)
        return {**time.row(), "tflop_per_s": 2 * n**3 / time.ms / 1e9}

    results.measure("copy", copy)
    results.measure("matmul bf16", product)


def both_times(forward: Callable[[], Any], leaves: list[Tensor], device: str) -> dict[str, Any]:
    """The times of forward alone, and of forward and backward."""

    def both() -> None:
        outputs = forward()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, outputs)

    def alone() -> None:
        with torch.no_grad():
            forward()

    return {**time_call(alone, device).row("forward_"), **time_call(both, device).row("both_")}


def rows(results: Results, setting: Setting) -> None:
    """The operators that are bound by memory, with the bytes that must move: in bfloat16, in float32, and as under autocast.

    There the residual stream is float32, and what is added to it or multiplied with it is bfloat16.
    """
    half, single = setting.half, torch.float32
    ways = row_backends(setting.smoke)
    # What must be compiled first takes seconds a row, so it comes last.
    for chosen in ([way for way in ways if not way[2]], [way for way in ways if way[2]]):
        for label, stream, branch in (("bf16", half, half), ("autocast", single, half), ("float32", single, single)):
            for name, (function, leaves, forward_bytes, both_bytes) in row_cases(setting, stream, branch).items():
                for way, backend, compiled in chosen:
                    run = partial(_row, backend, compiled, function, leaves, (forward_bytes, both_bytes), setting.device)
                    results.measure(f"{name} {label} {way}", run, needs_s=4.0 if compiled else 1.0)


def _row(
    backend: ops.Backend, compiled: bool, function: Any, leaves: list[Tensor], moved: tuple[int, int], device: str
) -> dict[str, Any]:
    if compiled:
        torch.compiler.reset()
    with ops.use_backend(backend):
        call = torch.compile(function, dynamic=False) if compiled else function
        times = both_times(lambda: call(*leaves), leaves, device)
    return {"forward_gb": moved[0] / 1e9, "both_gb": moved[1] / 1e9, **times}


def row_cases(
    setting: Setting, stream: torch.dtype, branch_dtype: torch.dtype
) -> dict[str, tuple[Callable[..., Any], list[Tensor], int, int]]:
    """Function, inputs, and the bytes that forward, then forward and backward, must read or write: each large tensor once."""
    B, S, T, D = (2, 2, 4, 64) if setting.smoke else (64, 4, 256, 1152)
    device = setting.device
    x = torch.randn(B, S, T, D, device=device, dtype=stream, requires_grad=True)
    branch = torch.randn(B, S, T, D, device=device, dtype=branch_dtype, requires_grad=True)
    gate, shift, scale = (torch.randn(B, S, D, device=device, dtype=branch_dtype, requires_grad=True) for _ in range(3))
    s, b = x.numel() * x.element_size(), branch.numel() * branch.element_size()
    cases: dict[str, tuple[Callable[..., Any], list[Tensor], int, int]] = {
        # reads x, writes normal; reads grad and x, writes dx. Under autocast, a linear layer takes normal in `branch`'s dtype.
        "modulated_layer_norm": (ops.modulated_layer_norm, [x, shift, scale], s + b, 2 * s + b + s + b),
        # reads x and branch, writes the sum; reads grad (which is dx) and branch, writes dbranch
        "gated_residual": (ops.gated_residual, [x, gate, branch], 2 * s + b, 3 * s + 3 * b),
        "gated_residual_modulated_layer_norm": (
            ops.gated_residual_modulated_layer_norm,
            [x, gate, branch, shift, scale],
            2 * s + 2 * b,
            5 * s + 5 * b,
        ),
    }
    if stream == branch_dtype:
        hidden = torch.randn(B // 2, S, T, 4 * D, device=device, dtype=stream, requires_grad=True)
        bias = torch.randn(4 * D, device=device, dtype=stream, requires_grad=True)
        size = hidden.numel() * hidden.element_size()
        cases["gelu_tanh"] = (ops.gelu_tanh, [hidden, bias], 2 * size, 5 * size)
    return cases


def small(results: Results, setting: Setting) -> None:
    """The operators whose time is their launch: the embedding of times, and the gathering of trajectories on the device."""
    device, n = setting.device, 64 if setting.smoke else 4096
    times = torch.rand(64, 4, device=device)
    noise = torch.randn(n, 4, 32, 32, device=device)
    steps = torch.randn(n, 4, 4, 32, 32, device=device)
    indices = torch.randint(n, (64,), device=device)
    moved = 64 * noise[0].numel() * (4 + 4 * 4 + 2 * 4 * 2)  # float32 in, history and target in bfloat16 out

    def run(function: Callable[[], object], backend: ops.Backend, size: int) -> dict[str, Any]:
        with ops.use_backend(backend), torch.no_grad():
            return {**time_call(function, device).row(), "gb": size / 1e9}

    for way, backend, compiled in row_backends(setting.smoke):
        if not compiled:
            embed = partial(ops.timestep_embedding, times, 256)
            results.measure(f"timestep_embedding {way}", partial(run, embed, backend, 64 * 4 * 256 * 4))
            gather = partial(ops.gather_trajectories, noise, steps, indices, torch.bfloat16)
            results.measure(f"gather_trajectories {way}", partial(run, gather, backend, moved))


def gelu_of_linear(results: Results, setting: Setting) -> None:
    """The MLP's first layer with its activation: what a kernel of the activation alone can gain."""
    B, D = (8, 64) if setting.smoke else (64 * 4 * 256, 1152)
    x = torch.randn(B, D, device=setting.device, dtype=setting.half)
    weight = torch.randn(4 * D, D, device=setting.device, dtype=setting.half)
    bias = torch.randn(4 * D, device=setting.device, dtype=setting.half)
    flops, moved = 2.0 * B * D * 4 * D, x.element_size() * (x.numel() + weight.numel() + 4 * B * D)

    def run(function: Callable[[], object], backend: ops.Backend) -> dict[str, Any]:
        with ops.use_backend(backend), torch.no_grad():
            return {**time_call(function, setting.device).row(), "gflop": flops / 1e9, "gb": moved / 1e9}

    fused = partial(lambda: ops.gelu_tanh(F.linear(x, weight), bias))
    plain = partial(lambda: F.gelu(F.linear(x, weight, bias), approximate="tanh"))
    results.measure("linear, then gelu_tanh with its bias, native", partial(run, fused, "native"))
    results.measure("linear with bias, then F.gelu", partial(run, plain, "reference"))
