from __future__ import annotations

import math

import pytest
import torch
from ops.tolerance import assert_as_exact_as_plain
from torch import Tensor

from pyard.errors import InputError
from pyard.ops import MASKS, Backend, block_attention, reference, use_backend, visible
from pyard.ops.backend import library
from pyard.ops.masks import mask_number

needs_native = pytest.mark.skipif(library is None, reason="the native operators are not built")
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
CAUSAL = mask_number("causal")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Sq, Sk, T, Dh: no multiple of any vector, panel or tile; one token; cached steps; more keys than one tile takes.
SIZES = [(4, 4, 1, 8), (8, 8, 3, 24), (3, 3, 17, 72), (1, 5, 17, 64), (2, 3, 33, 128), (1, 1, 130, 40)]
LARGE_SIZES = [(2, 2, 255, 64), (1, 3, 257, 72), (2, 2, 257, 24), (4, 4, 256, 64)]


def closed_form(q: Tensor, k: Tensor, v: Tensor, T: int, mask: str, window: int | None, bias: Tensor | None = None) -> Tensor:
    """Softmax over a dense matrix of logits, built entry by entry from the predicate."""
    query_steps, key_steps = q.shape[2] // T, k.shape[2] // T
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    columns = []
    for row in range(q.shape[2]):
        step = key_steps - query_steps + row // T
        for column in range(k.shape[2]):
            entry = logits[:, :, row, column]
            if not visible(mask, step, column // T, window):
                entry = torch.full_like(entry, -math.inf)
            elif bias is not None and column // T != step:
                entry = entry + bias
            columns.append(entry)
    weights = torch.stack(columns, -1).unflatten(-1, logits.shape[2:]).softmax(-1)
    return weights @ v


def sample_inputs(query_steps: int, key_steps: int, T: int, head_dim: int, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(B, 3, steps * T, head_dim) for steps in (query_steps, key_steps, key_steps)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("query_steps", "key_steps"), [(4, 4), (1, 4), (2, 5), (1, 1)])
def test_matches_dense_attention(query_steps: int, key_steps: int, mask: str, with_bias: bool, backend: Backend) -> None:
    inputs = sample_inputs(query_steps, key_steps, T=3, head_dim=8)
    window = 2 if mask == "window" else None
    bias = torch.tensor([0.7, -1.3, 2.1], dtype=torch.float64, requires_grad=True) if with_bias else None
    leaves = inputs if bias is None else (*inputs, bias)  # one block, or the diagonal: zeros
    with use_backend(backend):
        ours = block_attention(*inputs, 3, mask, window, bias)
    exact = closed_form(*inputs, 3, mask, window, bias)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, grad),
        torch.autograd.grad(exact, leaves, grad, materialize_grads=True),
        rtol=1e-9,
        atol=1e-11,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("off", [-math.inf, -3e4])
def test_a_bias_may_switch_the_history_off(off: float, dtype: torch.dtype, backend: Backend) -> None:
    q, k, v = (tensor.to(dtype) for tensor in sample_inputs(3, 3, T=70, head_dim=64))
    bias = torch.full((3,), off, requires_grad=True)
    with use_backend(backend):
        out = block_attention(q, k, v, 70, bias=bias)
        alone = block_attention(q, k, v, 70, "diagonal")
    # In 16 bits the twin's two ways round differently.
    torch.testing.assert_close(out, alone, **({} if dtype in (torch.float32, torch.float64) else {"rtol": 1e-2, "atol": 2e-3}))
    assert torch.equal(torch.autograd.grad(out.sum(), bias)[0], torch.zeros(3))


