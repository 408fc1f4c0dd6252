"""block_attention by every way to compute it, at the shapes of students.

B batch, S num_steps, T tokens_per_step, H heads, Dh head size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.backends import attention_backends
from benchmarks.gpu.kernels_taken import attentions_of
from benchmarks.gpu.measure import NotTakenError, Results, Setting
from benchmarks.gpu.operators import both_times
from pyard import ops
from pyard.ops import reference

S, H = 4, 16


class Case:
    """Inputs as a student has them: slices of one fused projection, a bias drawn at random or none.

    Args:
        setting: device and sizes.
        T: tokens per step.
        head_dim: Dh.
        biased: whether there is a learned bias of the history, as `pyard.train` gives students by default.
    """

    def __init__(self, setting: Setting, T: int, head_dim: int, biased: bool):
        # About the keys and values of 8 samples of DiT-XL/2, more than the 50 MB of an H100's level 2 cache.
        self.B, self.H, self.T = (1, 2, 8) if setting.smoke else (max(1, 2048 // T), H, T)
        self.steps = 2 if setting.smoke else S
        self.head_dim, self.device = head_dim, setting.device
        size = (self.B, self.steps * self.T, 3, self.H, head_dim)
        fused = torch.randn(size, device=setting.device, dtype=setting.half)
        self.q, self.k, self.v = (t.detach().requires_grad_() for t in fused.permute(2, 0, 3, 1, 4).unbind(0))
        self.bias = torch.randn(self.H, device=setting.device, requires_grad=True) if biased else None
        self.leaves = [self.q, self.k, self.v, *([] if self.bias is None else [self.bias])]
        # Products of queries and keys, with the masked blocks left out; forward has two, backward five.
        self.flops = 4 * self.B * self.H * head_dim * self.T**2 * self.steps * (self.steps + 1) / 2
        self.bytes = self.q.numel() * self.q.element_size()

    def attend(self) -> Tensor:
        """By the backend in force."""
        return ops.block_attention(self.q, self.k, self.v, self.T, "causal", None, self.bias)

    def row(self, forward: Callable[[], Tensor], exact: Tensor | None) -> dict[str, Any]:
        """Times beside the work that must be done: q, k, v and out move forward; these, grad and three gradients backward."""
        error = {}
        if exact is not None:
            out = forward().detach().double()
            error = {"relative_error": ((out - exact).norm() / exact.norm()).item()}
        taken = attentions_of(forward)
        return {
            "forward_gflop": self.flops / 1e9,
            "forward_gb": 4 * self.bytes / 1e9,
            "both_gflop": 3.5 * self.flops / 1e9,
            "both_gb": 12 * self.bytes / 1e9,
            **both_times(forward, self.leaves, self.device),
            **error,
            "kernels": taken,
        }

    def exact(self) -> Tensor:
        """In float64."""
        q, k, v = (t.detach().double() for t in (self.q, self.k, self.v))
        bias = None if self.bias is None else self.bias.detach().double()
        with torch.no_grad():
            return reference.block_attention(q, k, v, self.T, "causal", None, bias)


def production(results: Results, setting: Setting) -> None:
    """DiT-XL/2's lower layers (T 256, Dh 72), with the bias and without, by every way but FlexAttention."""
    for biased in (True, False):
        case = Case(setting, 256, 72, biased)
        exact = case.exact()
        label = "biased" if biased else "no bias"
        for backend in attention_backends():
            results.measure(f"{label}, {backend}", partial(_run, case, exact, backend, False), needs_s=1.0)
        results.measure(f"{label}, native deterministic", partial(_run, case, exact, "native", True), needs_s=1.0)
        results.measure(f"{label}, dense mask", partial(_dense, case, exact), needs_s=1.0)
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        name = kernel.name.removesuffix("_ATTENTION").lower()
        results.measure(
            f"no bias, reference, {name} alone", partial(_run, case, exact, "reference", False, kernel), needs_s=1.0
        )


def shapes(results: Results, setting: Setting) -> None:
    """T from 256 to 4096 by head sizes: what `auto` should take where."""
    tokens = (8,) if setting.smoke else (256, 1024, 4096)
    head_dims = (24,) if setting.smoke else (64, 72, 128)
    for biased in (True, False):
        for T in tokens:
            for head_dim in head_dims:
                case = Case(setting, T, head_dim, biased)
                label = f"T {T}, Dh {head_dim}, {'biased' if biased else 'no bias'}"
                for backend in attention_backends():
                    results.measure(f"{label}, {backend}", partial(_run, case, None, backend, False), needs_s=1.0)
    for T in () if setting.smoke else (512, 2048):
        case = Case(setting, T, 72, True)
        for backend in attention_backends():
            results.measure(f"T {T}, Dh 72, biased, {backend}", partial(_run, case, None, backend, False), needs_s=1.0)


def own_blocks(results: Results, setting: Setting) -> None:
    """Attention within a step alone, as in the upper 22 of 28 layers: S folded into the batch, no history, no mask."""
    case = Case(setting, 256, 72, False)
    fused = torch.randn(case.B * case.steps, case.T, 3, case.H, case.head_dim, device=setting.device, dtype=setting.half)
    case.q, case.k, case.v = (t.detach().requires_grad_() for t in fused.permute(2, 0, 3, 1, 4).unbind(0))
    case.leaves = [case.q, case.k, case.v]
    case.flops = 4 * case.B * case.steps * case.H * case.head_dim * case.T**2
    for backend in attention_backends():
        results.measure(backend, partial(_run, case, None, backend, False), needs_s=1.0)


def flex(results: Results, setting: Setting) -> None:
    """FlexAttention at DiT-XL/2's shape; it compiles for each, so it comes last."""
    for biased in (False, True):
        case = Case(setting, 256, 72, biased)
        name = "biased" if biased else "no bias"
        results.measure(name, partial(_run, case, case.exact(), "flex", False), needs_s=8.0)


def _run(
    case: Case, exact: Tensor | None, backend: ops.Backend, deterministic: bool, kernel: SDPBackend | None = None
) -> dict[str, Any]:
    with ops.use_backend(backend), _deterministic(deterministic):
        if kernel is None:
            return case.row(case.attend, exact)
        try:
            with sdpa_kernel(kernel):
                return case.row(case.attend, exact)
        except RuntimeError as error:
            if re.match("No (viable|available)", str(error)):
                raise NotTakenError("this kernel does not take such input here") from None
            raise


def _dense(case: Case, exact: Tensor) -> dict[str, Any]:
    """One SDPA over all tokens with the mask, and the bias in it, as a [H, S T, S T] or [S T, S T] tensor."""
    step = torch.arange(case.steps * case.T, device=case.device) // case.T
    seen, earlier = step[:, None] >= step[None, :], step[:, None] > step[None, :]

    def attend() -> Tensor:
        mask = seen
        if case.bias is not None:
            bias = case.bias.to(case.q.dtype)[:, None, None]
            mask = torch.where(earlier, bias, torch.where(seen, 0.0, -torch.inf).to(case.q.dtype))
        return F.scaled_dot_product_attention(case.q, case.k, case.v, attn_mask=mask)

    return case.row(attend, exact)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(wanted)
    # Otherwise every new tensor is filled with NaN first, which is no part of the work.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
