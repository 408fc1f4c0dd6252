"""Our solver and schedules against diffusers' schedulers, and what is not taken from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from factories import tiny_teacher
from golden import relative_error

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.schedulers import load_schedule, schedule_of, scheduler_of
from pyard.errors import InputError
from pyard.teachers.guidance import solve

DDIM: list[dict[str, Any]] = [
    {},
    dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    dict(prediction_type="sample"),
    dict(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    dict(trained_betas=list(np.linspace(1e-3, 3e-2, 200)), num_train_timesteps=200),
]


@pytest.mark.parametrize("settings", DDIM, ids=str)
@pytest.mark.parametrize("num_steps", [1, 7, 25])
@torch.inference_mode()
def test_our_ddim_is_diffusers_with_leading_times(settings, num_steps):
    scheduler = DDIMScheduler(clip_sample=False, **settings)
    teacher = tiny_teacher(schedule_of(scheduler))
    noise, labels = torch.randn(2, *teacher.sample_shape), torch.tensor([0, 3])
    scheduler.set_timesteps(num_steps)
    x = noise
    for t, (state, denoised) in zip(scheduler.timesteps, solve(teacher, noise, labels, num_steps), strict=True):
        step = scheduler.step(teacher.predict(x, float(t), labels), int(t), x)
        x = step.prev_sample
        assert relative_error(state, x) < 1e-4  # diffusers multiplies its alphas up in float32
        assert relative_error(denoised, step.pred_original_sample) < 1e-4


@torch.inference_mode()
def test_our_ddim_is_diffusers_from_pure_noise():
    # Trailing times of a divisor of 1000 are evenly spaced, so diffusers' step lengths follow them; alpha is 0 at the first.
    settings: dict[str, Any] = dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler = DDIMScheduler(clip_sample=False, **settings)
    teacher = tiny_teacher(schedule_of(scheduler))
    assert teacher.schedule.alpha(999) == 0
    noise, labels = torch.randn(2, *teacher.sample_shape), torch.tensor([0, 3])
    scheduler.set_timesteps(25)
    x = noise
    for t, (state, _) in zip(scheduler.timesteps, solve(teacher, noise, labels, 25), strict=True):
        x = scheduler.step(teacher.predict(x, float(t), labels), int(t), x).prev_sample
        assert relative_error(state, x) < 1e-4


@pytest.mark.parametrize("shift", [1.0, 3.0])
@torch.inference_mode()
def test_our_euler_is_diffusers_for_flows(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    teacher = tiny_teacher(schedule_of(scheduler))
    noise, labels = torch.randn(2, *teacher.sample_shape), torch.tensor([0, 3])
    # Without sigmas, diffusers ends at 1/1000 and shifts that end twice; its own pipelines pass these.
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    x = noise
    for t, (state, _) in zip(scheduler.timesteps, solve(teacher, noise, labels, 12), strict=True):
        x = scheduler.step(teacher.predict(x, float(t) / 1000, labels), t, x).prev_sample
        assert relative_error(state, x) < 1e-5


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_the_process_of_any_beta_scheduler_is_read(kind, beta_schedule):
    scheduler = kind(beta_schedule=beta_schedule, beta_start=1e-3, beta_end=1e-2, num_train_timesteps=500)
    for name in ("clip_sample", "set_alpha_to_one"):
        if name in scheduler.config:
            scheduler.register_to_config(**{name: name == "set_alpha_to_one"})
    found = schedule_of(scheduler).alphas_cumprod
    assert np.abs(found / scheduler.alphas_cumprod.double().numpy() - 1).max() < 1e-4


def test_unknown_beta_schedules_are_taken_over_as_numbers():
    scheduler = DDPMScheduler(beta_schedule="sigmoid", clip_sample=False, num_train_timesteps=100)
    schedule = schedule_of(scheduler)
    assert schedule.trained_betas is not None
    assert np.abs(schedule.alphas_cumprod / scheduler.alphas_cumprod.numpy() - 1).max() < 1e-5


@pytest.mark.parametrize(("scheduler", "message"), [
    (DDIMScheduler(), "clip_sample is True"),
    (DDIMScheduler(clip_sample=False, thresholding=True), "thresholding is True"),
    (DDIMScheduler(clip_sample=False, set_alpha_to_one=False), "set_alpha_to_one is False"),
    (DDIMScheduler(clip_sample=False, steps_offset=1), "steps_offset is 1"),
    (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
    (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling"),
])  # fmt: skip
def test_what_would_change_the_samples_is_refused(scheduler, message):
    with pytest.raises(InputError, match=message):
        schedule_of(scheduler)


@pytest.mark.parametrize("schedule", [
    NoiseSchedule(spacing="leading"), NoiseSchedule(prediction="v_prediction", rescale_betas_zero_snr=True),
    NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction="denoised", num_train_timesteps=77),
    NoiseSchedule(trained_betas=(0.1, 0.2, 0.3)), NoiseSchedule(kind="flow", prediction="velocity", shift=1.7),
], ids=str)  # fmt: skip
def test_schedules_survive_a_folder(schedule, tmp_path: Path):
    scheduler_of(schedule).save_pretrained(tmp_path)
    assert load_schedule(tmp_path) == schedule


def test_schedules_that_no_scheduler_has_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="takes a velocity"):
        scheduler_of(NoiseSchedule(kind="flow", prediction="eps"))
    with pytest.raises(InputError, match="there is no scheduler_config"):
        load_schedule(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "TheirScheduler"}')
    with pytest.raises(InputError, match="'TheirScheduler'; expected one of diffusers"):
        load_schedule(tmp_path)


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("DPMSolverMultistepScheduler", dict(final_sigmas_type="sigma_min"), "final_sigmas_type is 'sigma_min'"),
    ("UniPCMultistepScheduler", dict(final_sigmas_type="sigma_min"), "final_sigmas_type"),
    ("EulerDiscreteScheduler", dict(final_sigmas_type="sigma_min"), "final_sigmas_type"),
    ("UniPCMultistepScheduler", dict(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction",
                                     final_sigmas_type="sigma_min"), "final_sigmas_type"),
    ("EulerDiscreteScheduler", dict(timestep_type="continuous", prediction_type="v_prediction"), "timestep_type"),
    ("EulerDiscreteScheduler", dict(use_karras_sigmas=True), "use_karras_sigmas is True"),
    ("EulerDiscreteScheduler", dict(sigma_min=0.01), "sigma_min is 0.01"),
    ("EulerDiscreteScheduler", dict(interpolation_type="log_linear"), "interpolation_type is .log_linear"),
    ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True), "use_karras_sigmas"),
    ("DPMSolverMultistepScheduler", dict(use_lu_lambdas=True), "use_lu_lambdas"),
    ("DPMSolverMultistepScheduler", dict(use_exponential_sigmas=True), "use_exponential_sigmas"),
    ("UniPCMultistepScheduler", dict(use_beta_sigmas=True), "use_beta_sigmas"),
    ("LCMScheduler", dict(clip_sample=False), "distilled already"),
    ("TCDScheduler", dict(clip_sample=False), "distilled already"),
    ("FlowMatchLCMScheduler", {}, "distilled already"),
    ("DDIMInverseScheduler", dict(clip_sample=False), "from data to noise"),
    ("HeliosScheduler", {}, "flows of several sizes"),
    ("EDMEulerScheduler", {}, "its own"),
])  # fmt: skip
def test_other_times_and_samplers_are_refused_by_name(name, settings, message):
    with pytest.raises(InputError, match=message):
        schedule_of(getattr(diffusers, name)(**settings))


@pytest.mark.parametrize("settings", [{}, dict(snr_shift_scale=1.5), dict(rescale_betas_zero_snr=True)], ids=str)
@torch.inference_mode()
def test_an_snr_shift_is_followed(settings):
    stochastic = diffusers.CogVideoXDPMScheduler(clip_sample=False, prediction_type="v_prediction", **settings)
    assert np.abs(schedule_of(stochastic).alphas_cumprod - stochastic.alphas_cumprod.double().numpy()).max() < 1e-9
    scheduler = CogVideoXDDIMScheduler(clip_sample=False, prediction_type="v_prediction", **settings)
    schedule = schedule_of(scheduler)
    theirs = scheduler.alphas_cumprod.double().numpy()
    assert np.abs(schedule.alphas_cumprod - theirs).max() < 1e-9
    teacher = tiny_teacher(schedule)
    noise, labels = torch.randn(2, *teacher.sample_shape), torch.tensor([0, 3])
    scheduler.set_timesteps(10)
    x = noise
    for t, (state, _) in zip(scheduler.timesteps, solve(teacher, noise, labels, 10), strict=True):
        x = scheduler.step(teacher.predict(x, float(t), labels), int(t), x, return_dict=False)[0]
        assert relative_error(state, x) < 1e-4


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"]
)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_times_and_noise_levels_are_the_schedulers_own(name, spacing):
    settings = dict(clip_sample=False) if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(timestep_spacing=spacing, **settings)
    schedule = schedule_of(scheduler)
    assert schedule.spacing == spacing
    for t in (0, 500, 999):
        assert schedule.alpha(t) ** 2 == pytest.approx(float(scheduler.alphas_cumprod[t]), rel=1e-3)
    if name in ("DDIMScheduler", "EulerDiscreteScheduler"):  # the solvers of higher order count n + 1 ends
        scheduler.set_timesteps(10)
        assert (
            np.abs(np.asarray(schedule.timesteps(10)[:-1]) - scheduler.timesteps.numpy()).max() <= 0.5
        )  # Euler's are fractions


@pytest.mark.parametrize("text", [
    "{oops", "[1]", "{}", json.dumps({"_class_name": "DDIMScheduler", "beta_schedule": "cosine", "clip_sample": False}),
    json.dumps({"_class_name": "HeliosScheduler"}), json.dumps({"_class_name": "DPMSolverSDEScheduler"}),
    json.dumps({"_class_name": "VQDiffusionScheduler"}), json.dumps({"_class_name": "DiTPipeline"}),
    json.dumps({"_class_name": "DDIMScheduler", "clip_sample": False, "num_train_timesteps": "many"}),
    json.dumps({"_class_name": "DDIMScheduler", "clip_sample": False, "beta_end": float("nan")}),
    json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": float("nan")}),
])  # fmt: skip
def test_broken_scheduler_configurations_are_one_line(text, tmp_path: Path):
    (tmp_path / "scheduler_config.json").write_text(text)
    with pytest.raises(InputError) as refusal:
        load_schedule(tmp_path)
    assert "\n" not in str(refusal.value)
