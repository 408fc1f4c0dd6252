"""The times that a diffusers scheduler visits, read from the scheduler itself after its `set_timesteps`.

A student of S jumps draws with a stock scheduler of S steps where the teacher's n steps visit that scheduler's S times. For
which n they do:

| scheduler | its times, k = 0 ... n - 1; m is its smallest sigma | S of n |
|---|---|---|
| FlowMatchEuler, sigmas=linspace(1, 1/n, n): Flux, Z-Image | shift(1 - k / n), fixed or dynamic | if S divides n |
| the same with `shift_terminal`: Qwen-Image | stretched to end at `shift_terminal` | S = 2 alone; S = 1 is 0 / 0 |
| the same with Karras, exponential or beta sigmas | even in a function of sigma, to shift(1 / n) | no, but for S = 1 |
| FlowMatchEuler as it is: SD3 | shift(1 - k (1 - m) / (n - 1)) | if S - 1 divides n - 1 |
| FlowMatchEuler as it is, Karras, exponential, beta | even in a function of sigma, 1 to m | if S - 1 divides n - 1 |
| DPMSolverMultistep, `use_flow_sigmas` | shift((1 - m) (1 - k / n)) | if S divides n |
| UniPC, `use_flow_sigmas` | shift(1 - k (1 - m) / n) | if S divides n |
| DPMSolverMultistep, UniPC, `linspace`: PixArt | round(999 (1 - k / n)) | if S divides n |
| DDIM, Euler, `linspace` | 999 (1 - k / (n - 1)), rounded but by Euler | if S - 1 divides n - 1 |
| DPMSolverMultistep, Euler: Karras, exponential, beta, Lu | even in a function of sigma | if S - 1 divides n - 1 |
| all of these, `trailing` | round(1000 (1 - k / n)) - 1 | if S divides n |
| all of these, `leading` | (n - 1 - k) (1000 // n) and the like | no: the first time depends on n |

(S = 1 in the rows of S - 1: if the scheduler puts a single step at its first time; DDIM's and Euler's `linspace` put it at 0.)
Where S - 1 must divide n - 1, the last of the S jumps starts next to clean data and has almost nothing to do. DDIM's stock
scheduler steps over 1000 // n levels whatever the next time is. That agrees with these times for `leading`, and for `trailing`
if n divides 1000; with others its states are not at the levels that it tells the network, and pyard's are.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyard.diffusion.noise_schedule import MOST_TIMESTEPS, NoiseSchedule
from pyard.diffusion.schedulers import OTHER_SPACINGS, process_of
from pyard.errors import InputError
from pyard.storage.numbers import whole_number


class Visits(NamedTuple):
    """The times of a solver's steps.

    Attributes:
        times: n + 1 times of the noise schedule, decreasing, clean data last: where the states are.
        embed_times: n times that the network is told, one for each step, on the same scale. Most schedulers tell the true
            times; DPMSolverMultistep tells flows whole thousandths, and diffusion networks whole noise levels.
    """

    times: tuple[float, ...]
    embed_times: tuple[float, ...]

    @classmethod
    def of(cls, schedule: NoiseSchedule, steps: int | Visits) -> Visits:
        """What a solver visits: the schedule's own times for a number of steps, or the visits given, checked.

        Raises:
            InputError: visits that do not run down to the schedule's clean data.
        """
        if not isinstance(steps, Visits):
            times = schedule.timesteps(steps)
            return cls(times, times[:-1])
        if len(steps.times) < 2 or len(steps.embed_times) != len(steps.times) - 1:
            raise InputError(
                f"visits: {len(steps.times)} times and {len(steps.embed_times)} embed_times; expected n + 1 and n, n at least 1"
            )
        if not all(map(math.isfinite, (*steps.times, *steps.embed_times))):
            raise InputError("visits: a time is not finite")
        if steps.times[-1] != schedule.clean_time or any(a <= b for a, b in itertools.pairwise(steps.times)):
            raise InputError(
                f"visits: times {_listed(steps.times)} must decrease to {schedule.clean_time:g}, the clean data of a "
                f"{schedule.kind!r} schedule"
            )
        return steps


def visited(scheduler: Any, num_steps: int, *, sigmas: Sequence[float] | None = None, mu: float | None = None) -> Visits:
    """The times that a diffusers scheduler visits in `num_steps` steps, called as its pipeline calls it.

    Args:
        scheduler: an instance; it is copied, and stays as it is.
        num_steps: n.
        sigmas: n sigmas that the pipeline passes to `set_timesteps`, before any shift; None: the scheduler's own.
        mu: what the pipeline passes for `use_dynamic_shifting`; None: nothing.

    Returns:
        Times of the noise schedule `process_of(scheduler)`: for a flow the scheduler's float32 sigmas, for a diffusion noise
        levels, whole ones unless its sigmas lie between them.

    Raises:
        InputError: samplers of distilled models, those that do not end on clean data, and whatever visits no falling times.
    """
    process, name = process_of(scheduler), type(scheduler).__name__
    num_steps = whole_number(f"scheduler {name}: num_steps", num_steps, 1, MOST_TIMESTEPS)
    copied = copy.deepcopy(scheduler)
    _set_timesteps(copied, name, num_steps, sigmas, mu)
    levels, told = _levels(copied), np.asarray(copied.timesteps, dtype=np.float64)
    if "Heun" in name and levels is not None:
        levels, told = np.append(levels[:-1:2], levels[-1]), told[::2]  # listed twice, for two evaluations a step
    elif "PNDM" in name:
        told = np.asarray(copied._timesteps, dtype=np.float64)[::-1]  # without those that it evaluates twice
    if len(told) != num_steps:
        raise InputError(
            f"scheduler {name}: it visits {len(told)} times in {num_steps} steps; expected one per step: use "
            "DPMSolverMultistepScheduler, or DDIMScheduler"
        )
    if levels is not None:
        levels = levels[: num_steps + 1]  # the n-th step ends there, whatever comes after it
    if levels is not None and levels[-1] != 0:
        raise InputError(
            f"scheduler {name}: its last step ends at sigma {levels[-1]:.3g}, expected 0: a trajectory that does not reach "
            "clean data has no endpoint to learn; use DPMSolverMultistepScheduler with final_sigmas_type 'zero'"
        )
    if process.kind == "flow":
        visits = _of_a_flow(process, levels, told)
    else:
        visits = _of_a_diffusion(process, scheduler.config, levels, told)
    try:
        return Visits.of(process, visits)
    except InputError as error:
        raise InputError(f"scheduler {name} in {num_steps} steps: {error}") from None


def _set_timesteps(scheduler: Any, name: str, num_steps: int, sigmas: Sequence[float] | None, mu: float | None) -> None:
    given: dict[str, Any] = {key: value for key, value in (("sigmas", sigmas), ("mu", mu)) if value is not None}
    if sigmas is not None:
        given["sigmas"] = [float(sigma) for sigma in sigmas]
    refused = given.keys() - set(inspect.signature(scheduler.set_timesteps).parameters)
    if refused:
        raise InputError(f"scheduler {name}: its set_timesteps does not take {' or '.join(sorted(refused))}; leave them out")
    if "sigmas" not in given:
        given["num_inference_steps"] = num_steps
    try:
        scheduler.set_timesteps(**given)
    # Whatever settings that do not fit each other do to a class that is not ours.
    except Exception as error:
        found = " ".join(str(error).split())[:300]
        raise InputError(f"scheduler {name}: it cannot place {num_steps} steps: {found or type(error).__name__}") from None


def _levels(scheduler: Any) -> np.ndarray | None:
    """The n + 1 sigmas of a scheduler, the last one included; None where it counts whole noise levels alone."""
    sigmas = getattr(scheduler, "sigmas", None)
    return None if sigmas is None else np.asarray(sigmas, dtype=np.float64)


def _of_a_flow(process: NoiseSchedule, levels: np.ndarray | None, told: np.ndarray) -> Visits:
    assert levels is not None, "every flow of diffusers has sigmas"
    whole = process.num_train_timesteps
    # A pipeline's network is told sigma * 1000 in float32, which a backbone computes from the float32 sigma itself.
    exact = np.asarray(levels[:-1], dtype=np.float32) * np.float32(whole) == told.astype(np.float32)
    embed = np.where(exact, levels[:-1], told / whole)
    return Visits(tuple(levels.tolist()), tuple(embed.tolist()))


def _of_a_diffusion(process: NoiseSchedule, config: Any, levels: np.ndarray | None, told: np.ndarray) -> Visits:
    other = any(config.get(key) for key in OTHER_SPACINGS)
    whole = bool((told == np.round(told)).all())
    if levels is None or (whole and not other):
        return Visits((*told.tolist(), process.clean_time), tuple(told.tolist()))
    # sigma / alpha between noise levels: the time is the fraction where our schedule has that ratio.
    ours = process.log_noise_ratios
    ratios = np.log(levels[:-1])
    if ratios.max() > ours[-1] + 1e-3 or ratios.min() < ours[0] - 1e-3:
        raise InputError(
            f"scheduler: its sigmas run from {levels[0]:.4g} to {levels[-2]:.4g}, the process from {math.exp(ours[-1]):.4g} to "
            f"{math.exp(ours[0]):.4g}; expected them within the network's noise levels"
        )
    times = np.interp(ratios, ours, np.arange(len(ours)))
    return Visits((*times.tolist(), process.clean_time), tuple(told.tolist()))


def _listed(times: tuple[float, ...]) -> str:
    shown = ", ".join(f"{time:g}" for time in times[-4:])
    return f"(..., {shown})" if len(times) > 4 else f"({shown})"
