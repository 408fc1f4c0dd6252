"""Noise schedules from diffusers' scheduler configurations, and back."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from pyard.diffusion.noise_schedule import MOST_TIMESTEPS, NoiseSchedule
from pyard.errors import InputError
from pyard.storage.numbers import number, whole_number
from pyard.storage.reading import read_object, reading

CONFIG_NAME = "scheduler_config.json"

_PREDICTION = {"epsilon": "eps", "sample": "denoised", "v_prediction": "v_prediction", "flow_prediction": "velocity"}
OTHER_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_OTHER_TIMES = "it visits times between the noise levels of the betas; set it to its default to use the betas' own times"
# What these classes sample is no trajectory of the model's probability-flow ODE from noise to data.
_OTHER_SAMPLERS = {
    r"LCM|TCD|DMD|SCM|FlowMap|Piflow": "it samples models that are distilled already; give the original model's scheduler",
    r"Inverse": "it runs from data to noise; give the scheduler that samples",
    r"^Helios": "its stages are flows of several sizes; pyard's flows have one",
    r"RePaint": "it fills in pictures, going back and forth; give the scheduler that samples",
    r"^EDM|Cosine|Karras|ScoreSde|^LTX|Wuerstchen|UnCLIP|IPNDM|^CM|VQ|Amused": "it has its own process and times; expected a "
    "diffusion with betas or a flow",
}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def load_schedule(folder: str | Path) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler's folder (`scheduler_config.json`).

    Raises:
        InputError: no scheduler there, or one whose process pyard would not reproduce.
    """
    file = Path(folder) / CONFIG_NAME
    with reading(file, "expected the settings of a diffusers scheduler"):
        return schedule_of(build_scheduler(scheduler_config(folder), file))


def scheduler_config(folder: str | Path) -> dict[str, Any]:
    """The settings in a diffusers scheduler's folder; an InputError if there are none."""
    file = Path(folder) / CONFIG_NAME
    if not file.is_file():
        raise InputError(f"{folder}: expected a diffusers scheduler; there is no {CONFIG_NAME}")
    # Where a logarithm of noise is cut, diffusers writes -Infinity for nowhere.
    config = read_object(file, "the settings of a diffusers scheduler", finite=False)
    whole_number(f"{file}: num_train_timesteps", config.get("num_train_timesteps", 1000), 1, MOST_TIMESTEPS)
    for name, value in config.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "lambda_min_clipped":
            number(f"{file}: {name}", value, -1e9, 1e9)
    return config


def build_scheduler(config: dict[str, Any], where: str | Path) -> Any:
    """The diffusers scheduler of settings with their `_class_name`; `where` they came from is named in errors."""
    import diffusers

    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and hasattr(kind, "from_config")):
        raise InputError(f"{where}: its _class_name is {name!r}; expected one of diffusers' schedulers")
    try:
        return kind.from_config(config)
    # Whatever a damaged configuration does to a class that is not ours, and a library that it wants and that is missing.
    except Exception as error:
        found = " ".join(str(error).split())[:300]
        raise InputError(f"{where}: diffusers cannot build its {name}: {found or type(error).__name__}") from None


def schedule_of(scheduler: Any) -> NoiseSchedule:
    """The forward process of a diffusers scheduler, and what the network predicts in it.

    Only the process is read, not the solver: pyard walks it with DDIM (Euler for a flow) on the times that the scheduler's
    `timestep_spacing` names. See `process_of` for the rest.

    Args:
        scheduler: an instance; defaults that its configuration leaves out are its class's.

    Raises:
        InputError: a setting that changes the samples and that pyard does not have, with the reason.
    """
    process, config, name = process_of(scheduler), scheduler.config, type(scheduler).__name__
    other_times: dict[str, tuple[Any, str]] = {"sigma_min": (None, _OTHER_TIMES), "sigma_max": (None, _OTHER_TIMES)}
    if process.kind == "flow":
        _refuse(config, name, {
            "use_dynamic_shifting": (False, "its shift depends on the picture's size; set `shift` to your size's"),
            "shift_terminal": (None, "pyard's flows end on clean data"),
            **dict.fromkeys(OTHER_SPACINGS, (False, "pyard spaces the times of a flow evenly before the shift")),
            **other_times,
        })  # fmt: skip
        key = "flow_shift" if config.get("use_flow_sigmas") else "shift"
        if key not in config:
            raise InputError(f"scheduler {name}: it has no {key}; expected a flow with one")
        return dataclasses.replace(process, shift=config[key])
    other_times["interpolation_type"] = ("linear", _OTHER_TIMES)
    _refuse(config, name, {**dict.fromkeys(OTHER_SPACINGS, (False, _OTHER_TIMES)), **other_times})
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "leading":
        _refuse(config, name, {"steps_offset": (0, "pyard's times start at 0; use timestep_spacing 'trailing'")})
    return dataclasses.replace(process, spacing=spacing)


