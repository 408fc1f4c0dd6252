"""DPM-Solver++ of several steps, computed by diffusers' own DPMSolverMultistepScheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.scheduler_times import Visits
from pyard.errors import InputError

# Settings of the scheduler that change its steps, with its own defaults; its times come as `Visits`.
OPTIONS: dict[str, Any] = {
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
}


class Multistep:
    """Steps of DPM-Solver++ (Lu et al. 2022, algorithm 2) on given times.

    Args:
        schedule: a `ddpm`, or a `flow` on a linear path.
        visits: where the steps begin and end.
        options: settings of diffusers' scheduler that differ from `OPTIONS`.

    Raises:
        InputError: an option that the scheduler does not have.
    """

    def __init__(self, schedule: NoiseSchedule, visits: Visits, options: Mapping[str, Any] | None = None):
        from diffusers import DPMSolverMultistepScheduler

        # It is given denoised predictions, so that what the network predicts is NoiseSchedule's business alone.
        self.scheduler = DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++",
            prediction_type="sample",
            use_flow_sigmas=schedule.kind == "flow",
            final_sigmas_type="zero",
            **checked_options(options),
        )
        self.scheduler.set_timesteps(len(visits.embed_times))
        self.scheduler.set_begin_index(0)
        # Its sigmas are sigma / alpha, but of a flow plain sigma.
        sigmas = [_sigma(schedule, time) for time in visits.times]
        self.scheduler.sigmas = torch.from_numpy(np.asarray(sigmas, dtype=np.float32))

    def step(self, denoised: torch.Tensor, x: torch.Tensor) -> torch.Tensor:  # [B, C, ...] both and returned
        """The state after the next step from state x, where the network denoised as given."""
        at = self.scheduler.timesteps[self.scheduler.step_index or 0]
        state: torch.Tensor = self.scheduler.step(denoised, at, x, return_dict=False)[0]
        return state


def checked_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options completed by the defaults; an InputError names one that does not exist or does not fit."""
    found = {**OPTIONS, **(options or {})}
    if unknown := sorted(found.keys() - OPTIONS.keys()):
        raise InputError(f"solver 'dpm++2m': unknown options {unknown}; expected some of {list(OPTIONS)}")
    for name, choices in (
        ("solver_order", (1, 2, 3)),
        ("solver_type", ("midpoint", "heun")),
        ("lower_order_final", (True, False)),
        ("euler_at_final", (True, False)),
    ):
        if found[name] not in choices:
            raise InputError(f"solver 'dpm++2m': {name} is {found[name]!r}; expected one of {choices}")
    return found


def _sigma(schedule: NoiseSchedule, time: float) -> float:
    if schedule.kind == "flow" or time == schedule.clean_time:
        return schedule.sigma(time)
    alpha = schedule.alpha(time)
    # Pure noise has an infinite ratio.
    return schedule.sigma(time) / alpha if alpha > 0 else float(np.exp(schedule.log_noise_ratios[-1]))
