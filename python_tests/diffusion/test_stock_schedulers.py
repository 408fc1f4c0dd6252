"""Trajectories against diffusers' own schedulers, step by step, with a small diffusers transformer of random weights."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from factories import randomise
from golden import relative_error

from pyard.diffusion.multistep import OPTIONS
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.scheduler_times import Visits, visited
from pyard.diffusion.schedulers import process_of
from pyard.diffusion.solvers import integrate
from pyard.errors import InputError

FLOW: dict[str, Any] = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
LABELS = torch.tensor([1, 4])
V: dict[str, Any] = dict(prediction_type="v_prediction", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.fixture(scope="module")
def transformer() -> diffusers.DiTTransformer2DModel:
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5,
    ).eval()  # fmt: skip
    randomise(network, 3, std=0.2)
    return network


def stock(transformer: Any, scheduler: Any, noise: torch.Tensor, n: int, call: dict[str, Any]) -> list[torch.Tensor]:
    """The states of a pipeline's loop."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(**{**call, **({} if "sigmas" in call else {"num_inference_steps": n})})
    x, states = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise, []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = transformer(seen, timestep=t.expand(len(x)), class_labels=LABELS).sample
        x = scheduler.step(output, t, x, return_dict=False)[0]
        states.append(x)
    return states


def ours(
    transformer: Any, scheduler: Any, noise: torch.Tensor, n: int, call: dict[str, Any], solver: Any, options: Any = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    process, visits = process_of(scheduler), visited(scheduler, n, **call)
    scale = 1000 if process.kind == "flow" else 1

    def predict(x: torch.Tensor, time: float) -> torch.Tensor:
        times = torch.full((len(x),), time) * scale
        predicted: torch.Tensor = transformer(x, timestep=times, class_labels=LABELS).sample
        return predicted

    return list(integrate(predict, process, noise, visits, solver, options))


CASES = [
    pytest.param(DPMSolverMultistepScheduler(), {}, "dpm++2m", id="dpm, eps: PixArt"),
    pytest.param(DPMSolverMultistepScheduler(**V), {}, "dpm++2m", id="dpm, v"),
    pytest.param(DPMSolverMultistepScheduler(timestep_spacing="trailing", **V), {}, "dpm++2m", id="dpm, v, trailing"),
    pytest.param(DPMSolverMultistepScheduler(use_karras_sigmas=True), {}, "dpm++2m", id="dpm, karras"),
    pytest.param(DPMSolverMultistepScheduler(use_lu_lambdas=True, **V), {}, "dpm++2m", id="dpm, lu"),
    pytest.param(DPMSolverMultistepScheduler(flow_shift=3.0, **FLOW), {}, "dpm++2m", id="dpm, flow"),
    pytest.param(
        DPMSolverMultistepScheduler(use_dynamic_shifting=True, **FLOW), {"mu": 0.9}, "dpm++2m", id="dpm, flow, dynamic"
    ),
    pytest.param(FlowMatchEulerDiscreteScheduler(shift=3.0), {}, "euler", id="euler, shift: SD3"),
    pytest.param(FlowMatchEulerDiscreteScheduler(shift=3.0), "even", "euler", id="euler, shift, sigmas: Z-Image"),
    pytest.param(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "mu", "euler", id="euler, dynamic: Flux"),
    pytest.param(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02), "mu", "euler", id="terminal: Qwen"
    ),
    pytest.param(FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), {}, "euler", id="euler, karras"),
    pytest.param(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0), {}, "heun", id="heun"),
    pytest.param(DDIMScheduler(clip_sample=False), {}, "ddim", id="ddim, eps"),
    pytest.param(DDIMScheduler(clip_sample=False, steps_offset=1, **V), {}, "ddim", id="ddim, v, offset"),
    pytest.param(DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **V), {}, "ddim", id="ddim, v, trailing"),
]


@pytest.mark.parametrize(("scheduler", "call", "solver"), CASES)
@pytest.mark.parametrize("n", [4, 10, 25])
@torch.inference_mode()
def test_a_trajectory_is_the_stock_schedulers(transformer, scheduler, call, solver, n):
    even = {"sigmas": np.linspace(1, 1 / n, n)}
    call = {"even": even, "mu": {**even, "mu": 0.9}}[call] if isinstance(call, str) else call
    noise = torch.randn(2, 4, 8, 8)
    walked = ours(transformer, scheduler, noise, n, call, solver)
    states = stock(transformer, scheduler, noise, n, call)
    states = states[1::2] + states[-1:] if solver == "heun" else states
    assert len(walked) == len(states) == n
    for (state, _), theirs in zip(walked, states, strict=True):
        assert relative_error(state, theirs) < 1e-4
    assert torch.equal(*walked[-1])
    assert states[-1].std() > 0.1


@torch.inference_mode()
def test_fractional_times_are_euler_diffusers(transformer):
    # Its noise is not quite the process's: sigma_max, not sqrt(sigma_max^2 + 1), times it.
    scheduler, noise = EulerDiscreteScheduler(use_karras_sigmas=True), torch.randn(2, 4, 8, 8)
    walked = ours(transformer, scheduler, noise, 10, {}, "ddim")
    assert relative_error(walked[-1][0], stock(transformer, scheduler, noise, 10, {})[-1]) < 1e-3


