"""The backend `merged`: the library's kernels over own and earlier blocks, merged by log-sum-exp."""

from __future__ import annotations

import math

import pytest
import torch
from ops.test_block_attention import closed_form
from ops.tolerance import assert_as_exact_as_plain
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyard import ops
from pyard.errors import InputError
from pyard.ops import MASKS, Backend, library_attention, use_backend
from pyard.ops.masks import mask_number

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Sq, Sk, T, Dh: one token; cached steps; sizes that are multiples of nothing; more than one tile.
SIZES = [(4, 4, 1, 8), (1, 5, 17, 64), (2, 4, 3, 24), (3, 3, 130, 72), (1, 1, 5, 8)]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: str = "causal", T: int = 3) -> Tensor:
    return ops.block_attention(q, k, v, T, mask, 2 if mask == "window" else None, bias)


def sample(dtype: torch.dtype = torch.float64, T: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, 2, steps * T, 8, dtype=dtype).requires_grad_() for steps in (2, 3, 3))
    return q, k, v, torch.randn(2, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("query_steps", "key_steps"), [(4, 4), (1, 4), (2, 5), (1, 1)])
def test_matches_dense_attention(query_steps: int, key_steps: int, mask: str, with_bias: bool) -> None:
    shapes = [(2, 3, steps * 3, 8) for steps in (query_steps, key_steps, key_steps)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    if with_bias:
        leaves.append(torch.tensor([0.7, -1.3, 2.1], dtype=torch.float64, requires_grad=True))
    options = 3, mask, 2 if mask == "window" else None, leaves[3] if with_bias else None
    with use_backend("merged"):
        ours = ops.block_attention(leaves[0], leaves[1], leaves[2], *options)
    exact = closed_form(leaves[0], leaves[1], leaves[2], *options)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(ours)
    expected = torch.autograd.grad(exact, leaves, grad, materialize_grads=True)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, grad), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_as_exact_as_plain_pytorch(size: tuple[int, int, int, int], mask: str, dtype: torch.dtype) -> None:
    query_steps, key_steps, T, head_dim = size
    B, H = 2, 2
    fused = torch.randn(B, key_steps * T, 3, H, head_dim, dtype=torch.float64).to(dtype).requires_grad_()
    direction = torch.randn(B, query_steps * T, H * head_dim, dtype=torch.float64).to(dtype)
    bias = torch.randn(H, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32)).requires_grad_()

    def run(backend: Backend, kind: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = fused.to(kind).permute(2, 0, 3, 1, 4).unbind(0)
        wide = bias.to(torch.promote_types(kind, torch.float32))
        with use_backend(backend):
            heads = attend(q[:, :, (key_steps - query_steps) * T :], k, v, wide, mask, T)
        out = heads.transpose(1, 2).reshape(direction.shape)
        assert backend != "merged" or out.data_ptr() == heads.data_ptr(), "joining the heads must not copy"
        of_fused, of_bias = torch.autograd.grad(out, [fused, bias], direction.to(kind))
        # A sum over all rows, whose every term is rounded to the inputs' dtype.
        return out, of_fused, (of_bias / (B * query_steps * T if dtype in (torch.float32, torch.float64) else 1)).to(kind)

    for ours, plain, exact in zip(run("merged", dtype), run("reference", dtype), run("reference", torch.float64), strict=True):
        assert_as_exact_as_plain(ours, plain, exact.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("off", [-math.inf, -3e4])
def test_a_bias_may_switch_the_history_off(off: float, dtype: torch.dtype) -> None:
    q, k, v, _ = sample(dtype)
    bias = torch.full((2,), off, requires_grad=True)
    with use_backend("merged"):
        out = attend(q, k, v, bias)
        alone = attend(q, k, v, None, "diagonal")
        torch.testing.assert_close(out, alone)
        leaves = [q, k, v]
        expected = torch.autograd.grad(alone.sum(), leaves)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves, retain_graph=True), expected)
    assert torch.equal(torch.autograd.grad(out.sum(), bias)[0], torch.zeros(2))


@pytest.mark.slow
def test_derivatives_to_second_order() -> None:
    with use_backend("merged"):
        assert torch.autograd.gradcheck(attend, sample())
        assert torch.autograd.gradgradcheck(attend, sample())


@pytest.mark.slow
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_opcheck(with_bias: bool) -> None:
    q, k, v, bias = sample(torch.float32)
    options = 3, mask_number("causal"), None, bias if with_bias else None
    torch.library.opcheck(torch.ops.pyard.merged_attention.default, (q, k, v, *options))
    results = torch.ops.pyard.merged_attention(*(tensor.detach() for tensor in (q, k, v)), *options)
    saved = [tensor.detach() for tensor in results]
    backward = torch.ops.pyard.merged_attention_backward.default
    torch.library.opcheck(backward, (torch.randn_like(q), q, k, v, *saved, *options))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_graph_breaks(dtype: torch.dtype, mask: str) -> None:
    q, k, v, bias = sample(dtype)

    def with_gradients(function: object) -> tuple[Tensor, ...]:
        out = function(q, k, v, bias, mask)  # type: ignore[operator]
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v, bias))

    with use_backend("merged"):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(with_gradients(compiled), with_gradients(attend))


