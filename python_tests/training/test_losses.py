"""The losses against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from factories import tiny_teacher

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.models.student import Student
from pyard.training import TrainConfig
from pyard.training.losses import RegressionLoss


def loss_of(schedule: NoiseSchedule | None = None, **settings) -> RegressionLoss:
    teacher = tiny_teacher(schedule)
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 4, 8), history_layers=1)
    return RegressionLoss.of(TrainConfig(teacher="", out=Path(), **settings), student.config)


def off_by(*errors: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions [2, 4, 2, 8, 8] that are off by one constant a step."""
    target = torch.randn(2, 4, 2, 8, 8)
    return target + torch.tensor(errors)[:, None, None, None], target


def test_mse():
    loss = loss_of()
    per_step = loss.per_step(*off_by(1.0, 2.0, 3.0, 0.0))
    torch.testing.assert_close(per_step, torch.tensor([1.0, 4.0, 9.0, 0.0]))
    assert float(loss.total(per_step)) == pytest.approx(3.5)


def test_pseudo_huber():
    numbers = 2 * 8 * 8
    loss = loss_of(loss="pseudo_huber", huber_c=3.0)
    per_step = loss.per_step(*off_by(1.0, 2.0, -2.0, 0.0))
    expected = [math.sqrt(numbers * d * d + 9) - 3 for d in (1.0, 2.0, 2.0, 0.0)]
    torch.testing.assert_close(per_step, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert loss_of(loss="pseudo_huber").huber_c == pytest.approx(0.00054 * math.sqrt(numbers))


def test_pseudo_huber_is_the_norm_far_away_and_a_square_near_by():
    far = loss_of(loss="pseudo_huber", huber_c=1e-3).per_step(*off_by(5.0, 5.0, 5.0, 5.0))
    torch.testing.assert_close(far, torch.full((4,), 5.0 * math.sqrt(128)), rtol=1e-3, atol=0)
    near = loss_of(loss="pseudo_huber", huber_c=100.0).per_step(*off_by(0.5, 0.5, 0.5, 0.5))
    torch.testing.assert_close(near, torch.full((4,), 0.25 * 128 / 200), rtol=1e-2, atol=0)


def test_weights_by_hand_are_scaled_to_a_mean_of_1():
    loss = loss_of(step_weights=(1.0, 0.0, 1.0, 6.0))
    assert loss.step_weights == (0.5, 0.0, 0.5, 3.0)
    assert float(loss.total(torch.tensor([2.0, 100.0, 4.0, 1.0]))) == pytest.approx((1 + 0 + 2 + 3) / 4)


def test_min_snr_of_a_flow():
    """Times 3/4, 1/2, 1/4, 0: ratios of signal to noise ((1 - t) / t)^2 = 1/9, 1, 9, infinite; cut off at 5."""
    loss = loss_of(NoiseSchedule(kind="flow", prediction="velocity"), step_weights="min_snr")
    raw = [1 / 9, 1.0, 5.0, 5.0]
    assert loss.step_weights == pytest.approx([4 * w / sum(raw) for w in raw])
    flat = loss_of(NoiseSchedule(kind="flow", prediction="velocity"), step_weights="min_snr", min_snr_gamma=1e-3)
    assert flat.step_weights == pytest.approx([1.0] * 4)


def test_min_snr_of_a_diffusion_schedule_reads_its_own_noise_levels():
    schedule = NoiseSchedule()
    loss = loss_of(schedule, step_weights="min_snr", min_snr_gamma=5.0)
    times = TimeGrid.build(schedule, 4, 8).times[1:]
    squares = [1.0 if t < 0 else float(schedule.alphas_cumprod[int(t)]) for t in times]
    raw = [5.0 if a == 1 else min(a / (1 - a), 5.0) for a in squares]
    assert loss.step_weights == pytest.approx([4 * w / sum(raw) for w in raw])
    assert loss.step_weights[0] < 0.1
