"""What trajectories need of a teacher."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from pyard.conditions import Condition, Conditions
from pyard.diffusion.noise_schedule import NoiseSchedule


@runtime_checkable
class Teacher(Protocol):
    """What trajectories are generated with.

    Attributes:
        schedule: forward process and what `predict` returns.
        sample_shape: [C, ...] of one sample, such as (C, H, W).
        conditions: what it can be asked for: `pyard.conditions.ClassConditions(10)` for ten classes.
        fingerprint: changes whenever the predictions do; trajectories and students remember it.
        device: where `predict` wants its tensors.

    It may have more: `guidance` and `cfg_normalization`, how `pyard.teachers.guidance.combine` guides it, and `solver_options`,
    of its own `dpm++2m` solver (`pyard.diffusion.multistep.OPTIONS`). Its fingerprint then changes with them.
    """

    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]

    @property
    def conditions(self) -> Conditions: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    def predict(
        self,
        x: torch.Tensor,  # [B, C, ...], x_t
        time: float,
        condition: Condition,  # B rows
    ) -> torch.Tensor:  # [B, C, ...]
        """The network's output F at one time for a batch; what it means is `schedule.prediction`."""
        ...
