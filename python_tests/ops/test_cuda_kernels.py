"""The CUDA kernels, twice: their own source on the emulated machine of cuda_emulator/, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from covering import covering
from ops.cuda_emulator.kernels import BlockMask, Kernels
from ops.device_kernels import DeviceKernels
from ops.tolerance import assert_as_exact_as_plain
from torch import Tensor

from pyard.ops import MASKS, reference, visible
from pyard.ops.backend import library

AnyKernels = Kernels | DeviceKernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    kernels: AnyKernels,
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
    # A query that sees one key has a softmax of 1: its shares of dq and dk are zero, as differences of numbers of this size.
    # Under every mask that is so of the first step's, where a step is one token.
    alone = T == 1 and (mask == "diagonal" or query_steps == key_steps)
    cancels = max(1.0, (grad.float() @ v.float().transpose(2, 3)).abs().max().item()) if alone else 1.0
    for index, (our, plain_one, exact_one) in enumerate(zip(ours[:4], plain, exact, strict=False)):
        size = cancels if index in (1, 2) else 1.0
        assert_as_exact_as_plain(our / size, plain_one / size, exact_one / size)
    if bias is not None:
        # A sum over all rows, so its floor is that of a row's share; the inputs' dtype rounds every term.
        rows = B * query_steps * T if dtype == torch.float32 else 1
        of_bias = [(gradients[4].double() / rows).to(dtype) for gradients in (ours, plain)]
        assert_as_exact_as_plain(*of_bias, exact[4] / rows)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("T", [1, 3, 17])
def test_attention_with_every_mask_and_ragged_tiles(kernels: AnyKernels, T: int, mask: str) -> None:
    for with_bias in (False, True):
        check_attention(kernels, torch.bfloat16, T, mask, 72, with_bias=with_bias, deterministic=True, B=2, H=2)
        check_attention(kernels, torch.float32, T, mask, 72, with_bias=with_bias, deterministic=False)
    check_attention(kernels, torch.float16, T, mask, 64, 1, 4, with_bias=True)
    check_attention(kernels, torch.float16, T, mask, 64, 2, 5, deterministic=False)


@pytest.mark.parametrize("T", [255, 257])
def test_attention_over_many_tiles(kernels: AnyKernels, T: int) -> None:
    check_attention(kernels, torch.bfloat16, T, "causal", 72, 2, 2, with_bias=True)
    check_attention(kernels, torch.bfloat16, T, "anchor", 72, 1, 3, with_bias=True, deterministic=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    covering([{"T": T, "mask": m, "dtype": d} for T in (64, 255, 257) for m in MASKS for d in DTYPES]),
    ids=str,
)
def test_attention_over_many_tiles_in_every_mask_and_dtype(kernels: AnyKernels, settings: dict[str, Any]) -> None:
    T, mask, dtype = settings["T"], settings["mask"], settings["dtype"]
    for with_bias in (False, True):
        for deterministic in (False, True):
            check_attention(kernels, dtype, T, mask, 72, with_bias=with_bias, deterministic=deterministic)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 88, 96, 128])
def test_attention_in_every_instantiation(kernels: AnyKernels, head_dim: int, dtype: torch.dtype) -> None:
    for deterministic in (False, True):
        check_attention(kernels, dtype, 66, "causal", head_dim, 1, 2, with_bias=True, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_may_switch_the_history_off(kernels: AnyKernels, dtype: torch.dtype, deterministic: bool) -> None:
    T, H = 70, 2  # more than one tile of earlier keys
    q, k, v, grad = torch.randn(4, 1, H, 3 * T, 72).to(dtype).unbind(0)
    bias = torch.tensor([-math.inf, 0.3])
    out, lse = kernels.attention_forward(q, k, v, T, "causal", None, bias)
    grads = kernels.attention_backward(grad, q, k, v, out, lse, T, "causal", None, bias, deterministic)
    assert grads[3] is not None
    assert grads[3][0] == 0
    alone, alone_lse = kernels.attention_forward(q, k, v, T, "diagonal")
    alone_grads = kernels.attention_backward(grad, q, k, v, alone, alone_lse, T, "diagonal", None, None, deterministic)
    for ours, expected in zip((out, lse, *grads[:3]), (alone, alone_lse, *alone_grads[:3]), strict=True):
        torch.testing.assert_close(ours[:, 0], expected[:, 0])
        assert bool(ours.isfinite().all())


def test_attention_refuses_what_it_was_not_compiled_for(kernels: AnyKernels) -> None:
    q = torch.randn(1, 1, 4, 136)
    with pytest.raises((AssertionError, RuntimeError), match="multiple of 8 from 8 to 128"):
        kernels.attention_forward(q, q, q, 2, "causal")


@pytest.mark.parametrize("key_steps", [1, 2, 5, 8])
def test_attention_of_a_cached_rollout(kernels: AnyKernels, key_steps: int) -> None:
    check_attention(kernels, torch.bfloat16, 9, "causal", 72, 1, key_steps, with_bias=True, H=2)
    check_attention(kernels, torch.bfloat16, 9, "window", 72, 1, key_steps, deterministic=False, H=2)


def in_drawn_orders(emulated: Kernels, compute: Callable[[], list[Tensor]]) -> None:
    """Whatever order blocks, warps and lanes run in, every bit is the same."""
    results = []
    for seed in (1, 2, 3, 4):
        emulated.library.emulated_order(seed)
        results.append(compute())
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_result_depends_on_the_order_of_threads(emulated: Kernels, dtype: torch.dtype) -> None:
    fused, grad, bias = torch.randn(1, 2 * 70, 3, 1, 72).to(dtype), torch.randn(1, 1, 2 * 70, 72).to(dtype), torch.randn(1)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)

    def attend() -> list[Tensor]:
        out, lse = emulated.attention_forward(q, k, v, 70, "causal", None, bias)
        grads = emulated.attention_backward(grad, q, k, v, out, lse, 70, "causal", None, bias)
        return [out, lse, *(gradient for gradient in grads if gradient is not None)]

    x, branch, gate, shift, scale = sample_rows((1, 2, 37, 2048), dtype)

    def norm() -> list[Tensor]:
        residual, normal = emulated.residual_norm_forward(x, gate, branch, shift, scale, EPS)
        grads = emulated.residual_norm_backward(branch, x, residual, gate, branch, scale, EPS)
        return [residual, normal, *grads.values()]

    hidden, hidden_bias = torch.randn(700, 72).to(dtype), torch.randn(72).to(dtype)
    in_drawn_orders(emulated, lambda: [*emulated.gelu_backward(hidden, hidden, hidden_bias)])
    in_drawn_orders(emulated, attend)
    in_drawn_orders(emulated, norm)


def far_apart(shape: tuple[int, ...], stride: int) -> Tensor:
    """Two random tensors of `shape` in bfloat16, `stride` elements from one another; the memory between is never touched."""
    memory = torch.empty(stride + math.prod(shape), dtype=torch.bfloat16)
    inner = torch.empty(shape).stride()
    view = memory.as_strided((2, *shape), (stride, *inner))
    view.copy_(torch.randn(2, *shape))
    return view


def test_strides_beyond_32_bits(emulated: Kernels) -> None:
    stride = 2**31 + 64  # elements
    x = far_apart((1, 3, 64), stride)  # [B, S, T, D]
    shift, scale = torch.randn(2, 2, 1, 64).bfloat16().unbind(0)
    normal = emulated.residual_norm_forward(x, None, None, shift, scale, EPS)[1]
    assert torch.equal(normal, emulated.residual_norm_forward(x.clone(), None, None, shift, scale, EPS)[1])
    q = far_apart((1, 6, 16), stride)  # [B, H, S * T, Dh]
    out, lse = emulated.attention_forward(q, q, q, 3, "causal")
    close = q.clone()
    assert torch.equal(out, emulated.attention_forward(close, close, close, 3, "causal")[0])
    grads = emulated.attention_backward(q, q, q, q, out, lse, 3, "causal")
    expected = emulated.attention_backward(close, close, close, close, out, lse, 3, "causal")
    assert all(torch.equal(a, b) for a, b in zip(grads[:3], expected[:3], strict=True))


@pytest.mark.parametrize("size", [(0, 2, 3, 64), (2, 0, 3, 64), (2, 2, 0, 64)], ids=str)
def test_nothing_to_do_is_done(kernels: AnyKernels, size: tuple[int, int, int, int]) -> None:
    B, S, _, D = size
    x, gate, shift, scale = torch.randn(size), *torch.randn(3, B, S, D).unbind(0)
    residual, normal = kernels.residual_norm_forward(x, gate, x, shift, scale, EPS)
    assert residual.shape == normal.shape == x.shape
    grads = kernels.residual_norm_backward(x, x, residual, gate, x, scale, EPS)
    assert all(not grads[name].any() for name in ("dgate", "dshift", "dscale")), "sums over nothing"
    if B == 0:
        q = torch.randn(0, 2, 6, 16)
        out, lse = kernels.attention_forward(q, q, q, 3, "causal")
        assert [x.shape for x in kernels.attention_backward(q, q, q, q, out, lse, 3, "causal")[:3]] == [q.shape] * 3


def test_rows_that_are_not_there_reach_no_sum(kernels: AnyKernels) -> None:
    # Without eps, a row of zeros has an infinite 1 / deviation: 5 tokens leave such rows beside the real ones.
    x, _, _, _, scale = sample_rows((1, 2, 5, 64), torch.float32)
    grad = torch.randn_like(x)
    ours = kernels.residual_norm_backward(None, grad, x, None, None, scale, 0.0)
    dx, dshift, dscale = reference.modulated_layer_norm_backward(grad, x, scale, 0.0)
    torch.testing.assert_close((ours["dx"], ours["dshift"], ours["dscale"]), (dx, dshift, dscale), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile_rows", [32, 64])
@pytest.mark.parametrize("mask", MASKS)
def test_tiles_cover_what_the_mask_shows_and_nothing_else(emulated: Kernels, mask: str, tile_rows: int) -> None:
    tiles_of = emulated.library.emulated_tiles
    found = (ctypes.c_int * 3000)()
    for T in (1, 3, 17, 64, 255, 257):
        for key_steps in (1, 2, 3, 4, 5, 8):
            for query_steps in range(1, key_steps + 1):
                for window in (1, 2, 3, 9) if mask == "window" else (None,):
                    block_mask = BlockMask(query_steps, key_steps, T, MASKS.index(mask), window or 1)
                    offset = key_steps - query_steps
                    for queries_of_keys in (False, True):
                        for step in range(key_steps) if queries_of_keys else range(offset, key_steps):
                            for join in (False, True):
                                count = tiles_of(ctypes.byref(block_mask), step, queries_of_keys, join, tile_rows, found)
                                seen: set[int] = set()
                                for begin, rows, other in zip(*(found[i : 3 * count : 3] for i in range(3)), strict=True):
                                    assert 1 <= rows <= tile_rows
                                    block = begin // T + (offset if queries_of_keys else 0)
                                    assert join or (block != step) == bool(other), "a tile is of the own block or of others"
                                    assert join or other or (begin + rows - 1) // T == begin // T
                                    assert seen.isdisjoint(range(begin, begin + rows))
                                    seen.update(range(begin, begin + rows))
                                if queries_of_keys:
                                    blocks = [q - offset for q in range(offset, key_steps) if visible(mask, q, step, window)]
                                else:
                                    blocks = [k for k in range(key_steps) if visible(mask, step, k, window)]
                                assert seen == {block * T + t for block in blocks for t in range(T)}


def sample_rows(
    size: tuple[int, int, int, int], dtype: torch.dtype, offset: float = 0.5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, branch and, as slices of one projection, gate, shift, scale."""
    B, S, T, D = size
    x, branch = ((torch.randn(T, B, S, D) * 2 + offset).to(dtype).permute(1, 2, 0, 3) for _ in range(2))
    gate, shift, scale = torch.randn(B, S, 3 * D).to(dtype).chunk(3, dim=-1)
    return x, branch, gate, shift, scale


