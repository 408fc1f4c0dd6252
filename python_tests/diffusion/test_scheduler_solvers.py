"""What stands in for a scheduler that adds noise, and which solver a scheduler asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from pyard.diffusion.scheduler_solvers import OwnSolver, deterministic, load_scheduler, own_solver
from pyard.diffusion.scheduler_times import visited
from pyard.diffusion.schedulers import process_of
from pyard.errors import InputError

BETAS: dict[str, Any] = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")
FLOW: dict[str, Any] = dict(use_flow_sigmas=True, prediction_type="flow_prediction")


@pytest.mark.parametrize(("scheduler", "name"), [
    (diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **BETAS), "DDIMScheduler"),
    (diffusers.KDPM2AncestralDiscreteScheduler(timestep_spacing="trailing", **BETAS), "DDIMScheduler"),
    (diffusers.KDPM2AncestralDiscreteScheduler(use_karras_sigmas=True, **BETAS), "EulerDiscreteScheduler"),
    (diffusers.DDPMScheduler(clip_sample=False, steps_offset=1, **BETAS), "DDIMScheduler"),
    (diffusers.DDPMParallelScheduler(clip_sample=False, **BETAS), "DDIMScheduler"),
    (diffusers.CogVideoXDPMScheduler(clip_sample=False, snr_shift_scale=1.0, **BETAS), "CogVideoXDDIMScheduler"),
    (diffusers.SASolverScheduler(timestep_spacing="trailing", **BETAS), "DPMSolverMultistepScheduler"),
    (diffusers.SASolverScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
     "DPMSolverMultistepScheduler"),
    (diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True, **BETAS),
     "DPMSolverMultistepScheduler"),
    (diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=3.0), "FlowMatchEulerDiscreteScheduler"),
], ids=lambda value: value if isinstance(value, str) else type(value).__name__)  # fmt: skip
def test_noise_on_the_way_is_left_out_and_said_so(scheduler, name):
    found, note = deterministic(scheduler)
    assert type(found).__name__ == name
    assert type(scheduler).__name__ in note
    assert "replaced by" in note
    assert "\n" not in note
    if not name.startswith("Flow") and not found.config.get("use_flow_sigmas"):
        torch.testing.assert_close(found.alphas_cumprod, scheduler.alphas_cumprod)
    # The same noise levels in the same order, as far as the class counted them one a step.
    visits = visited(found, 5)
    scheduler.set_timesteps(5)
    if "KDPM2" not in type(scheduler).__name__:
        told = visits.embed_times if process_of(found).kind == "ddpm" else [1000 * time for time in visits.embed_times]
        assert list(told) == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)
    # One that adds none stays, and so does what it was made of.
    again, nothing = deterministic(found)
    assert again is found
    assert nothing is None
    assert found.config.get("algorithm_type", "dpmsolver++") == "dpmsolver++"
    assert not found.config.get("stochastic_sampling")


def test_a_clipping_scheduler_is_refused_after_as_before():
    found, _ = deterministic(diffusers.DDPMScheduler())
    with pytest.raises(InputError, match="DDIMScheduler: clip_sample is True"):
        process_of(found)


def test_settings_left_over_from_another_class_do_not_count(tmp_path: Path):
    # HunyuanDiT's folder: a DDPM scheduler with set_alpha_to_one of the class it was converted from; DDPM ends on clean data.
    config = {"_class_name": "DDPMScheduler", "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, **BETAS}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    scheduler, note = load_scheduler(tmp_path)
    assert "replaced by DDIMScheduler" in note
    assert visited(scheduler, 4).times == (750.0, 500.0, 250.0, 0.0, -1.0)


@pytest.mark.parametrize(("settings", "name"), [({}, "DDIMScheduler"), ({"use_karras_sigmas": True}, "EulerDiscreteScheduler")])
def test_a_scheduler_that_diffusers_cannot_build_is_replaced_all_the_same(settings, name, tmp_path: Path):
    config = {"_class_name": "DPMSolverSDEScheduler", "prediction_type": "v_prediction", **settings}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    scheduler, note = load_scheduler(tmp_path)
    assert (type(scheduler).__name__, f"replaced by {name}" in note) == (name, True)
    process = process_of(scheduler)
    assert (process.prediction, process.beta_start, process.beta_end) == ("v_prediction", 0.00085, 0.012)
    assert visited(scheduler, 5).embed_times[0] == pytest.approx(999)


def test_folders_of_no_scheduler_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="there is no scheduler_config"):
        load_scheduler(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "TheirScheduler"}')
    with pytest.raises(InputError, match=r"scheduler_config\.json: its _class_name is 'TheirScheduler'"):
        load_scheduler(tmp_path)


@pytest.mark.parametrize(("scheduler", "solver", "options"), [
    (diffusers.DPMSolverMultistepScheduler(), "dpm++2m", None),
    (diffusers.DPMSolverMultistepScheduler(solver_type="heun", solver_order=3, flow_shift=3.0, **FLOW), "dpm++2m",
     {"solver_type": "heun", "solver_order": 3}),
    (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "euler", None),
    (diffusers.FlowMatchHeunDiscreteScheduler(), "heun", None),
    (diffusers.DDIMScheduler(clip_sample=False), "ddim", None),
    (diffusers.EulerDiscreteScheduler(), "ddim", None),
])  # fmt: skip
def test_the_solver_of_a_scheduler(scheduler, solver, options):
    assert own_solver(scheduler) == OwnSolver(solver, options, None)


@pytest.mark.parametrize(("scheduler", "solver"), [
    (diffusers.UniPCMultistepScheduler(**FLOW), "dpm++2m"), (diffusers.DPMSolverSinglestepScheduler(), "dpm++2m"),
    (diffusers.PNDMScheduler(set_alpha_to_one=True), "ddim"), (diffusers.LMSDiscreteScheduler(), "ddim"),
    (diffusers.HeunDiscreteScheduler(), "ddim"),
])  # fmt: skip
def test_a_solver_that_pyard_lacks_is_said_so(scheduler, solver):
    found = own_solver(scheduler)
    assert (found.solver, found.options) == (solver, None)
    assert found.note.startswith(f"{type(scheduler).__name__}: pyard uses its times with solver '{solver}'")