@pytest.mark.filterwarnings("ignore:.*performance drop")
def test_vmap_equals_a_loop() -> None:
    many = [tensor.detach() for tensor in sample()]
    stacked = [torch.stack([tensor, 2 * tensor]) for tensor in many]
    with use_backend("merged"):
        together = torch.func.vmap(attend)(*stacked)
        torch.testing.assert_close(together, torch.stack([attend(*many), attend(*(2 * tensor for tensor in many))]))


def test_autocast_keeps_the_dtype_of_the_queries() -> None:
    q, k, v, bias = sample(torch.float32)
    with use_backend("merged"), torch.autocast("cpu", torch.bfloat16):
        assert attend(q, k.bfloat16(), v.bfloat16(), bias).dtype == torch.float32
        assert attend(q, k, v, None, "diagonal").dtype == torch.float32


def test_an_empty_batch_passes() -> None:
    q, k, v, bias = (tensor[:0] if tensor.dim() == 4 else tensor for tensor in sample())
    with use_backend("merged"):
        out = attend(q, k, v, bias)
    assert out.shape == (0, 2, 6, 8)
    assert torch.equal(torch.autograd.grad(out.sum(), bias)[0], torch.zeros(2, dtype=torch.float64))


def test_it_builds_no_mask_and_repeats_no_key() -> None:
    """What autograd saves is linear in the tokens: q, k, v, the output, and a number per query."""
    q, k, v = (torch.randn(1, 2, 4 * 32, 8, requires_grad=True) for _ in range(3))
    saved = []
    with use_backend("merged"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        attend(q, k, v, T=32)
    assert sum(saved) == 4 * q.numel() + q.numel() // 8


def test_what_the_library_has_no_kernel_for_is_said() -> None:
    q = torch.empty(1, 1, 3, 8, device="meta")
    with use_backend("merged"), pytest.raises(InputError, match="backend 'merged' cannot run block_attention on meta in"):
        attend(q, q, q)


# None of CUDA's kernels can run here; that they take these arguments and return these shapes, torch's own description says.
@pytest.mark.parametrize("head_dim", [72, 20])
@pytest.mark.parametrize(
    ("dtype", "allowed", "kernel"),
    [
        (torch.bfloat16, SDPBackend.FLASH_ATTENTION, "flash"),
        (torch.float16, SDPBackend.CUDNN_ATTENTION, "cudnn"),
        (torch.bfloat16, SDPBackend.EFFICIENT_ATTENTION, "efficient"),
        (torch.float32, SDPBackend.EFFICIENT_ATTENTION, "efficient"),
    ],
)
def test_the_kernels_of_cuda_take_what_they_are_given(
    dtype: torch.dtype, allowed: SDPBackend, kernel: str, head_dim: int
) -> None:
    with FakeTensorMode(), sdpa_kernel(allowed):
        q, k = (torch.empty(2, 3, tokens, head_dim, device="cuda", dtype=dtype) for tokens in (17, 51))
        assert library_attention.cuda_kernel(q) == kernel
        out, lse = library_attention.forward(q, k, k)
        assert (out.shape, out.dtype) == (q.shape, dtype)
        assert (lse.shape, lse.dtype) == ((2, 3, 17), torch.float32)
        gradients = library_attention.backward(out, q, k, k, out, lse)
        assert [(gradient.shape, gradient.dtype) for gradient in gradients] == [(x.shape, dtype) for x in (q, k, k)]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("allowed", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_every_kernel_of_cuda_is_as_exact_as_plain_pytorch(allowed: SDPBackend, mask: str, dtype: torch.dtype) -> None:
    T, H, window = 33, 2, 2 if mask == "window" else None
    inputs = [torch.randn(2, H, 3 * T, 72, device="cuda").to(dtype) for _ in range(3)]
    bias, grad = torch.randn(H, device="cuda"), torch.randn(2, H, 3 * T, 72, device="cuda").to(dtype)

    def run(backend: Backend, kind: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.to(kind).requires_grad_() for tensor in inputs]
        with use_backend(backend):
            out = ops.block_attention(*leaves, T, mask, window, bias.to(torch.promote_types(kind, torch.float32)))
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))

    plain, exact = run("reference", dtype), run("reference", torch.float64)
    with sdpa_kernel(allowed):
        ours = run("merged", dtype)
    for our, plain_one, exact_one in zip(ours, plain, exact, strict=True):
        assert_as_exact_as_plain(our, plain_one, exact_one)