def process_of(scheduler: Any) -> NoiseSchedule:
    """The forward process of a diffusers scheduler and what the network predicts, without the times of its solver.

    Beta schedules that pyard does not know by name are taken over as numbers, and so is a process that the scheduler's own
    noise levels show to be another than its betas': SNR shifts. The times, which any spacing or shift may place, are read from
    the scheduler by `pyard.diffusion.scheduler_times.visited`; `spacing` and `shift` of the result are the defaults.

    Args:
        scheduler: an instance; defaults that its configuration leaves out are its class's.

    Raises:
        InputError: a setting that changes the samples and that pyard does not have, with the reason.
    """
    config, name = getattr(scheduler, "config", {}), type(scheduler).__name__
    if (reason := next((why for pattern, why in _OTHER_SAMPLERS.items() if re.search(pattern, name)), None)) is not None:
        raise InputError(f"scheduler {name}: {reason}")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return _flow(config, name)
    if not hasattr(scheduler, "betas"):
        raise InputError(f"scheduler {name}: it has neither betas nor a flow; expected a diffusers scheduler with one of them")
    _refuse(config, name, {
        "clip_sample": (False, "a clipped trajectory does not follow the ODE; set it to false if the model allows it"),
        "thresholding": (False, "a clipped trajectory does not follow the ODE; set it to false if the model allows it"),
        "set_alpha_to_one": (True, "pyard's last step ends on clean data"),
        "final_sigmas_type": ("zero", "pyard's last step ends on clean data"),
        "timestep_type": ("discrete", "the network receives log(sigma) / 4 instead of the number of a noise level"),
    })  # fmt: skip
    prediction = _PREDICTION.get(config.get("prediction_type", "epsilon"))
    if prediction is None:
        raise InputError(
            f"scheduler {name}: prediction_type is {config['prediction_type']!r}; expected one of {list(_PREDICTION)}"
        )
    settings: dict[str, Any] = dict(
        prediction=prediction, num_train_timesteps=config.get("num_train_timesteps", len(scheduler.betas))
    )
    if config.get("trained_betas") is not None:
        settings |= dict(trained_betas=tuple(float(b) for b in config["trained_betas"]))
    elif config.get("beta_schedule") in _BETA_SCHEDULES:
        settings |= {key: config[key] for key in ("beta_schedule", "beta_start", "beta_end") if key in config}
    else:
        settings |= dict(trained_betas=tuple(float(b) for b in scheduler.betas))
    rescaled = bool(config.get("rescale_betas_zero_snr", False))
    return _as_the_scheduler(NoiseSchedule(**settings, rescale_betas_zero_snr=rescaled), scheduler)


def _as_the_scheduler(schedule: NoiseSchedule, scheduler: Any) -> NoiseSchedule:
    """The schedule if its noise levels are the scheduler's; else one with the betas that make those."""
    name, theirs = type(scheduler).__name__, getattr(scheduler, "alphas_cumprod", None)
    if theirs is None:
        return schedule
    theirs = np.asarray(theirs, dtype=np.float64)
    if theirs.shape != (schedule.num_train_timesteps,) or not np.isfinite(theirs).all():
        raise InputError(
            f"scheduler {name}: its alphas_cumprod are {theirs.shape}; expected {schedule.num_train_timesteps} finite numbers"
        )
    if _same_levels(schedule.alphas_cumprod, theirs):
        return schedule
    # alphas_cumprod of a step over that of the step before, of clean data for the first.
    before = np.concatenate([[1.0], theirs[:-1]])
    if not (before > 0).all() or not (theirs >= 0).all() or not (theirs <= before).all():
        raise InputError(f"scheduler {name}: its alphas_cumprod do not fall from 1 to 0, so they do not define a diffusion")
    found = dataclasses.replace(schedule, trained_betas=tuple((1 - theirs / before).tolist()), rescale_betas_zero_snr=False)
    if not _same_levels(found.alphas_cumprod, theirs):
        raise InputError(f"scheduler {name}: its noise levels cannot be expressed as betas")
    return found


def _same_levels(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal up to what products of a thousand float32 numbers round, both near data and near noise."""
    # diffusers' EulerDiscrete and others put 2**-24 for an alpha of 0.
    near_noise = np.abs(ours - theirs) <= 1e-3 * theirs + 2.0**-23
    near_data = np.abs(ours - theirs) <= 1e-3 * (1 - theirs) + 1e-6
    return bool((near_noise & near_data).all())


def _flow(config: Any, name: str) -> NoiseSchedule:
    _refuse(config, name, {
        "invert_sigmas": (False, "pyard's flows run from noise to data"),
        "final_sigmas_type": ("zero", "pyard's flows end on clean data"),
        "thresholding": (False, "a clipped trajectory does not follow the ODE; set it to false if the model allows it"),
        "stochastic_sampling": (False, "a student learns a deterministic trajectory"),
    })  # fmt: skip
    prediction = _PREDICTION.get(config.get("prediction_type", "flow_prediction"))
    if prediction != "velocity":
        raise InputError(f"scheduler {name}: prediction_type is {config['prediction_type']!r}; a flow has 'flow_prediction'")
    return NoiseSchedule(kind="flow", prediction="velocity", num_train_timesteps=config.get("num_train_timesteps", 1000))


def scheduler_of(schedule: NoiseSchedule) -> Any:
    """The diffusers scheduler of a noise schedule: `DDIMScheduler`, `FlowMatchEulerDiscreteScheduler` for a flow."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if schedule.kind == "flow":
        if schedule.prediction != "velocity":
            raise InputError(f"diffusers' flow scheduler takes a velocity; this teacher predicts {schedule.prediction}")
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=schedule.num_train_timesteps, shift=schedule.shift)
    names = {ours: theirs for theirs, ours in _PREDICTION.items()}
    if schedule.prediction == "velocity":
        raise InputError("diffusers' DDIMScheduler has no prediction_type for the velocity of a ddpm schedule")
    return DDIMScheduler(
        num_train_timesteps=schedule.num_train_timesteps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        trained_betas=None if schedule.trained_betas is None else list(schedule.trained_betas),
        clip_sample=False,
        prediction_type=names[schedule.prediction],
        timestep_spacing=schedule.spacing,
        rescale_betas_zero_snr=schedule.rescale_betas_zero_snr,
    )


def _refuse(config: Any, name: str, expected: dict[str, tuple[Any, str]]) -> None:
    for key, (value, reason) in expected.items():
        if key in config and config[key] != value:
            raise InputError(f"scheduler {name}: {key} is {config[key]!r}, expected {value!r}: {reason}")
