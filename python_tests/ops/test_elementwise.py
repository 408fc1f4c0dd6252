"""gated_residual, gelu_tanh, timestep_embedding and gather_trajectories."""

from __future__ import annotations

import math

import pytest
import torch
from ops.tolerance import assert_as_exact_as_plain
from torch import Tensor

from pyard.errors import InputError
from pyard.ops import (
    Backend,
    gated_residual,
    gather_trajectories,
    gelu_tanh,
    reference,
    timestep_embedding,
    use_backend,
)
from pyard.ops.backend import library

needs_native = pytest.mark.skipif(library is None, reason="the native operators are not built")
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# B, S, T, D: no batch, one token, no multiple of any vector, more rows than one task takes.
SIZES = [(0, 2, 3, 8), (1, 1, 1, 2), (2, 3, 1, 5), (2, 2, 65, 72), (1, 2, 257, 37)]


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return (2 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()


def with_gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    direction = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    return [out, *torch.autograd.grad(out, inputs, direction.to(out.dtype))]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gated_residual_is_as_exact_as_plain_pytorch(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    B, S, T, D = size
    # A slice of a fused modulation, and a branch whose tokens are transposed.
    fused, x, by_token = numbers(B, S, 3 * D, dtype=dtype), numbers(*size, dtype=dtype), numbers(T, B, S, D, dtype=dtype)
    gate, branch = fused[..., D : 2 * D], by_token.permute(1, 2, 0, 3)
    inputs = (x, gate, branch)
    with use_backend("native"):
        ours = with_gradients(gated_residual(*inputs), inputs)
    plain = with_gradients(reference.gated_residual(*inputs), inputs)
    exact = with_gradients(x.double() + gate.double()[:, :, None] * branch.double(), inputs)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_as_exact_as_plain(a, b, c.double())


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gated_residual_of_a_wide_stream_is_exactly_that_of_converted_tensors(
    size: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    B, S, _, D = size
    x, gate, branch = numbers(*size, dtype=torch.float32), numbers(B, S, D, dtype=dtype), numbers(*size, dtype=dtype)
    ours = with_gradients(torch.ops.pyard.gated_residual(x, gate, branch), (x, gate, branch))
    expected = with_gradients(torch.ops.pyard.gated_residual(x, gate.float(), branch.float()), (x, gate, branch))
    assert [tensor.dtype for tensor in ours] == [torch.float32, torch.float32, dtype, dtype]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def gelu_closed_form(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1,), (3, 5), (2, 2, 65, 72), (257, 37)], ids=str)
def test_gelu_tanh_is_as_exact_as_plain_pytorch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = (numbers(*shape, dtype=dtype), numbers(shape[-1], dtype=dtype))
    with use_backend("native"):
        ours = with_gradients(gelu_tanh(*inputs), inputs)
    plain = with_gradients(reference.gelu_tanh(*inputs), inputs)
    exact = with_gradients(gelu_closed_form(inputs[0].double() + inputs[1].double()), inputs)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_as_exact_as_plain(a, b, c.double())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gelu_tanh_has_its_limits_far_out(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e30, -1e4, -60.0, 60.0, 1e4, 1e30, math.nan], dtype=dtype, requires_grad=True)
    out = gelu_tanh(x, torch.zeros(7, dtype=dtype))
    slope = torch.autograd.grad(out.sum(), x)[0]
    torch.testing.assert_close(out[1:6].detach(), x[1:6].detach().clamp(min=0), atol=1e-12, rtol=0)
    torch.testing.assert_close(slope[1:5], torch.tensor([0.0, 0, 1, 1], dtype=dtype), atol=1e-12, rtol=0)
    assert out[6].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("steps_shape", "batch"), [((6, 3, 2, 5, 5), 4), ((1, 1, 1, 3, 3), 2), ((9, 8, 4, 8, 8), 0)])
def test_gather_trajectories_takes_rows_and_converts(
    steps_shape: tuple[int, ...], batch: int, dtype: torch.dtype, out_dtype: torch.dtype, backend: Backend
) -> None:
    steps = torch.randn(steps_shape).to(dtype)
    noise = torch.randn(steps_shape[0], *steps_shape[2:])
    indices = torch.randint(steps_shape[0], (batch,))
    with use_backend(backend):
        history, target = gather_trajectories(noise, steps, indices, out_dtype)
    assert history.dtype == target.dtype == out_dtype
    assert history.shape == target.shape == (batch, *steps_shape[1:])
    for row, index in enumerate(indices.tolist()):
        assert torch.equal(target[row], steps[index].to(out_dtype))
        assert torch.equal(history[row, 0], noise[index].to(out_dtype))
        assert torch.equal(history[row, 1:], steps[index, :-1].to(out_dtype))


