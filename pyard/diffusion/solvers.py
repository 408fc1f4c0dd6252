"""Solvers of the probability-flow ODE: DDIM for diffusion schedules and curved flows, Euler and Heun for linear flows, and
DPM-Solver++ for diffusion schedules and linear flows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch

from pyard.diffusion.multistep import Multistep
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.scheduler_times import Visits
from pyard.errors import InputError

Solver = Literal["ddim", "euler", "heun", "dpm++2m"]

# (x_t [B, C, ...], t) to the network's output F [B, C, ...], whose meaning is `schedule.prediction`
Predict = Callable[[torch.Tensor, float], torch.Tensor]


def solver_of(schedule: NoiseSchedule, solver: Solver | None = None) -> Solver:
    """The solver asked for, or a schedule's usual one; an InputError if the two do not go together."""
    # On a linear path a DDIM step is Euler's.
    linear = schedule.kind == "flow" and schedule.path == "linear"
    fitting: tuple[Solver, ...] = ("euler", "heun", "dpm++2m") if linear else ("ddim",)
    if schedule.kind == "ddpm":
        fitting = ("ddim", "dpm++2m")
    if solver is None:
        return fitting[0]
    if solver not in fitting:
        path = f" of path {schedule.path!r}" if schedule.kind == "flow" else ""
        raise InputError(
            f"solver {solver!r} does not go with a {schedule.kind!r} schedule{path}; expected one of {fitting}, or None"
        )
    return solver


def integrate(
    predict: Predict,
    schedule: NoiseSchedule,
    noise: torch.Tensor,  # [B, C, ...]
    num_steps: int | Visits,
    solver: Solver | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Walk an ODE from noise to data.

    Args:
        predict: the network, guidance included.
        schedule: forward process and times.
        noise: x_T, standard normal.
        num_steps: n, on the schedule's own times, or the n + 1 times to visit and the n that the network is told. Evaluations:
            n, or 2 n - 1 for `heun`.
        solver: `ddim` for a `ddpm` schedule and for curved flows (Song et al. 2021, eta = 0; first order); for a `flow` on a
            linear path `euler` (first order) or `heun` (second order; Karras et al. 2022, algorithm 1, whose last step is
            Euler's); `dpm++2m` for a `ddpm` schedule and a linear `flow` (second order in one evaluation a step; DPM-Solver++,
            Lu et al. 2022, algorithm 2, by diffusers' DPMSolverMultistepScheduler). None: ddim or euler.
        options: of `dpm++2m`, where they differ from `pyard.diffusion.multistep.OPTIONS`; no other solver has any.

    Yields:
        After each of the n steps: (the state after it, the denoised prediction that the step began with), float32.
    """
    solver, visits = solver_of(schedule, solver), Visits.of(schedule, num_steps)
    if options and solver != "dpm++2m":
        raise InputError(f"solver {solver!r} has no options; found {dict(options)}, which belong to 'dpm++2m'")
    multistep = Multistep(schedule, visits, options) if solver == "dpm++2m" else None
    x = noise.float()
    for step, (time, next_time) in enumerate(itertools.pairwise(visits.times)):
        output = predict(x, visits.embed_times[step]).float()
        p, q, r, s = schedule.output_map(time)
        denoised = p * x + q * output
        if next_time == schedule.clean_time:
            # The last step ends on the denoised prediction itself; written so, both are the same numbers.
            x = denoised
        elif multistep is not None:
            x = multistep.step(denoised, x)
        elif solver == "heun":
            # dx/dt of a flow is eps - x_0; the two slopes are averaged.
            a, b = schedule.jump_coefficients(time, next_time)
            slope = (r * x + s * output) - denoised
            ahead = a * x + b * output
            ahead_output = predict(ahead, visits.embed_times[step + 1]).float()
            p, q, r, s = schedule.output_map(next_time)
            ahead_slope = (r * ahead + s * ahead_output) - (p * ahead + q * ahead_output)
            x = x + (next_time - time) / 2 * (slope + ahead_slope)
        else:
            a, b = schedule.jump_coefficients(time, next_time)
            x = a * x + b * output
        yield x, denoised
