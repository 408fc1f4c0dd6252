"""The solver against closed forms: the probability-flow ODE of a Gaussian has an exact solution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from factories import tiny_teacher

from pyard.errors import InputError
from pyard.noise_schedule import NoiseSchedule
from pyard.solvers import endpoints, solve


class GaussianTeacher:
    """The exact prediction for data ~ N(mean_label, spread^2), every pixel alike; "no class" has mean 0."""

    sample_shape = (1, 2, 2)
    num_classes = 2
    fingerprint = "gaussian"
    device = torch.device("cpu")
    means = torch.tensor([0.8, -0.5, 0.0], dtype=torch.float64)
    spread = 0.3

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule

    def predict(self, x: torch.Tensor, time: float, labels: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
        mean = self.means[labels][:, None, None, None]
        eps = sigma * (x.double() - alpha * mean) / (alpha**2 * self.spread**2 + sigma**2)
        denoised = mean + alpha * self.spread**2 * (x.double() - alpha * mean) / (alpha**2 * self.spread**2 + sigma**2)
        return {"eps": eps, "velocity": eps - denoised, "v_prediction": alpha * eps - sigma * denoised}[
            self.schedule.prediction
        ]

    def exact_endpoint(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(x_t - alpha_t m) / sqrt(alpha_t^2 s^2 + sigma_t^2) is constant along the ODE."""
        top = self.schedule.noisiest_time
        alpha, sigma = self.schedule.alpha(top), self.schedule.sigma(top)
        mean = self.means[labels][:, None, None, None]
        return mean + self.spread * (noise.double() - alpha * mean) / math.sqrt(alpha**2 * self.spread**2 + sigma**2)


@pytest.mark.parametrize("schedule", [
    NoiseSchedule(), NoiseSchedule(prediction="v_prediction", beta_schedule="squaredcos_cap_v2"),
    NoiseSchedule(kind="flow", prediction="velocity"),
], ids=["ddpm", "cosine v", "flow"])  # fmt: skip
def test_first_order_convergence_to_the_exact_solution(schedule):
    teacher = GaussianTeacher(schedule)
    noise, labels = torch.randn(16, 1, 2, 2), torch.arange(16) % 2
    exact = teacher.exact_endpoint(noise, labels)
    error = [float((endpoints(teacher, noise, labels, n) - exact).abs().max()) for n in (25, 50, 100, 200, 400)]
    assert error[-1] < 2e-2
    # Halving the step halves the error of a first-order method. The steps of a ddpm schedule are whole noise levels, so its
    # order shows only roughly.
    for coarse, fine in itertools.pairwise(error):
        assert 1.4 < coarse / fine < 2.8


def test_guidance_moves_the_mean_as_its_formula_says():
    # With equal spreads, guided predictions are those of a Gaussian with mean m_u + w (m_c - m_u).
    teacher = GaussianTeacher(NoiseSchedule())
    noise, labels = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    guided = endpoints(teacher, noise, labels, 25, cfg_scale=1.5)
    other = GaussianTeacher(NoiseSchedule())
    other.means = 1.5 * teacher.means
    torch.testing.assert_close(guided, endpoints(other, noise, labels, 25), rtol=1e-5, atol=1e-5)


def test_only_the_first_channels_are_guided():
    teacher = tiny_teacher()
    noise, labels = torch.randn(3, *teacher.sample_shape), torch.tensor([0, 2, 4])
    unguided = next(solve(teacher, noise, labels, 25))[1]
    everything = next(solve(teacher, noise, labels, 25, cfg_scale=3.0))[1]
    first = next(solve(teacher, noise, labels, 25, cfg_scale=3.0, cfg_channels=1))[1]
    torch.testing.assert_close(first[:, :1], everything[:, :1])
    torch.testing.assert_close(first[:, 1:], unguided[:, 1:], rtol=1e-4, atol=1e-3)
    assert (first[:, :1] - unguided[:, :1]).abs().max() > 1e-2


def test_a_trajectory_has_as_many_states_as_steps_and_ends_denoised():
    teacher = tiny_teacher()
    noise, labels = torch.randn(2, *teacher.sample_shape), torch.tensor([0, 1])
    visited = list(solve(teacher, noise, labels, 7))
    assert len(visited) == 7
    assert torch.equal(visited[-1][0], visited[-1][1])
    assert torch.equal(endpoints(teacher, noise, labels, 7), visited[-1][0])


def test_labels_of_another_batch_are_refused():
    teacher = tiny_teacher()
    with pytest.raises(InputError, match=r"expected \(2,\)"):
        next(solve(teacher, torch.randn(2, 2, 8, 8), torch.tensor([1]), 5))
