"""The teacher's probability-flow ODE: DDIM for diffusion schedules, which is Euler for flows, with classifier-free guidance."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from pyard.errors import InputError

if TYPE_CHECKING:
    from pyard.teachers import Teacher


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
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Walk the teacher's ODE from noise to data.

    Args:
        teacher: who predicts.
        noise: x_T, standard normal, [B, C, H, W].
        labels: classes, int64 [B].
        num_steps: n, teacher evaluations (each of two network passes if cfg_scale is not 1).
        cfg_scale: guidance weight; 1 is none.
        cfg_channels: guide only the first so many channels; None guides all.

    Yields:
        After each of the n evaluations: (the state after the step, the denoised prediction of that evaluation), float32.
    """
    if labels.shape != noise.shape[:1]:
        raise InputError(
            f"labels of shape {tuple(labels.shape)} for noise of shape {tuple(noise.shape)}; expected ({len(noise)},)"
        )
    schedule = teacher.schedule
    times = schedule.timesteps(num_steps)
    x = noise.float()
    for time, next_time in itertools.pairwise(times):
        output = guided_prediction(teacher, x, time, labels, cfg_scale, cfg_channels).float()
        p, q, _, _ = schedule.output_map(time)
        a, b = schedule.jump_coefficients(time, next_time)
        denoised = p * x + q * output
        # The last step ends on the denoised prediction itself; written so, both are the same numbers.
        x = denoised if next_time == schedule.clean_time else a * x + b * output
        yield x, denoised


def endpoints(
    teacher: Teacher,
    noise: torch.Tensor,
    labels: torch.Tensor,
    num_steps: int,
    *,
    cfg_scale: float = 1.0,
    cfg_channels: int | None = None,
) -> torch.Tensor:  # [B, C, H, W]
    """Where the trajectories of `solve` end: the teacher's samples."""
    state = noise
    for state, _ in solve(teacher, noise, labels, num_steps, cfg_scale=cfg_scale, cfg_channels=cfg_channels):  # noqa: B007
        pass
    return state
