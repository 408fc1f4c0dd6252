"""Times read from diffusers' schedulers, and where a student's stock steps lie on its teacher's."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.scheduler_times import Visits, visited
from pyard.diffusion.schedulers import process_of, schedule_of
from pyard.errors import InputError

FLOW: dict[str, Any] = dict(use_flow_sigmas=True, prediction_type="flow_prediction")


def even(n: int, **others: float) -> dict[str, Any]:
    """What Flux's, Qwen-Image's and Z-Image's pipelines pass to their scheduler."""
    return {"sigmas": np.linspace(1, 1 / n, n), **others}


FLOWS = {
    "shift": (FlowMatchEulerDiscreteScheduler(shift=3.0), lambda n: {}),
    "shift, sigmas": (FlowMatchEulerDiscreteScheduler(shift=3.0), even),
    "dynamic": (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), lambda n: even(n, mu=0.9)),
    "linear dynamic": (
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
        lambda n: even(n, mu=2.0),
    ),
    "terminal": (
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        lambda n: even(n, mu=0.9),
    ),
    "karras": (FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), even),
    "exponential": (FlowMatchEulerDiscreteScheduler(use_exponential_sigmas=True), even),
    "beta": (FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True), even),
    "dpm": (DPMSolverMultistepScheduler(flow_shift=3.0, **FLOW), lambda n: {}),
    "dpm, dynamic": (DPMSolverMultistepScheduler(use_dynamic_shifting=True, **FLOW), lambda n: {"mu": 0.9}),
    "unipc": (diffusers.UniPCMultistepScheduler(flow_shift=3.0, **FLOW), lambda n: {}),
    "unipc, karras": (diffusers.UniPCMultistepScheduler(use_karras_sigmas=True, **FLOW), lambda n: {}),
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_visits_its_schedulers_sigmas_and_is_told_its_timesteps(name):
    scheduler, call = FLOWS[name]
    before = (dict(scheduler.config), scheduler.sigmas.clone(), scheduler.timesteps.clone())
    visits = visited(scheduler, 10, **call(10))
    # The object of the caller stays as it was: its configuration too, where DPMSolverMultistep writes mu into its own.
    assert before[0] == dict(scheduler.config)
    assert before[1].equal(scheduler.sigmas)
    assert before[2].equal(scheduler.timesteps)
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(**{**call(10), **({} if "sigmas" in call(10) else {"num_inference_steps": 10})})
    assert visits.times == tuple(scheduler.sigmas.double().tolist())
    assert visits.times[-1] == 0
    # A backbone that multiplies by 1000 in float32 tells its network what the pipeline tells it.
    told = np.asarray(visits.embed_times, dtype=np.float32) * np.float32(1000)
    np.testing.assert_allclose(told, scheduler.timesteps.float().numpy(), rtol=2e-7)
    if name.startswith(("dpm", "unipc")):
        assert visits.embed_times != visits.times[:-1]
    else:
        assert visits.embed_times == visits.times[:-1]


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler"])
def test_a_diffusion_visits_whole_noise_levels(name, spacing):
    offered = dict(clip_sample=False, set_alpha_to_one=True, skip_prk_steps=True, steps_offset=1)
    kind = getattr(diffusers, name)
    known = {key: value for key, value in offered.items() if key in kind().config}
    scheduler = kind(timestep_spacing=spacing, **known)
    visits = visited(scheduler, 10)
    scheduler.set_timesteps(10)
    assert visits.times == (*sorted(set(scheduler.timesteps.double().tolist()), reverse=True), -1.0)
    assert len(visits.times) == 11
    assert visits.embed_times == visits.times[:-1]


