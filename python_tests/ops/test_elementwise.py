"""gated_residual and timestep_embedding."""

from __future__ import annotations

import math

import pytest
import torch

from pyard.errors import InputError
from pyard.ops import gated_residual, timestep_embedding


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
