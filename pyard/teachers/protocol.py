"""The protocol of a teacher: all that generating trajectories needs."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from pyard.conditions import Condition, Conditions
from pyard.diffusion.noise_schedule import NoiseSchedule


@runtime_checkable
class Teacher(Protocol):
    """A model whose trajectories a student learns from.

    Attributes:
        schedule: the forward process, and what `predict` returns.
        sample_shape: [C, ...] of one sample, such as (C, H, W).
        conditions: the table of its conditions, such as `pyard.conditions.ClassConditions(10)` for ten classes.
        fingerprint: a text that changes whenever the predictions do; trajectories and students record it.
        device: the device that `predict` expects its tensors on.

    Optional attributes are `guidance` and `cfg_normalization`, which decide how `pyard.teachers.guidance.combine` combines its
    predictions, and `solver_options`, settings of the `dpm++2m` solver (`pyard.diffusion.multistep.OPTIONS`). The fingerprint
    must change with them.
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
        """The network's output F for a batch at one time, to be interpreted as `schedule.prediction` says."""
        ...