@pytest.mark.parametrize("head_dim", [8, 72])
def test_slices_of_a_fused_projection_and_float32(head_dim: int) -> None:
    B, H, S, T = 2, 3, 3, 5
    fused = torch.randn(B, S * T, 3, H, head_dim)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    exact = closed_form(q.double(), k.double(), v.double(), T, "causal", None)
    torch.testing.assert_close(block_attention(q, k, v, T), exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_passes(backend: Backend) -> None:
    q, k, v = sample_inputs(1, 2, T=3, head_dim=8, B=0)
    bias = torch.zeros(3, requires_grad=True)
    with use_backend(backend):
        out = block_attention(q, k, v, 3, bias=bias)
    assert out.shape == (0, 3, 3, 8)
    assert torch.equal(torch.autograd.grad(out.sum(), bias)[0], torch.zeros(3))


def check_against_float64(
    size: tuple[int, int, int, int], dtype: torch.dtype, mask: str, bias: Tensor | None = None, H: int = 2
) -> None:
    """The kernel and plain PyTorch, both in `dtype` on slices of a fused projection, against plain PyTorch in float64."""
    query_steps, key_steps, T, head_dim = size
    B, window = 2, 3 if mask == "window" else None
    fused = torch.randn(B, key_steps * T, 3, H, head_dim, dtype=torch.float64).to(dtype).requires_grad_()
    direction = torch.randn(B, query_steps * T, H * head_dim, dtype=torch.float64).to(dtype)

    def run(backend: Backend, kind: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = fused.to(kind).permute(2, 0, 3, 1, 4).unbind(0)
        q = q[:, :, (key_steps - query_steps) * T :]
        with use_backend(backend):
            heads = block_attention(q, k, v, T, mask, window, bias)
        out = heads.transpose(1, 2).reshape(direction.shape)
        assert backend != "native" or out.data_ptr() == heads.data_ptr(), "joining the heads must not copy"
        leaves = [fused] if bias is None else [fused, bias]
        return out, *torch.autograd.grad(out, leaves, direction.to(kind))

    for ours, plain, exact in zip(run("native", dtype), run("reference", dtype), run("reference", torch.float64), strict=True):
        assert_as_exact_as_plain(ours, plain, exact.double())


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_as_exact_as_plain_pytorch(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_against_float64(size, dtype, "causal")


@needs_native
@pytest.mark.parametrize("size", LARGE_SIZES, ids=str)
def test_large_steps_are_as_exact_as_plain_pytorch(size: tuple[int, int, int, int]) -> None:
    check_against_float64(size, torch.float32, "causal")


@needs_native
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("key_steps", range(1, 9))
def test_every_mask_and_number_of_steps(mask: str, key_steps: int) -> None:
    bias = torch.randn(2, requires_grad=True)
    check_against_float64((key_steps, key_steps, 5, 8), torch.float32, mask, bias)
    check_against_float64((1, key_steps, 5, 8), torch.bfloat16, mask)


@needs_native
def test_logits_of_any_size_are_finite() -> None:
    q, k, v = (100 * torch.randn(1, 2, 34, 16, requires_grad=True) for _ in range(3))
    out = block_attention(q, k, v, 17)
    exact = reference.block_attention(q.double(), k.double(), v.double(), 17, "causal", None, None)
    torch.testing.assert_close(out, exact.float(), rtol=1e-3, atol=1e-2)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))
    assert block_attention(q * math.nan, k, v, 17).isnan().all()


@needs_native
def test_bits_depend_on_neither_threads_nor_addresses() -> None:
    B, H, S, T, head_dim = 2, 3, 3, 40, 24
    q, k, v, grad = torch.randn(4, B, H, S * T, head_dim).unbind(0)
    bias = torch.randn(H)

    def run() -> tuple[Tensor, ...]:
        leaves = [tensor.requires_grad_() for tensor in moved((q, k, v, bias))]
        out = block_attention(leaves[0], leaves[1], leaves[2], T, bias=leaves[3])
        return out, *torch.autograd.grad(out, leaves, moved((grad,))[0])

    def moved(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        # One number off, so that no address has the alignment it had before.
        shift = next(shifts)
        return [torch.cat([torch.zeros(shift), t.detach().flatten()])[shift:].view(t.shape) for t in tensors]

    shifts = iter((0, 0, 1, 3))
    one = run()
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(run(), one, strict=True))


@needs_native
def test_keeps_no_matrix_of_logits() -> None:
    """What autograd saves is linear in the tokens: q, k, v, the output and a number per query."""
    S, T, head_dim = 4, 64, 8
    q, k, v = sample_inputs(S, S, T, head_dim, B=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        block_attention(q, k, v, T)
    assert sum(saved) == 4 * q.numel() + q.numel() // head_dim


@needs_native
def test_the_operator_itself_names_wrong_input() -> None:
    q, k, v = sample_inputs(2, 2, T=3, head_dim=8)
    operator = torch.ops.pyard.block_attention
    with pytest.raises(RuntimeError, match="mask is 4, expected 0 diagonal"):
        operator(q, k, v, 3, 4, None, None)
    with pytest.raises(RuntimeError, match="6 queries and 6 keys"):
        operator(q, k, v, 4, CAUSAL, None, None)
    with pytest.raises(RuntimeError, match=r"a window of at least 1 belongs to mask 1 \(window\)"):
        operator(q, k, v, 3, mask_number("window"), None, None)
    with pytest.raises(RuntimeError, match=r"v has shape \[2, 3, 3, 8\]"):
        operator(q, k, v[:, :, :3], 3, CAUSAL, None, None)
    with pytest.raises(RuntimeError, match="bias has dtype Float, expected Double"):
        operator(q, k, v, 3, CAUSAL, None, torch.zeros(3))


def test_wrong_input_is_named() -> None:
    q, k, v = sample_inputs(2, 2, T=3, head_dim=8)
    with pytest.raises(InputError, match=r"q, k, v have shapes \[2, 3, 6, 8\], \[2, 3, 6, 8\], \[2, 3, 3, 8\]"):
        block_attention(q, k, v[:, :, :3], 3)
    with pytest.raises(InputError, match="6 queries and 6 keys, expected multiples of tokens_per_step = 4"):
        block_attention(q, k, v, 4)
    with pytest.raises(InputError, match="1 <= query blocks <= key blocks"):
        block_attention(q, k[:, :, :3], v[:, :, :3], 3)
    with pytest.raises(InputError, match=r"bias has shape \[2\], expected \[3\]"):
        block_attention(q, k, v, 3, bias=torch.zeros(2))
    with pytest.raises(InputError, match="expected one of diagonal"):
        block_attention(q, k, v, 3, "dense")