@pytest.mark.parametrize("settings", [
    dict(kind="EulerDiscreteScheduler"),
    dict(kind="HeunDiscreteScheduler"),
    dict(kind="LMSDiscreteScheduler"),
    *(dict(kind=kind, **{key: True}) for kind in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler")
      for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")),
    dict(kind="DPMSolverMultistepScheduler", use_lu_lambdas=True, lambda_min_clipped=-5.1),
    dict(kind="EulerDiscreteScheduler", use_karras_sigmas=True, beta_schedule="squaredcos_cap_v2"),
], ids=str)  # fmt: skip
def test_sigmas_between_noise_levels_are_fractions_of_a_level(settings):
    settings = dict(settings)
    scheduler = getattr(diffusers, settings.pop("kind"))(**settings)
    process, visits = process_of(scheduler), visited(scheduler, 8)
    scheduler.set_timesteps(8)
    every = 2 if "Heun" in type(scheduler).__name__ else 1
    sigmas, told = scheduler.sigmas.double()[:-1:every].tolist(), scheduler.timesteps.double()[::every].tolist()
    assert visits.embed_times == tuple(told)
    assert visits.times[-1] == -1
    ours = [process.sigma(time) / process.alpha(time) for time in visits.times[:-1]]
    assert ours == pytest.approx(sigmas, rel=2e-3)  # diffusers multiplies its alphas up in float32
    assert ours[:-1] == pytest.approx(sigmas[:-1], rel=1e-5)
    assert any(time != round(time) for time in visits.times)


# The table of the module, S and n of the same remainder class chosen to hold both rules apart.
PLAIN, MINUS_ONE, TERMINAL, NEVER = "S divides n", "S - 1 divides n - 1", "S = 2", "never"
STOCK = [
    ("shift, sigmas", PLAIN), ("dynamic", PLAIN), ("linear dynamic", PLAIN), ("terminal", TERMINAL), ("shift", MINUS_ONE),
    ("karras", NEVER), ("exponential", NEVER), ("beta", NEVER), ("dpm", PLAIN), ("dpm, dynamic", PLAIN), ("unipc", PLAIN),
]  # fmt: skip
DIFFUSIONS = [
    (DPMSolverMultistepScheduler(), PLAIN),
    (diffusers.UniPCMultistepScheduler(), PLAIN),
    (DDIMScheduler(clip_sample=False, timestep_spacing="linspace"), MINUS_ONE),
    (EulerDiscreteScheduler(), MINUS_ONE),
    *((DPMSolverMultistepScheduler(**{key: True}), MINUS_ONE)
      for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")),
    *((kind(timestep_spacing=spacing, **settings), rule) for spacing, rule in (("trailing", PLAIN), ("leading", NEVER))
      for kind, settings in ((DDIMScheduler, dict(clip_sample=False)), (DPMSolverMultistepScheduler, {}),
                             (EulerDiscreteScheduler, {}))),
]  # fmt: skip


@pytest.mark.parametrize(("scheduler", "call", "rule"), [
    *((*FLOWS[name], rule) for name, rule in STOCK),
    *((FlowMatchEulerDiscreteScheduler(**{key: True}), lambda n: {}, MINUS_ONE)
      for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")),
    *((scheduler, lambda n: {}, rule) for scheduler, rule in DIFFUSIONS),
])  # fmt: skip
@pytest.mark.parametrize(("steps", "n"), [(4, 24), (4, 20), (2, 20), (3, 24), (4, 25), (3, 25), (2, 25), (4, 28), (3, 26)])
def test_which_teacher_steps_a_stock_scheduler_visits(scheduler, call, rule, steps, n):
    teacher, stock = visited(scheduler, n, **call(n)), visited(scheduler, steps, **call(steps))
    rules = {PLAIN: n % steps == 0, MINUS_ONE: (n - 1) % (steps - 1) == 0, TERMINAL: steps == 2, NEVER: False}
    assert visits_all(teacher, stock) is rules[rule]


def visits_all(teacher: Visits, stock: Visits) -> bool:
    """Whether a teacher visits all times of a stock scheduler, from the same first one, and is told the same."""
    close = 1e-6 * teacher.times[0]  # schedulers compute their sigmas in float32
    told = dict(zip(teacher.times, (*teacher.embed_times, 0.0), strict=True))
    for time, stock_told in zip(stock.times, (*stock.embed_times, 0.0), strict=True):
        nearest = min(teacher.times, key=lambda mine: abs(mine - time))
        if abs(nearest - time) > close or abs(told[nearest] - stock_told) > close:
            return False
    return abs(teacher.times[0] - stock.times[0]) <= close


@pytest.mark.parametrize(("scheduler", "message"), [
    (diffusers.LCMScheduler(clip_sample=False), "LCMScheduler.*distilled already"),
    (diffusers.TCDScheduler(clip_sample=False), "TCDScheduler.*distilled already"),
    (diffusers.FlowMatchLCMScheduler(), "distilled already"),
    (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas is True"),
    (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling"),
    (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "cannot place 8 steps: `mu` must be passed"),
    (DPMSolverMultistepScheduler(final_sigmas_type="sigma_min"), "final_sigmas_type is 'sigma_min'"),
    (DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", **FLOW), "final_sigmas_type is 'sigma_min'"),
    (diffusers.DEISMultistepScheduler(), "ends at sigma 0.01, expected 0: a trajectory that does not reach clean data"),
    (diffusers.DEISMultistepScheduler(**FLOW), r"ends at sigma 0\.\d+, expected 0"),
    (DDIMScheduler(clip_sample=False, set_alpha_to_one=False), "set_alpha_to_one is False"),
    (EulerDiscreteScheduler(interpolation_type="log_linear"), "ends at sigma 0.01, expected 0"),
    (diffusers.KDPM2DiscreteScheduler(), "visits 15 times in 8 steps"),
    (DPMSolverMultistepScheduler(num_train_timesteps=5), "must decrease to -1, the clean data of a 'ddpm' schedule"),
    (diffusers.VQDiffusionScheduler(num_vec_classes=3), "it has its own process and times"),
])  # fmt: skip
def test_what_has_no_trajectory_to_clean_data_is_refused(scheduler, message):
    with pytest.raises(InputError, match=message) as refusal:
        visited(scheduler, 8)
    assert "\n" not in str(refusal.value)


def test_arguments_that_a_scheduler_does_not_take_are_refused():
    with pytest.raises(InputError, match="does not take mu or sigmas"):
        visited(DDIMScheduler(clip_sample=False), 4, **even(4, mu=0.9))
    with pytest.raises(InputError, match="visits 4 times in 5 steps"):
        visited(FlowMatchEulerDiscreteScheduler(), 5, **even(4))
    with pytest.raises(InputError, match="num_steps is 0"):
        visited(FlowMatchEulerDiscreteScheduler(), 0)
    terminal, call = FLOWS["terminal"]
    with pytest.raises(InputError, match="in 1 steps: visits: a time is not finite"):
        visited(terminal, 1, **call(1))


@pytest.mark.parametrize(("visits", "message"), [
    (Visits((1.0, 0.0), (1.0, 0.5)), "2 times and 2 embed_times"),
    (Visits((0.0,), ()), "expected n \\+ 1 and n, n at least 1"),
    (Visits((1.0, 0.5, 0.5, 0.0), (1.0, 0.5, 0.5)), "must decrease to 0"),
    (Visits((1.0, 0.5, -1.0), (1.0, 0.5)), "must decrease to 0, the clean data of a 'flow'"),
    (Visits((1.0, 0.0), (float("nan"),)), "not finite"),
])  # fmt: skip
def test_visits_that_do_not_run_down_to_clean_data_are_refused(visits, message):
    with pytest.raises(InputError, match=message):
        Visits.of(NoiseSchedule(kind="flow", prediction="velocity"), visits)


@pytest.mark.parametrize("name", FLOWS)
def test_the_process_of_a_flow_is_read_whatever_its_times_are(name):
    scheduler, _ = FLOWS[name]
    assert process_of(scheduler) == NoiseSchedule(kind="flow", prediction="velocity")


def test_the_process_of_a_diffusion_says_nothing_of_times():
    settings: dict[str, Any] = dict(prediction_type="v_prediction", beta_schedule="scaled_linear", beta_end=0.012)
    plain = process_of(DDIMScheduler(clip_sample=False, **settings))
    for scheduler in (
        DDIMScheduler(clip_sample=False, steps_offset=1, **settings),
        DPMSolverMultistepScheduler(use_karras_sigmas=True, **settings),
        EulerDiscreteScheduler(timestep_spacing="trailing", **settings),
    ):
        assert process_of(scheduler) == plain
    with pytest.raises(InputError, match="use_karras_sigmas is True"):
        schedule_of(DPMSolverMultistepScheduler(use_karras_sigmas=True, **settings))


def test_noise_levels_between_levels():
    schedule = NoiseSchedule(prediction="v_prediction", rescale_betas_zero_snr=True)
    ratio = [schedule.sigma(t) / schedule.alpha(t) for t in (500, 500.5, 501)]
    assert ratio[1] == pytest.approx((ratio[0] * ratio[2]) ** 0.5)
    assert schedule.alpha(500.5) ** 2 + schedule.sigma(500.5) ** 2 == pytest.approx(1)
    assert schedule.alpha(999) == 0
    assert 0 < schedule.alpha(998.5) < schedule.alpha(998)
    for time in (-0.5, 999.5, float("nan")):
        with pytest.raises(InputError, match=r"a ddpm schedule has times -1 \(clean data\) and 0 to 999"):
            schedule.alpha(time)