@needs_native
@pytest.mark.parametrize(("dim", "freq_shift"), [(256, 0.0), (33, 1.0)])
def test_timestep_embedding_rounds_where_plain_pytorch_rounds(dim: int, freq_shift: float) -> None:
    times = torch.cat([torch.linspace(0, 999, 41), 999 * torch.rand(20)])
    with use_backend("native"):
        ours = timestep_embedding(times, dim, freq_shift=freq_shift)
    plain = reference.timestep_embedding(times, dim, 1e4, freq_shift)
    half = dim // 2
    frequencies = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float64) / (half - freq_shift))
    angles = times.double()[:, None] * frequencies
    exact = torch.cat([angles.cos(), angles.sin(), torch.zeros(len(times), dim % 2)], dim=-1)
    assert_as_exact_as_plain(ours, plain, exact)


@needs_native
def test_gather_trajectories_rounds_and_refuses_like_plain_pytorch() -> None:
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 65519.0, 65520.0, 3.4e38, 1 + 2**-9, 1 + 3 * 2**-9]
    steps = torch.tensor(special).view(1, 1, -1)
    for dtype in (torch.bfloat16, torch.float16):
        _, target = gather_trajectories(steps[:, 0], steps, torch.tensor([0]), dtype)
        torch.testing.assert_close(target, steps.to(dtype), rtol=0, atol=0, equal_nan=True)
    with use_backend("native"), pytest.raises(RuntimeError, match="index 1 at place 1, expected 0 to n - 1 = 0"):
        gather_trajectories(steps[:, 0], steps, torch.tensor([0, 1]))
    learned = steps.clone().requires_grad_()
    assert gather_trajectories(steps[:, 0], learned, torch.tensor([0]))[1].requires_grad


def test_gelu_tanh_and_gather_trajectories_name_wrong_input() -> None:
    with pytest.raises(InputError, match=r"x has shape \[2, 3\] and dtype torch.float32, bias \[2\]"):
        gelu_tanh(torch.zeros(2, 3), torch.zeros(2))
    noise, steps, indices = torch.zeros(2, 3), torch.zeros(2, 4, 3), torch.tensor([0])
    with pytest.raises(InputError, match=r"noise and steps have shapes \[2, 4\] and \[2, 4, 3\]"):
        gather_trajectories(steps[..., 0], steps, indices)
    with pytest.raises(InputError, match=r"indices has shape \[1\] and dtype torch.float32"):
        gather_trajectories(noise, steps, indices.float())
    with pytest.raises(InputError, match=r"dtype are torch\.float32, torch\.float32 and torch\.int32"):
        gather_trajectories(noise, steps, indices, torch.int32)


def test_gated_residual_is_its_formula() -> None:
    x, branch = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    gate = torch.randn(2, 3, 5)
    out = gated_residual(x, gate, branch)
    for b, s, t in [(0, 0, 0), (1, 2, 3), (0, 1, 2)]:
        torch.testing.assert_close(out[b, s, t], x[b, s, t] + gate[b, s] * branch[b, s, t])


def test_gated_residual_names_wrong_input() -> None:
    x, gate = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5)
    with pytest.raises(InputError, match=r"gate has shape \[2, 4, 5\], expected \[B, S, D\] = \[2, 3, 5\]"):
        gated_residual(x, x[:, 0], x)
    with pytest.raises(InputError, match=r"branch has shape \[2, 3, 5\]"):
        gated_residual(x, gate, gate)


@pytest.mark.parametrize(("dim", "freq_shift", "max_period"), [(8, 0.0, 10000.0), (9, 0.0, 10000.0), (6, 1.0, 100.0)])
def test_timestep_embedding_is_its_formula(dim: int, freq_shift: float, max_period: float) -> None:
    times = torch.tensor([[0.0, 1.0, 249.75], [500.0, 749.25, 999.0]])
    out = timestep_embedding(times, dim, max_period, freq_shift)
    assert out.shape == (2, 3, dim)
    assert out.dtype == torch.float32
    half = dim // 2
    for index in range(half):
        frequency = max_period ** (-index / (half - freq_shift))
        angles = [time * frequency for time in times.flatten().tolist()]
        cosines, sines = out[..., index].flatten(), out[..., half + index].flatten()
        # An angle of 999 has 6e-5 between neighbouring float32 numbers.
        torch.testing.assert_close(cosines, torch.tensor([math.cos(a) for a in angles]), rtol=0, atol=2e-4)
        torch.testing.assert_close(sines, torch.tensor([math.sin(a) for a in angles]), rtol=0, atol=2e-4)
    assert dim % 2 == 0 or bool((out[..., -1] == 0).all())


def test_timestep_embedding_takes_integers_and_low_precision_alike() -> None:
    expected = timestep_embedding(torch.tensor([3.0, 250.0]), 16)
    for dtype in (torch.int64, torch.bfloat16, torch.float64):
        assert torch.equal(timestep_embedding(torch.tensor([3, 250]).to(dtype), 16), expected)


def test_timestep_embedding_names_wrong_input() -> None:
    with pytest.raises(InputError, match="dim is 1"):
        timestep_embedding(torch.zeros(1), 1)
    with pytest.raises(InputError, match=r"freq_shift = 4\.0"):
        timestep_embedding(torch.zeros(1), 8, freq_shift=4.0)