EPS = 1e-6
ROWS = [(1, 1, 1, 8), (2, 3, 1, 72), (1, 2, 33, 512), (2, 2, 37, 1152), (1, 2, 9, 2048), (1, 1, 2, 8192)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ROWS, ids=str)
@pytest.mark.parametrize(("has_gate", "has_norm"), [(True, False), (False, True), (True, True)])
def test_residual_and_norm(
    kernels: AnyKernels, size: tuple[int, int, int, int], dtype: torch.dtype, has_gate: bool, has_norm: bool
) -> None:
    x, branch, gate, shift, scale = sample_rows(size, dtype)
    grad_residual, grad_normal = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    gating, norming = (gate, branch) if has_gate else (None, None), (shift, scale) if has_norm else (None, None)
    residual, normal = kernels.residual_norm_forward(x, *gating, *norming, EPS)
    seen_by_norm = residual if has_gate else x
    ours = kernels.residual_norm_backward(
        grad_residual if has_gate else None,
        grad_normal if has_norm else None,
        seen_by_norm,
        *gating,
        norming[1],
        EPS,
    )

    def results(*tensors: Tensor) -> dict[str, Tensor]:
        leaves = dict(
            zip(("x", "branch", "gate", "shift", "scale"), (t.detach().requires_grad_() for t in tensors), strict=True)
        )
        used = ["x", *(["branch", "gate"] if has_gate else []), *(["shift", "scale"] if has_norm else [])]
        stream = reference.gated_residual(leaves["x"], leaves["gate"], leaves["branch"]) if has_gate else leaves["x"]
        values, grads = ([stream], [grad_residual]) if has_gate else ([], [])
        if has_norm:
            values.append(reference.modulated_layer_norm(stream, leaves["shift"], leaves["scale"], EPS))
            grads.append(grad_normal)
        gradients = torch.autograd.grad(values, [leaves[name] for name in used], [g.to(tensors[0].dtype) for g in grads])
        named = {f"d{name}": gradient for name, gradient in zip(used, gradients, strict=True)}
        if not has_norm:
            del named["dx"]  # that of x is grad_residual itself
        return {**named, **({"residual": values[0]} if has_gate else {}), **({"normal": values[-1]} if has_norm else {})}

    plain, exact = results(x, branch, gate, shift, scale), results(*(t.double() for t in (x, branch, gate, shift, scale)))
    ours.update(residual=residual, normal=normal)
    for name, exact_one in exact.items():
        assert_as_exact_as_plain(ours[name], plain[name], exact_one.detach())


