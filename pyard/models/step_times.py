"""What each step of a student is told of its time, and how it jumps, by the size of the samples.

G grids, one if all sizes share it · S steps
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pyard.errors import InputError
from pyard.models.student_config import StudentConfig


class StepTimes(nn.Module):
    """Times and jumps of a student's steps.

    Args:
        config: of the student.
    """

    told: torch.Tensor  # float32 [G, S]

    def __init__(self, config: StudentConfig):
        super().__init__()
        self._shapes = config.shapes if config.grids is not None else ()
        grids = config.grids or (config.grid,)
        self._usual = self._shapes.index(config.usual_shape) if self._shapes else 0
        self._table = [grid.embed_times for grid in grids]
        self.register_buffer("told", torch.tensor(self._table, device="cpu"), persistent=False)
        # (a_s, b_s), Python floats: a is large (157 at S = 1), so the jump is computed in float32 at least.
        self._jumps: list[list[tuple[float, float]]] = [
            [config.schedule.jump_coefficients(*pair) for pair in itertools.pairwise(grid.times)]
            if config.output == "jump"
            else []
            for grid in grids
        ]

    def embed_times(self, sample_shape: Sequence[int] | None = None) -> torch.Tensor:  # [S]
        """The times that the network is told for samples of this shape; None: of the usual one."""
        return self.told[self._row(sample_shape)]

    def jumps(self, sample_shape: Sequence[int] | None = None) -> list[tuple[float, float]]:
        """(a_s, b_s) of the S updates a_s u_s + b_s F for samples of this shape; none of `direct` outputs."""
        return self._jumps[self._row(sample_shape)]

    def _row(self, sample_shape: Sequence[int] | None) -> int:
        if sample_shape is None or not self._shapes:
            return self._usual
        # Compared one by one, because torch.compile has no hash of a shape that it keeps symbolic.
        for i, shape in enumerate(self._shapes):
            if tuple(sample_shape) == shape:
                return i
        known = ", ".join(map(str, self._shapes))
        raise InputError(f"samples of shape {tuple(sample_shape)}; this student has times for {known}")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StepTimes:
        super()._apply(fn, recurse)
        if self.told.dtype in (torch.bfloat16, torch.float16):
            # 749.25 has no bfloat16: times stay float32 when the weights do not.
            self.told = torch.tensor(self._table, device=self.told.device)
        return self
