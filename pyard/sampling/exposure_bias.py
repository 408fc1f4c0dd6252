"""The exposure-bias curve: a student's error at each step on the teacher's history and on its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from pyard.errors import InputError
from pyard.models.history import ConcatenatingCache
from pyard.models.student import Student
from pyard.trajectories import TrajectoryBatch


@dataclass(frozen=True)
class ExposureBias:
    """A student's errors relative to the teacher at each step.

    Args:
        times: the S grid times of the predictions (tau_{S-1} ... tau_0); if sizes have their own times, those of the first
            size.
        teacher_forced: S mean squared errors on the teacher's history.
        rollout: S mean squared errors on the student's own history.
    """

    times: tuple[float, ...]
    teacher_forced: tuple[float, ...]
    rollout: tuple[float, ...]


@torch.no_grad()
def exposure_bias(student: Student, batches: Iterable[TrajectoryBatch]) -> ExposureBias:
    """Measure a student's errors on trajectories of its teacher.

    Args:
        student: a student in evaluation mode.
        batches: batches of trajectories with the student's grid and target.
    """
    device = student.embed_times.device
    errors = np.zeros((2, student.num_steps))
    count, times = 0, student.config.grid.times
    for batch in batches:
        history, target, condition = batch.history.to(device), batch.target.to(device), batch.condition.to(device)
        if not count:
            times = student.config.grid_of(history.shape[2:]).times
        own = torch.stack(list(student.rollout(history[:, 0], condition, ConcatenatingCache())), dim=1)
        for row, prediction in enumerate((student(history, condition), own)):
            squares = (prediction.float() - target).square()
            errors[row] += squares.mean(dim=tuple(range(2, squares.ndim))).sum(dim=0).double().cpu().numpy()  # [S]
        count += len(history)
    if not count:
        raise InputError("exposure bias: no trajectories; expected at least one batch")
    forced, rolled = (tuple(float(e) for e in row / count) for row in errors)
    return ExposureBias(times[1:], forced, rolled)
