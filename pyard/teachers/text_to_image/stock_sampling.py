"""Finds the diffusers scheduler, and the arguments of a pipeline's call, with which stock sampling visits a student's times.

Every candidate is tried: `set_timesteps` is called as the pipeline calls it, and its times are compared with the student's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.scheduler_times import Visits, visited
from pyard.diffusion.schedulers import OTHER_SPACINGS, scheduler_of
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.teachers.text_to_image.families import PipelineFamily

# Two float32 roundings of the first time: times passed as 1000 sigma differ by this much, which no network notices.
_SAME = 2.5e-7


@dataclass(frozen=True)
class StockSampling:
    """How a stock pipeline visits a student's times.

    Attributes:
        scheduler: a first-order diffusers scheduler, whose step is the student's jump.
        arguments: arguments of the pipeline's call, besides the number of steps: none, `sigmas` or `timesteps`.
        sigmas: the S + 1 noise levels of the states, for programs that take them: for a flow, sigma from 1 to 0, otherwise
            sigma / alpha.
        told_error: largest difference between the times given to the network in stock sampling and in training, as a fraction
            of the whole range.
    """

    scheduler: Any
    arguments: Mapping[str, list[float]]
    sigmas: tuple[float, ...]
    told_error: float = 0.0


def stock_samplings(
    grids: Mapping[tuple[int, ...], TimeGrid],
    schedule: NoiseSchedule,
    family: PipelineFamily,
    *,
    own: Any = None,
    patch: int,
) -> dict[tuple[int, ...], StockSampling]:
    """The simplest stock sampling with one scheduler that equals a student's, at each of its sizes.

    If all sizes have the same grid, this is `stock_sampling`. Otherwise it uses the pipeline's own scheduler, if its
    size-dependent shift visits the times of all sizes; or else a scheduler that does not change the times passed by the
    pipeline's call.

    Args:
        grids: the student's grids by sample shape; at least one.
        schedule, family, own, patch: as in `stock_sampling`.

    Raises:
        InputError: no stock scheduler visits these times.
    """
    usual, first = next(iter(grids.items()))
    if all(grid == first for grid in grids.values()):
        sampling = stock_sampling(first, schedule, family, own=own, sample_shape=usual, patch=patch)
        return dict.fromkeys(grids, sampling)
    for scheduler in _first_order(own):
        if all(_visits(scheduler, grid, family, shape, patch) for shape, grid in grids.items()):
            return {shape: StockSampling(scheduler, {}, _levels(schedule, grid)) for shape, grid in grids.items()}
    if schedule.kind == "flow":
        return {shape: _flow_of_sigmas(grid, schedule) for shape, grid in grids.items()}
    return {shape: _of_timesteps(grid, schedule) for shape, grid in grids.items()}


def stock_sampling(
    grid: TimeGrid,
    schedule: NoiseSchedule,
    family: PipelineFamily,
    *,
    own: Any = None,
    sample_shape: tuple[int, ...],
    patch: int,
) -> StockSampling:
    """The simplest stock sampling that equals that of a student with one grid.

    Candidates, in this order, are the scheduler with the pipeline's own settings; one with another spacing or fixed shift; and
    one that does not change the times passed by the pipeline's call. None of them depends on the picture's size, because the
    student's times do not either.

    Args:
        grid: the student's grid.
        schedule: the student's noise schedule.
        family: the family of its pipeline.
        own: the pipeline's scheduler object; None: unknown.
        sample_shape: [C, h, w].
        patch: number of latents along one side of an image token.

    Raises:
        InputError: no stock scheduler visits these times.
    """
    candidates = _flows(own, grid, family) if schedule.kind == "flow" else _diffusions(own, schedule)
    for scheduler in candidates:
        if _visits(scheduler, grid, family, sample_shape, patch):
            return StockSampling(scheduler, {}, _levels(schedule, grid))
    return _flow_of_sigmas(grid, schedule) if schedule.kind == "flow" else _of_timesteps(grid, schedule)


def _visits(scheduler: Any, grid: TimeGrid, family: PipelineFamily, sample_shape: tuple[int, ...], patch: int) -> bool:
    """Whether a scheduler visits the grid's times if it is called as the pipeline calls it."""
    call = family.scheduler_call(scheduler.config, grid.num_steps, sample_shape, patch)
    try:
        visits = visited(scheduler, grid.num_steps, sigmas=call.get("sigmas"), mu=call.get("mu"))
    except InputError:  # some cannot place so few steps
        return False
    return _differs(visits, grid) <= _SAME


