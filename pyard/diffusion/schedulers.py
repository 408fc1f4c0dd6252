"""Noise schedules from diffusers' scheduler configurations, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError

CONFIG_NAME = "scheduler_config.json"

_PREDICTION = {"epsilon": "eps", "sample": "denoised", "v_prediction": "v_prediction", "flow_prediction": "velocity"}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def load_schedule(folder: str | Path) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler's folder (`scheduler_config.json`).

    Raises:
        InputError: no scheduler there, or one whose process pyard would not reproduce.
    """
    import diffusers

    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"{folder}: expected a diffusers scheduler; there is no {CONFIG_NAME}")
    config = diffusers.DDIMScheduler.load_config(str(folder))
    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if kind is None:
        raise InputError(f"{folder / CONFIG_NAME}: its _class_name is {name!r}; expected one of diffusers' schedulers")
    return schedule_of(kind.from_config(config))


def schedule_of(scheduler: Any) -> NoiseSchedule:
    """The forward process of a diffusers scheduler, and what the network predicts in it.

    Only the process is read, not the solver: pyard walks it with DDIM (Euler for a flow) on the times that the scheduler's
    `timestep_spacing` names. Beta schedules that pyard does not know by name are taken over as numbers.

    Args:
        scheduler: an instance; defaults that its configuration leaves out are its class's.

    Raises:
        InputError: a setting that changes the samples and that pyard does not have, with the reason.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return _flow(config, name)
    if not hasattr(scheduler, "betas"):
        raise InputError(f"scheduler {name}: it has neither betas nor a flow; expected a diffusers scheduler of either kind")
    _refuse(config, name, {
        "clip_sample": (False, "a clipped trajectory is no ODE to jump along; set it to false if the model does without"),
        "thresholding": (False, "a clipped trajectory is no ODE to jump along; set it to false if the model does without"),
        "set_alpha_to_one": (True, "pyard's last step ends on clean data"),
    })  # fmt: skip
    prediction = _PREDICTION.get(config.get("prediction_type", "epsilon"))
    if prediction is None:
        raise InputError(
            f"scheduler {name}: prediction_type is {config['prediction_type']!r}; expected one of {list(_PREDICTION)}"
        )
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "leading":
        _refuse(config, name, {"steps_offset": (0, "pyard's times start at 0; use timestep_spacing 'trailing'")})
    settings: dict[str, Any] = dict(
        prediction=prediction, num_train_timesteps=int(config["num_train_timesteps"]), spacing=spacing
    )
    if config.get("trained_betas") is not None:
        settings |= dict(trained_betas=tuple(float(b) for b in config["trained_betas"]))
    elif config.get("beta_schedule") in _BETA_SCHEDULES:
        settings |= {key: config[key] for key in ("beta_schedule", "beta_start", "beta_end")}
    else:
        return NoiseSchedule(**settings, trained_betas=tuple(float(b) for b in scheduler.betas))
    return NoiseSchedule(**settings, rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)))


def _flow(config: Any, name: str) -> NoiseSchedule:
    _refuse(config, name, {
        "use_dynamic_shifting": (False, "its shift depends on the picture's size; write the shift of your size into `shift`"),
        "invert_sigmas": (False, "pyard's flows run from noise to data"),
        "shift_terminal": (None, "pyard's flows end on clean data"),
        "use_karras_sigmas": (False, "pyard spaces the times of a flow evenly before the shift"),
        "use_exponential_sigmas": (False, "pyard spaces the times of a flow evenly before the shift"),
        "use_beta_sigmas": (False, "pyard spaces the times of a flow evenly before the shift"),
        "stochastic_sampling": (False, "a student learns a deterministic trajectory"),
    })  # fmt: skip
    prediction = _PREDICTION.get(config.get("prediction_type", "flow_prediction"))
    if prediction != "velocity":
        raise InputError(f"scheduler {name}: prediction_type is {config['prediction_type']!r}; a flow has 'flow_prediction'")
    shift = float(config["flow_shift"] if config.get("use_flow_sigmas") else config["shift"])
    return NoiseSchedule(
        kind="flow", prediction="velocity", num_train_timesteps=int(config["num_train_timesteps"]), shift=shift
    )


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
