"""A teacher's guided ODE: classifier-free guidance between a condition and its null row."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyard.conditions import Condition
from pyard.diffusion.solvers import Solver, integrate
from pyard.errors import InputError
from pyard.teachers.protocol import Teacher


def scale_at(time: float, cfg_scale: float, cfg_interval: tuple[float, float] | None) -> float:
    """The guidance weight at a time: outside the interval there is no guidance (Kynkäänniemi et al. 2024, equation 5)."""
    return cfg_scale if cfg_interval is None or cfg_interval[0] <= time <= cfg_interval[1] else 1.0


def guided_prediction(
    teacher: Teacher,
    x: torch.Tensor,  # [B, C, ...]
    time: float,
    condition: Condition,  # B rows
    null: Condition | None,  # B rows, or None where cfg_scale is 1
    cfg_scale: float,
    cfg_channels: int | None = None,
) -> torch.Tensor:  # [B, C, ...]
    """The network output under classifier-free guidance (Ho & Salimans 2022): F_u + cfg_scale (F_c - F_u).

    Both halves run as one batch. `cfg_channels` guides the first so many channels only and leaves the rest conditional, as
    DiT's public code does with 3 of 4; None guides all. cfg_scale = 1 skips the unconditional half.
    """
    if cfg_scale == 1.0:
        return teacher.predict(x, time, condition)
    if null is None:
        raise InputError(f"cfg_scale is {cfg_scale}, but there is no null condition to guide away from; use cfg_scale=1")
    both = teacher.predict(torch.cat([x, x]), time, Condition.cat([condition, null]))
    conditional, unguided = both.chunk(2)
    guided = unguided + cfg_scale * (conditional - unguided)
    if cfg_channels is None or cfg_channels >= x.shape[1]:
        return guided
    return torch.cat([guided[:, :cfg_channels], conditional[:, cfg_channels:]], dim=1)


@torch.inference_mode()
def solve(
    teacher: Teacher,
    noise: torch.Tensor,  # [B, C, ...]
    numbers: torch.Tensor,  # [B] int64
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
        noise: x_T, standard normal, [B, C, ...].
        numbers: condition numbers, rows of `teacher.conditions`; class labels are such. int64 [B].
        num_steps: n; teacher evaluations (each of two network passes where cfg_scale is not 1): n, or 2 n - 1 for `heun`.
        cfg_scale: guidance weight; 1 is none.
        cfg_channels: guide only the first so many channels; None guides all.
        cfg_interval: lowest and highest teacher time with guidance, both included; None guides at every time.
        solver: see `pyard.diffusion.solvers.integrate`.

    Yields:
        After each of the n steps: (the state after it, the denoised prediction that the step began with), float32.
    """
    if numbers.shape != noise.shape[:1]:
        raise InputError(
            f"condition numbers of shape {tuple(numbers.shape)} for noise of shape {tuple(noise.shape)}; "
            f"expected ({len(noise)},)"
        )
    table = teacher.conditions
    condition = table.take(numbers)
    null = None if cfg_scale == 1.0 else table.take(table.null(numbers))

    def predict(x: torch.Tensor, time: float) -> torch.Tensor:
        return guided_prediction(teacher, x, time, condition, null, scale_at(time, cfg_scale, cfg_interval), cfg_channels)

    yield from integrate(predict, teacher.schedule, noise, num_steps, solver)


def endpoints(
    teacher: Teacher,
    noise: torch.Tensor,
    numbers: torch.Tensor,
    num_steps: int,
    *,
    cfg_scale: float = 1.0,
    cfg_channels: int | None = None,
    cfg_interval: tuple[float, float] | None = None,
    solver: Solver | None = None,
) -> torch.Tensor:  # [B, C, ...]
    """Where the trajectories of `solve` end: the teacher's samples."""
    trajectory = solve(
        teacher,
        noise,
        numbers,
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
