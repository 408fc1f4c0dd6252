"""The teacher's probability-flow ODE: DDIM for diffusion schedules, Euler and Heun for flows, with classifier-free guidance."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

from pyard.errors import InputError

if TYPE_CHECKING:
    from pyard.diffusion.noise_schedule import NoiseSchedule
    from pyard.teachers import Teacher

Solver = Literal["ddim", "euler", "heun"]


def solver_of(schedule: NoiseSchedule, solver: Solver | None = None) -> Solver:
    """The solver asked for, or a schedule's usual one; an InputError if the two do not go together."""
    fitting: tuple[Solver, ...] = ("ddim",) if schedule.kind == "ddpm" else ("euler", "heun")
    if solver is None:
        return fitting[0]
    if solver not in fitting:
        raise InputError(f"solver {solver!r} does not go with a {schedule.kind!r} schedule; expected one of {fitting}, or None")
    return solver


def scale_at(time: float, cfg_scale: float, cfg_interval: tuple[float, float] | None) -> float:
    """The guidance weight at a time: outside the interval there is no guidance (Kynkäänniemi et al. 2024, equation 5)."""
    return cfg_scale if cfg_interval is None or cfg_interval[0] <= time <= cfg_interval[1] else 1.0


def guided_prediction(
    teacher: Teacher,
    x: torch.Tensor,  # [B, C, H, W]
    time: float,
    labels: torch.Tensor,  # [B] int64
    cfg_scale: float,
    cfg_channels: int | None = None,
) -> torch.Tensor:  # [B, C, H, W]
    """The network output under classifier-free guidance (Ho & Salimans 2022): F_u + cfg_scale (F_c - F_u).

    Both halves run as one batch. `cfg_channels` guides the first so many channels only and leaves the rest conditional, as
    DiT's public code does with 3 of 4; None guides all. cfg_scale = 1 skips the unconditional half.
    """
    if cfg_scale == 1.0:
        return teacher.predict(x, time, labels)
    unconditional = torch.full_like(labels, teacher.num_classes)
    both = teacher.predict(torch.cat([x, x]), time, torch.cat([labels, unconditional]))
    conditional, unguided = both.chunk(2)
    guided = unguided + cfg_scale * (conditional - unguided)
    if cfg_channels is None or cfg_channels >= x.shape[1]:
        return guided
    return torch.cat([guided[:, :cfg_channels], conditional[:, cfg_channels:]], dim=1)


@torch.inference_mode()
def solve(
    teacher: Teacher,
    noise: torch.Tensor,  # [B, C, H, W]
    labels: torch.Tensor,  # [B] int64
    num_steps: int,
    *,
    cfg_scale: float = 1.0,
    cfg_channels: int | None = None,
    cfg_interval: tuple[float, float] | None = None,
    solver: Solver | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Walk the teacher's ODE from noise to data.

    Args:
        teacher: who predicts.
        noise: x_T, standard normal, [B, C, H, W].
        labels: classes, int64 [B].
        num_steps: n; teacher evaluations (each of two network passes where cfg_scale is not 1): n, or 2 n - 1 for `heun`.
        cfg_scale: guidance weight; 1 is none.
        cfg_channels: guide only the first so many channels; None guides all.
        cfg_interval: lowest and highest teacher time with guidance, both included; None guides at every time.
        solver: `ddim` for a `ddpm` schedule (Song et al. 2021, eta = 0; first order); for a `flow` `euler` (first order) or
            `heun` (second order; Karras et al. 2022, algorithm 1, whose last step is Euler's). None: ddim or euler.

    Yields:
        After each of the n steps: (the state after it, the denoised prediction that the step began with), float32.
    """
    if labels.shape != noise.shape[:1]:
        raise InputError(
            f"labels of shape {tuple(labels.shape)} for noise of shape {tuple(noise.shape)}; expected ({len(noise)},)"
        )
    schedule = teacher.schedule
    second_order = solver_of(schedule, solver) == "heun"

    def predict(x: torch.Tensor, time: float) -> torch.Tensor:
        return guided_prediction(teacher, x, time, labels, scale_at(time, cfg_scale, cfg_interval), cfg_channels).float()

    x = noise.float()
    for time, next_time in itertools.pairwise(schedule.timesteps(num_steps)):
        output = predict(x, time)
        p, q, r, s = schedule.output_map(time)
        a, b = schedule.jump_coefficients(time, next_time)
        denoised = p * x + q * output
        if next_time == schedule.clean_time:
            # The last step ends on the denoised prediction itself; written so, both are the same numbers.
            x = denoised
        elif second_order:
            # dx/dt of a flow is eps - x_0; the two slopes are averaged.
            slope = (r * x + s * output) - denoised
            ahead = a * x + b * output
            ahead_output = predict(ahead, next_time)
            p, q, r, s = schedule.output_map(next_time)
            ahead_slope = (r * ahead + s * ahead_output) - (p * ahead + q * ahead_output)
            x = x + (next_time - time) / 2 * (slope + ahead_slope)
        else:
            x = a * x + b * output
        yield x, denoised


def endpoints(
    teacher: Teacher,
    noise: torch.Tensor,
    labels: torch.Tensor,
    num_steps: int,
    *,
    cfg_scale: float = 1.0,
    cfg_channels: int | None = None,
    cfg_interval: tuple[float, float] | None = None,
    solver: Solver | None = None,
) -> torch.Tensor:  # [B, C, H, W]
    """Where the trajectories of `solve` end: the teacher's samples."""
    trajectory = solve(
        teacher,
        noise,
        labels,
        num_steps,
        cfg_scale=cfg_scale,
        cfg_channels=cfg_channels,
        cfg_interval=cfg_interval,
        solver=solver,
    )
    state = noise
    for state, _ in trajectory:  # noqa: B007
        pass
    return state