@pytest.mark.parametrize("options", [
    dict(solver_type="heun"), dict(solver_order=1), dict(solver_order=3), dict(solver_order=3, lower_order_final=False),
    dict(lower_order_final=False, euler_at_final=True),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("settings", [V, dict(flow_shift=3.0, **FLOW)], ids=["ddpm", "flow"])
@torch.inference_mode()
def test_options_are_the_stock_schedulers(transformer, settings, options):
    scheduler, noise = DPMSolverMultistepScheduler(**settings, **options), torch.randn(2, 4, 8, 8)
    theirs = stock(transformer, scheduler, noise, 10, {})
    walked = ours(transformer, scheduler, noise, 10, {}, "dpm++2m", options)
    for (state, _), other in zip(walked, theirs, strict=True):
        assert relative_error(state, other) < 1e-4
    # The last step is of first order in any case, as it ends on clean data; the option is about the one before it.
    differs = ours(transformer, scheduler, noise, 10, {}, "dpm++2m", {**options, "lower_order_final": True})[-1][0]
    assert torch.equal(differs, walked[-1][0]) is (options != dict(solver_order=3, lower_order_final=False))
    plain = ours(transformer, scheduler, noise, 10, {}, "dpm++2m")[-1][0]
    assert torch.equal(plain, walked[-1][0]) is ("euler_at_final" in options)


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_dpm_solver_is_of_second_order(kind):
    # Data ~ N(0.8, 0.3^2): (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) is constant along the ODE.
    schedule = NoiseSchedule(kind=kind, prediction="velocity" if kind == "flow" else "v_prediction")
    mean, spread, x = 0.8, 0.3, torch.linspace(-2, 2, 9, dtype=torch.float64)[None]

    def predict(x: torch.Tensor, time: float) -> torch.Tensor:
        alpha, sigma = schedule.alpha(time), schedule.sigma(time)
        variance = alpha**2 * spread**2 + sigma**2
        eps = sigma * (x.double() - alpha * mean) / variance
        denoised = mean + alpha * spread**2 * (x.double() - alpha * mean) / variance
        return eps - denoised if kind == "flow" else alpha * eps - sigma * denoised

    top = schedule.noisiest_time
    deviation = (schedule.alpha(top) ** 2 * spread**2 + schedule.sigma(top) ** 2) ** 0.5
    exact = mean + spread * (x - schedule.alpha(top) * mean) / deviation
    steps = (80, 320)
    errors = {
        solver: [float((list(integrate(predict, schedule, x, n, solver))[-1][0] - exact).abs().max()) for n in steps]
        for solver in ("dpm++2m", None)
    }
    # Four times the steps: an error of a quarter for first order, of a sixteenth in the limit for second order.
    assert errors[None][0] / errors[None][1] < 4.5
    assert errors["dpm++2m"][0] / errors["dpm++2m"][1] > 9
    assert errors["dpm++2m"][1] < errors[None][1] / 5


def test_the_network_is_told_its_own_times():
    schedule, told = NoiseSchedule(kind="flow", prediction="velocity"), []
    visits = Visits((0.9, 0.6, 0.2, 0.0), (0.89, 0.59, 0.19))

    def predict(x: torch.Tensor, time: float) -> torch.Tensor:
        told.append(time)
        return 3 * x

    x = torch.randn(1, 2)
    states = [state for state, _ in integrate(predict, schedule, x, visits, "euler")]
    assert told == [0.89, 0.59, 0.19]
    torch.testing.assert_close(states[0], x - 0.3 * 3 * x)
    told.clear()
    list(integrate(predict, schedule, x, visits, "heun"))
    assert told == [0.89, 0.59, 0.59, 0.19, 0.19]
    with pytest.raises(InputError, match="must decrease to 0"):
        list(integrate(predict, schedule, x, visits._replace(times=(0.9, 0.6, 0.2, 0.1))))


@torch.inference_mode()
def test_pure_noise_has_no_infinite_steps():
    x = torch.randn(2, 4, 8, 8)
    for schedule in (
        NoiseSchedule(kind="flow", prediction="velocity"),
        NoiseSchedule(prediction="v_prediction", rescale_betas_zero_snr=True),
    ):
        for order in (1, 2, 3):
            states = [s for s, _ in integrate(lambda x, time: 0.5 * x, schedule, x, 20, "dpm++2m", dict(solver_order=order))]
            assert all(bool(state.isfinite().all()) for state in states)


@pytest.mark.parametrize(("solver", "options", "message"), [
    ("dpm++2m", dict(order=2), r"unknown options \['order'\]; expected some of \['solver_order'"),
    ("dpm++2m", dict(solver_order=4), "solver_order is 4"),
    ("dpm++2m", dict(solver_type="bh2"), "solver_type is 'bh2'"),
    ("ddim", dict(solver_order=1), "solver 'ddim' has no options"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(solver, options, message):
    with pytest.raises(InputError, match=message):
        next(integrate(lambda x, time: x, NoiseSchedule(), torch.randn(1, 2), 4, solver, options))


def test_the_defaults_are_those_of_diffusers():
    assert {name: DPMSolverMultistepScheduler().config[name] for name in OPTIONS} == OPTIONS


def test_a_curved_flow_has_no_multistep_solver():
    with pytest.raises(InputError, match="solver 'dpm\\+\\+2m' does not go with a 'flow' schedule of path 'gvp'"):
        next(integrate(lambda x, time: x, NoiseSchedule("flow", "velocity", path="gvp"), torch.randn(1, 2), 4, "dpm++2m"))
