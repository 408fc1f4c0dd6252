"""A teacher's guided ODE: classifier-free guidance between a condition and its null row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch

from pyard.conditions import Condition
from pyard.diffusion.scheduler_times import Visits
from pyard.diffusion.solvers import Solver, integrate
from pyard.errors import InputError
from pyard.teachers.protocol import Teacher

# How a family's pipeline combines the two predictions: see `combine`.
GuidanceKind = Literal["plain", "norm", "z_image"]


def combine(
    conditional: torch.Tensor,  # [B, C, ...]
    unconditional: torch.Tensor,  # [B, C, ...]
    cfg_scale: float,
    kind: GuidanceKind = "plain",
    cfg_normalization: float = 0.0,
) -> torch.Tensor:  # [B, C, ...]
    """The guided prediction of two, for s = cfg_scale.

    Args:
        conditional: F_c, of the condition.
        unconditional: F_u, of the null condition.
        cfg_scale: s; 1 is F_c.
        kind: `plain`, F_u + s (F_c - F_u) (Ho & Salimans 2022). `norm`, Qwen-Image's: that, scaled so that each token of 2 x 2
            latents in all channels is as long as it is in F_c. `z_image`: plain, and no longer than F_c as `cfg_normalization`
            says; Z-Image's pipeline counts its guidance_scale from F_c, so that s = guidance_scale + 1.
        cfg_normalization: of `z_image`: a sample's prediction is at most so many times as long as its F_c; 0: any length.

    Raises:
        InputError: another kind, or samples that have no tokens of 2 x 2.
    """
    if kind not in get_args(GuidanceKind):
        raise InputError(f"guidance is {kind!r}; expected one of {get_args(GuidanceKind)}")
    if cfg_normalization and kind != "z_image":
        raise InputError(f"cfg_normalization is {cfg_normalization:g}; only guidance 'z_image' uses it, not {kind!r}")
    guided = unconditional + cfg_scale * (conditional - unconditional)
    if kind == "norm":
        lengths = _token_norms(conditional) / _token_norms(guided)
        return guided * lengths.repeat_interleave(2, -1).repeat_interleave(2, -2)
    if cfg_normalization > 0:
        dims = tuple(range(1, guided.ndim))
        longest = cfg_normalization * torch.linalg.vector_norm(conditional, dim=dims, keepdim=True)
        length = torch.linalg.vector_norm(guided, dim=dims, keepdim=True)
        return torch.where(length > longest, guided * (longest / length), guided)
    return guided


def _token_norms(x: torch.Tensor) -> torch.Tensor:  # [B, C, h, w] -> [B, 1, h / 2, w / 2]
    if x.ndim != 4 or x.shape[-1] % 2 or x.shape[-2] % 2:
        raise InputError(f"guidance 'norm' works on tokens of 2 x 2 latents; found samples [C, h, w] of {tuple(x.shape[1:])}")
    batch, channels, height, width = x.shape
    tokens = x.view(batch, channels, height // 2, 2, width // 2, 2)
    return torch.linalg.vector_norm(tokens, dim=(1, 3, 5))[:, None]


def truncation_interval(cfg_truncation: float | None, visits: Visits) -> tuple[float, float] | None:
    """The `cfg_interval` of Z-Image's `cfg_truncation`: no guidance where 1 - sigma is more than it.

    Args:
        cfg_truncation: 0 to 1, or None or more than 1 for guidance at every time, as in Z-Image's pipeline.
        visits: the times that a trajectory visits; the interval's lower end is one of them, so that rounding decides nothing.
    """
    if cfg_truncation is None or cfg_truncation > 1:
        return None
    if not cfg_truncation >= 0:
        raise InputError(f"cfg_truncation is {cfg_truncation}; expected 0 to 1, or None for guidance at every time")
    # In float32, as the pipeline compares them.
    timesteps = np.asarray(visits.embed_times, dtype=np.float32) * np.float32(1000)
    clean = (np.float32(1000) - timesteps) / np.float32(1000)
    guided = [time for time, share in zip(visits.embed_times, clean.tolist(), strict=True) if share <= cfg_truncation]
    # Nothing at all is guided where even the first time is too late.
    return (min(guided), max(guided)) if guided else (math.nextafter(visits.times[0], math.inf),) * 2


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

    A teacher with attributes `guidance` and `cfg_normalization` combines the two as `combine` says.

    Both halves run as one batch. `cfg_channels` guides the first so many channels only and leaves the rest conditional, as
    DiT's public code does with 3 of 4; None guides all. cfg_scale = 1 skips the unconditional half.
    """
    if cfg_scale == 1.0:
        return teacher.predict(x, time, condition)
    if null is None:
        raise InputError(f"cfg_scale is {cfg_scale}, but there is no null condition to guide away from; use cfg_scale=1")
    both = teacher.predict(torch.cat([x, x]), time, Condition.cat([condition, null]))
    conditional, unguided = both.chunk(2)
    kind: GuidanceKind = getattr(teacher, "guidance", "plain")
    guided = combine(conditional, unguided, cfg_scale, kind, getattr(teacher, "cfg_normalization", 0.0))
    if cfg_channels is None or cfg_channels >= x.shape[1]:
        return guided
    return torch.cat([guided[:, :cfg_channels], conditional[:, cfg_channels:]], dim=1)


@torch.inference_mode()
def solve(
    teacher: Teacher,
    noise: torch.Tensor,  # [B, C, ...]
    numbers: torch.Tensor,  # [B] int64
    num_steps: int | Visits,
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
        num_steps: n; teacher evaluations (each of two network passes where cfg_scale is not 1): n, or 2 n - 1 for `heun`. Or
            the times to visit, where they are not the schedule's own.
        cfg_scale: guidance weight; 1 is none.
        cfg_channels: guide only the first so many channels; None guides all.
        cfg_interval: lowest and highest time that the network is told with guidance, both included; None guides always.
        solver: see `pyard.diffusion.solvers.integrate`. Its options are the teacher's `solver_options`, if it has any.

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

    # A teacher's options are those of its own scheduler, and part of its fingerprint; other solvers have none.
    options: Mapping[str, Any] | None = getattr(teacher, "solver_options", None) if solver == "dpm++2m" else None
    yield from integrate(predict, teacher.schedule, noise, num_steps, solver, options)


def endpoints(
    teacher: Teacher,
    noise: torch.Tensor,
    numbers: torch.Tensor,
    num_steps: int | Visits,
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
