"""The CUDA kernels' own source on the emulated machine of cuda_emulator/: what can be known of them without a GPU."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from ops.cuda_emulator.kernels import BlockMask, Kernels, compile_kernels, compiler
from ops.tolerance import assert_as_exact_as_plain
from torch import Tensor

from pyard.ops import MASKS, reference, visible

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to compile the kernels with")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(compile_kernels(tmp_path_factory.mktemp("emulated")))


def closed_form(q: Tensor, k: Tensor, v: Tensor, T: int, mask: str, window: int | None, bias: Tensor | None) -> Tensor:
    """In float64, with a dense mask built from the predicate."""
    query_steps, key_steps = q.shape[2] // T, k.shape[2] // T
    steps = range(key_steps - query_steps, key_steps)
    seen = torch.tensor([[visible(mask, step, kv_step, window) for kv_step in range(key_steps)] for step in steps])
    earlier = torch.tensor([[kv_step != step for kv_step in range(key_steps)] for step in steps])
    seen, earlier = (x.repeat_interleave(T, 0).repeat_interleave(T, 1) for x in (seen, earlier))
    logits = q.double() @ k.double().transpose(2, 3) / math.sqrt(q.shape[3])
    if bias is not None:
        logits = logits + earlier * bias.double()[:, None, None]
    return logits.masked_fill(~seen, -math.inf).softmax(-1) @ v.double()


def check_attention(
    kernels: Kernels,
    dtype: torch.dtype,
    T: int,
    mask: str,
    head_dim: int,
    query_steps: int = 3,
    key_steps: int = 3,
    with_bias: bool = False,
    deterministic: bool = True,
    B: int = 1,
    H: int = 1,
) -> None:
    # Slices of a fused projection, as the model passes them.
    fused = torch.randn(B, key_steps * T, 3, H, head_dim).to(dtype)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    q = q[:, :, (key_steps - query_steps) * T :]
    grad = torch.randn(B, query_steps * T, H, head_dim).to(dtype).transpose(1, 2)
    bias = torch.randn(H) if with_bias else None
    options = (T, mask, 2 if mask == "window" else None, bias)

    out, lse = kernels.attention_forward(q, k, v, *options)
    ours = (out, *kernels.attention_backward(grad, q, k, v, out, lse, *options, deterministic=deterministic))

    def results(function: object, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        value = function(*leaves[:3], *options[:3], leaves[3] if with_bias else None)  # type: ignore[operator]
        gradients = torch.autograd.grad(value, leaves, grad.to(value.dtype), allow_unused=True)
        zeros = [torch.zeros_like(a) if b is None else b for a, b in zip(leaves, gradients, strict=True)]
        return value.detach(), *zeros

    learned = [] if bias is None else [bias]
    exact = results(closed_form, *(tensor.double() for tensor in (q, k, v, *learned)))
    plain = results(reference.block_attention, q, k, v, *learned)
    for our, plain_one, exact_one in zip(ours, plain, exact, strict=False):
        assert our is not None
        assert_as_exact_as_plain(our, plain_one, exact_one)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("T", [1, 3, 17])
def test_attention_with_every_mask_and_ragged_tiles(kernels: Kernels, T: int, mask: str) -> None:
    for with_bias in (False, True):
        check_attention(kernels, torch.bfloat16, T, mask, 72, with_bias=with_bias, deterministic=True, B=2, H=2)
        check_attention(kernels, torch.float32, T, mask, 72, with_bias=with_bias, deterministic=False)
    check_attention(kernels, torch.float16, T, mask, 64, 1, 4, with_bias=True)
    check_attention(kernels, torch.float16, T, mask, 64, 2, 5, deterministic=False)
