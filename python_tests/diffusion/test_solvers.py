"""The solver against closed forms: the probability-flow ODE of a Gaussian has an exact solution."""

from __future__ import annotations

import math

import pytest
import torch
from factories import tiny_teacher

from pyard.conditions import ClassConditions, Condition
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.teachers.guidance import endpoints, solve


class GaussianTeacher:
    """The exact prediction for data ~ N(mean_label, spread^2), every pixel alike; "no class" has mean 0."""

    sample_shape = (1, 2, 2)
    conditions = ClassConditions(2)
    fingerprint = "gaussian"
    device = torch.device("cpu")
    means = torch.tensor([0.8, -0.5, 0.0], dtype=torch.float64)
    spread = 0.3

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule

    def predict(self, x: torch.Tensor, time: float, condition: Condition) -> torch.Tensor:
        alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
        mean = self.means[condition["label"]][:, None, None, None]
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


CLOSED_FORM_CASES = [
    pytest.param(NoiseSchedule(), None, 1, (25, 50, 100, 200, 400), id="ddim, linear betas"),
    pytest.param(
        NoiseSchedule(prediction="v_prediction", beta_schedule="squaredcos_cap_v2"),
        "ddim",
        1,
        (25, 50, 100, 200),
        id="ddim, cosine",
    ),
    pytest.param(NoiseSchedule(kind="flow", prediction="velocity"), "euler", 1, (25, 50, 100, 200, 400), id="euler"),
    pytest.param(
        NoiseSchedule(kind="flow", prediction="velocity", shift=3.0), None, 1, (25, 50, 100, 200), id="euler, shifted"
    ),
    pytest.param(NoiseSchedule(kind="flow", prediction="velocity"), "heun", 2, (12, 25, 50, 100), id="heun"),
    pytest.param(
        NoiseSchedule(kind="flow", prediction="velocity", shift=3.0), "heun", 2, (12, 25, 50, 100), id="heun, shifted"
    ),
]


@pytest.mark.parametrize(("schedule", "solver", "order", "steps"), CLOSED_FORM_CASES)
def test_convergence_to_the_exact_solution_of_gaussian_data(schedule, solver, order, steps):
    teacher = GaussianTeacher(schedule)
    noise, labels = torch.randn(16, 1, 2, 2), torch.arange(16) % 2
    exact = teacher.exact_endpoint(noise, labels)
    error = [float((endpoints(teacher, noise, labels, n, solver=solver) - exact).abs().max()) for n in steps]
    # The order is the slope of log error over log step size; a ddpm schedule's steps are whole noise levels, hence the slack.
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in ([1 / n for n in steps], error))
    measured = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert measured == pytest.approx(order, abs=0.25)
    assert error[-1] < (3e-2 if order == 1 else 6e-3)


@pytest.mark.parametrize(("steps", "solver"), [(n, "ddim") for n in (1, 2, 3, 7, 250, 999, 1000)] + [(1, "heun"), (2, "heun")])
def test_any_number_of_steps(steps, solver):
    schedule = NoiseSchedule() if solver == "ddim" else NoiseSchedule(kind="flow", prediction="velocity")
    teacher = GaussianTeacher(schedule)
    noise, labels = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    visited = list(solve(teacher, noise, labels, steps, solver=solver))
    assert len(visited) == steps
    assert torch.equal(visited[-1][0], visited[-1][1])
    error = float((visited[-1][0] - teacher.exact_endpoint(noise, labels)).abs().max())
    assert error < {1: 3.0, 2: 2.0, 3: 1.0, 7: 0.5}.get(steps, 0.05)


def test_heun_evaluates_twice_but_in_the_last_step_and_denoises_where_euler_does():
    teacher = GaussianTeacher(NoiseSchedule(kind="flow", prediction="velocity"))
    times = []
    predict = teacher.predict
    teacher.predict = lambda x, time, labels: times.append(time) or predict(x, time, labels)
    noise, labels = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    heun = list(solve(teacher, noise, labels, 4, solver="heun"))
    assert times == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    euler = list(solve(teacher, noise, labels, 4, solver="euler"))
    assert torch.equal(heun[0][1], euler[0][1])
    assert not torch.allclose(heun[1][0], euler[1][0])


@pytest.mark.parametrize(("kind", "solver"), [("ddpm", "euler"), ("ddpm", "heun"), ("flow", "ddim"), ("flow", "rk4")])
def test_a_solver_that_does_not_fit_the_schedule_is_refused(kind, solver):
    schedule = NoiseSchedule(kind=kind, prediction="velocity" if kind == "flow" else "eps")
    with pytest.raises(InputError, match=f"solver '{solver}' does not go with a '{kind}' schedule"):
        next(solve(GaussianTeacher(schedule), torch.randn(1, 1, 2, 2), torch.tensor([0]), 3, solver=solver))


def test_guidance_acts_within_its_interval_alone():
    teacher = GaussianTeacher(NoiseSchedule(kind="flow", prediction="velocity"))
    batches = []
    predict = teacher.predict
    teacher.predict = lambda x, time, labels: batches.append((time, len(x))) or predict(x, time, labels)
    noise, labels = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    inside = endpoints(teacher, noise, labels, 4, cfg_scale=2.0, cfg_interval=(0.5, 0.75))
    # Outside, the unconditional half is not even computed.
    assert batches == [(1.0, 4), (0.75, 8), (0.5, 8), (0.25, 4)]
    everywhere = endpoints(teacher, noise, labels, 4, cfg_scale=2.0, cfg_interval=(0.0, 1.0))
    assert torch.equal(everywhere, endpoints(teacher, noise, labels, 4, cfg_scale=2.0))
    nowhere = endpoints(teacher, noise, labels, 4, cfg_scale=2.0, cfg_interval=(0.6, 0.7))
    assert torch.equal(nowhere, endpoints(teacher, noise, labels, 4))
    assert (inside - everywhere).abs().max() > 1e-2
    assert (inside - nowhere).abs().max() > 1e-2


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