def test_rows_far_from_zero_keep_their_digits(kernels: AnyKernels) -> None:
    x, _, _, shift, scale = sample_rows((1, 2, 5, 96), torch.float32, offset=300.0)
    normal = kernels.residual_norm_forward(x, None, None, shift, scale, EPS)[1]
    plain = reference.modulated_layer_norm(x, shift, scale, EPS)
    assert_as_exact_as_plain(normal, plain, reference.modulated_layer_norm(x.double(), shift.double(), scale.double(), EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# No row; ragged parts; more parts than groups of the sum; more columns than a block has threads.
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (67, 72), (700, 40), (5, 1160)], ids=str)
def test_gelu_tanh(kernels: AnyKernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, grad, bias = ((2 * torch.randn(size)).to(dtype) for size in (shape, shape, shape[1:]))
    ours = kernels.gelu_forward(x, bias), *kernels.gelu_backward(grad, x, bias)

    def results(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, bias: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(), bias.detach().requires_grad_()]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    plain, exact = results(reference.gelu_tanh, x, bias), results(gelu_closed_form, x.double(), bias.double())
    for our, plain_one, exact_one in zip(ours, plain, exact, strict=True):
        assert_as_exact_as_plain(our, plain_one, exact_one)


def gelu_closed_form(x: Tensor, bias: Tensor) -> Tensor:
    z = x + bias
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def test_gelu_tanh_has_its_limits_far_out(kernels: AnyKernels) -> None:
    x = torch.tensor([[-1e30, -1e4, -60.0, 60.0, 1e4, 1e30, math.nan, 0.0]])
    zeros, ones = torch.zeros(8), torch.ones(1, 8)
    torch.testing.assert_close(kernels.gelu_forward(x, zeros)[0, :6], x[0, :6].clamp(min=0), atol=1e-12, rtol=0)
    slope = kernels.gelu_backward(ones, x, zeros)[0][0]
    torch.testing.assert_close(slope[:6], torch.tensor([0.0, 0, 0, 1, 1, 1]), atol=1e-12, rtol=0)
    assert bool(slope[6].isnan())
    assert slope[7] == 0.5


@pytest.mark.parametrize(("dim", "freq_shift"), [(8, 0.0), (9, 0.0), (256, 1.0)])
def test_timestep_embedding_rounds_where_dit_and_the_cpu_kernel_round(kernels: AnyKernels, dim: int, freq_shift: float) -> None:
    times = torch.tensor([0.0, 1.0, 249.75, 999.0])
    out = kernels.timestep_embedding(times, dim, 10000.0, freq_shift)
    half = dim // 2
    exponents = torch.tensor(-math.log(10000.0), dtype=torch.float32) * torch.arange(half) / (half - freq_shift)
    angles = (times[:, None] * exponents.double().exp().float()).double()  # rounded to float32 three times
    expected = torch.cat([angles.cos(), angles.sin(), torch.zeros(4, dim % 2)], dim=1)
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=1e-7)
    if library is not None:
        torch.testing.assert_close(out, torch.ops.pyard.timestep_embedding(times, dim, 10000.0, freq_shift), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gather_trajectories(kernels: AnyKernels, stored: torch.dtype, dtype: torch.dtype) -> None:
    noise, steps = torch.randn(5, 72), torch.randn(5, 3, 72).to(stored)
    index = torch.tensor([4, 0, 4, 2])
    history, target = kernels.gather_trajectories(noise, steps, index, dtype)
    assert torch.equal(target, steps[index].to(dtype))
    assert torch.equal(history, torch.cat([noise[index, None].to(dtype), steps[index, :-1].to(dtype)], dim=1))


def test_gather_of_an_index_outside_the_store_is_nan(kernels: AnyKernels) -> None:
    noise, steps = torch.randn(5, 8), torch.randn(5, 2, 8)
    history, target = kernels.gather_trajectories(noise, steps, torch.tensor([5, -1, 1]), torch.float32)
    assert bool(history[:2].isnan().all())
    assert bool(target[:2].isnan().all())
    assert torch.equal(target[2], steps[1])