def _levels(schedule: NoiseSchedule, grid: TimeGrid) -> tuple[float, ...]:
    return tuple(_level(schedule, time) for time in grid.times)


def _level(schedule: NoiseSchedule, time: float) -> float:
    return time if schedule.kind == "flow" else schedule.sigma(time) / schedule.alpha(time)


def _flows(own: Any, grid: TimeGrid, family: PipelineFamily) -> Iterator[Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    if own is not None and not own.config.get("use_dynamic_shifting"):
        yield from _first_order(own)
    if family.passes_sigmas:
        for shift in _shifts(grid):
            yield FlowMatchEulerDiscreteScheduler(shift=shift)


def _first_order(own: Any) -> Iterator[Any]:
    """Yield the scheduler of a flow with first-order steps, or nothing if its class has no such steps."""
    name = type(own).__name__
    if name == "FlowMatchEulerDiscreteScheduler":
        yield own
    elif name == "DPMSolverMultistepScheduler":
        yield type(own).from_config(own.config, solver_order=1, algorithm_type="dpmsolver++")


def _shifts(grid: TimeGrid) -> Iterator[float]:
    """Shifts that map evenly spaced times to the grid's times, if there are any; short numbers first."""
    even = 1 - 1 / grid.num_steps
    second = grid.times[1]
    if even == 0 or not 0 < second < 1:
        yield 1.0
        return
    shift = second * (1 - even) / (even * (1 - second))
    yield from (round(shift, 2), round(shift, 5), shift)


def _diffusions(own: Any, schedule: NoiseSchedule) -> Iterator[Any]:
    from diffusers import DPMSolverMultistepScheduler

    # DPM-Solver++ of first order is DDIM (Lu et al. 2022, section 4.1), at any times.
    first_order = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    if type(own).__name__ == "DPMSolverMultistepScheduler":
        yield DPMSolverMultistepScheduler.from_config(own.config, **first_order)
    config = scheduler_of(schedule).config
    for spacing in ("linspace", "trailing", "leading"):
        yield DPMSolverMultistepScheduler.from_config(config, **first_order, timestep_spacing=spacing)


def _flow_of_sigmas(grid: TimeGrid, schedule: NoiseSchedule) -> StockSampling:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=schedule.num_train_timesteps, shift=1.0)
    sigmas = [_short(time) for time in grid.times[:-1]]
    visits = visited(scheduler, grid.num_steps, sigmas=sigmas)
    told = max(abs(a - b) for a, b in zip(visits.embed_times, grid.embed_times, strict=True))
    # DPM-Solver passes whole noise levels to a flow's network, so the times may differ by one level.
    if _differs(visits._replace(embed_times=grid.embed_times), grid) > _SAME or told > 1 / schedule.num_train_timesteps:
        raise InputError(
            f"no diffusers scheduler visits this student's times {_listed(grid.times)} and passes "
            f"{_listed(grid.embed_times)} to the network; draw with pyard.ARDPipeline"
        )
    return StockSampling(scheduler, {"sigmas": sigmas}, _levels(schedule, grid), told if told > _SAME else 0.0)


def _of_timesteps(grid: TimeGrid, schedule: NoiseSchedule) -> StockSampling:
    from diffusers import DPMSolverMultistepScheduler

    config = {key: value for key, value in scheduler_of(schedule).config.items() if key not in OTHER_SPACINGS}
    scheduler = DPMSolverMultistepScheduler.from_config(
        config, solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    times = [int(time) for time in grid.times[:-1]]
    placed = copy.deepcopy(scheduler)
    placed.set_timesteps(timesteps=times)
    found = tuple(float(time) for time in placed.timesteps)
    if found != grid.times[:-1] or found != grid.embed_times:
        raise InputError(
            f"no diffusers scheduler visits this student's times {_listed(grid.times)} and passes "
            f"{_listed(grid.embed_times)} to the network: pipelines take whole noise levels; draw with pyard.ARDPipeline"
        )
    return StockSampling(scheduler, {"timesteps": [float(time) for time in times]}, _levels(schedule, grid))


def _differs(visits: Visits, grid: TimeGrid) -> float:
    """The largest difference of both kinds of times, as a fraction of the first time."""
    mine, theirs = (*grid.times, *grid.embed_times), (*visits.times, *visits.embed_times)
    return max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) / grid.times[0]


def _short(value: float) -> float:
    """The shortest decimal number that is equal in float32."""
    return float(str(np.float32(value)))


def _listed(times: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{time:g}" for time in times) + ")"
