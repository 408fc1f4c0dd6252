"""The coarse grid T = tau_S > ... > tau_0 on which a student jumps, tied to the teacher steps it was cut from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pyard.diffusion.noise_schedule import MOST_TIMESTEPS, NoiseSchedule
from pyard.errors import InputError
from pyard.storage.numbers import number, whole_number

Target = Literal["denoised", "state"]


@dataclass(frozen=True)
class TimeGrid:
    """Where the S jumps of a student begin and end on a teacher's trajectory of n steps.

    It travels with the trajectories and with the student, so that the two cannot disagree.

    Args:
        times: S + 1 teacher times, decreasing; the first is pure noise, the last clean data.
        embed_times: S times that the student's time embedding sees, one for each of its inputs.
        state_index: S + 1 numbers of teacher steps done at each grid time: 0 first, n last.
        denoised_index: S - 1 teacher evaluations, counted from 1, whose denoised prediction is an input and a target of a
            student with `target="denoised"` (its first input is the noise, its last target the trajectory's end).
    """

    times: tuple[float, ...]
    embed_times: tuple[float, ...]
    state_index: tuple[int, ...]
    denoised_index: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("times", "embed_times"):
            values = tuple(float(number(f"time grid: a time of {name}", value)) for value in getattr(self, name))
            object.__setattr__(self, name, values)
        for name in ("state_index", "denoised_index"):
            steps_done = (whole_number(f"time grid: a number of {name}", k, -1, MOST_TIMESTEPS) for k in getattr(self, name))
            object.__setattr__(self, name, tuple(steps_done))
        steps = self.num_steps
        if steps < 1:
            raise InputError(f"time grid: times {self.times}; expected at least 2 (one jump)")
        sizes = (len(self.embed_times), len(self.state_index), len(self.denoised_index))
        if sizes != (steps, steps + 1, steps - 1):
            raise InputError(
                f"time grid: {steps} jumps need {steps} embed_times, {steps + 1} state_index and {steps - 1} "
                f"denoised_index; found {sizes[0]}, {sizes[1]} and {sizes[2]}"
            )
        if any(a <= b for a, b in itertools.pairwise(self.times)):
            raise InputError(f"time grid: times {self.times} must decrease")
        if any(a >= b for a, b in itertools.pairwise(self.state_index)) or self.state_index[0] != 0:
            raise InputError(f"time grid: state_index {self.state_index} must increase from 0")
        inner = (0, *self.denoised_index, self.teacher_steps + 1)
        if any(a >= b for a, b in itertools.pairwise(inner)):
            raise InputError(
                f"time grid: denoised_index {self.denoised_index} must increase between 1 and {self.teacher_steps}"
            )

    @property
    def num_steps(self) -> int:
        """S, the jumps of the student."""
        return len(self.times) - 1

    @property
    def teacher_steps(self) -> int:
        """n, the steps of the teacher's trajectory."""
        return self.state_index[-1]

    @classmethod
    def build(
        cls,
        schedule: NoiseSchedule,
        num_steps: int = 4,
        teacher_steps: int = 25,
        *,
        state_index: Sequence[int] | None = None,
        denoised_index: Sequence[int] | None = None,
        embed_times: Sequence[float] | None = None,
    ) -> TimeGrid:
        """Cut `num_steps` jumps out of a trajectory of `teacher_steps` steps.

        Args:
            schedule: the teacher's noise schedule, which names the times of its steps.
            num_steps: S.
            teacher_steps: n.
            state_index: teacher steps done at each grid time; None: floor(s n / S), evenly spaced.
            denoised_index: evaluations whose denoised prediction is used; None: floor((s + 1) n / (S + 1)), s = 1 ... S - 1,
                which is the published 10, 15, 20 of 25 for S = 4.
            embed_times: what the time embedding sees; None: the published T (1 - s / S). `for_target` changes it.

        Raises:
            InputError: more jumps than teacher steps, or an index that does not fit.
        """
        num_steps = whole_number("time grid: num_steps", num_steps, -MOST_TIMESTEPS, MOST_TIMESTEPS)
        teacher_steps = whole_number("time grid: teacher_steps", teacher_steps, -MOST_TIMESTEPS, MOST_TIMESTEPS)
        if not 1 <= num_steps <= teacher_steps:
            raise InputError(
                f"time grid: {num_steps} jumps out of {teacher_steps} teacher steps; expected 1 to {teacher_steps}"
            )
        if state_index is None:
            state_index = [s * teacher_steps // num_steps for s in range(num_steps + 1)]
        if denoised_index is None:
            # S = n would ask for evaluation n twice (the last target is the end of the trajectory); `min` keeps it increasing.
            raw = [(s + 1) * teacher_steps // (num_steps + 1) for s in range(1, num_steps)]
            denoised_index = [min(max(k, s), teacher_steps - num_steps + s) for s, k in enumerate(raw, start=1)]
        if embed_times is None:
            embed_times = [schedule.noisiest_time * (1 - s / num_steps) for s in range(num_steps)]
        visited = schedule.timesteps(teacher_steps)
        if len(state_index) != num_steps + 1 or state_index[-1] != teacher_steps or min(state_index) < 0:
            raise InputError(
                f"time grid: state_index {tuple(state_index)}; expected {num_steps + 1} numbers from 0 to {teacher_steps}"
            )
        return cls(
            times=tuple(visited[k] for k in state_index),
            embed_times=tuple(embed_times),
            state_index=tuple(state_index),
            denoised_index=tuple(denoised_index),
        )

    def for_target(self, target: Target) -> TimeGrid:
        """The same grid with the embed_times that suit a target.

        A student of `state` targets reads states, so it is told their true times, which are what the teacher's time embedding
        knows. One of `denoised` targets keeps the published, evenly spaced ones: its inputs carry no noise.
        """
        return self if target == "denoised" else dataclasses.replace(self, embed_times=self.times[:-1])

    def same_trajectory(self, other: TimeGrid) -> bool:
        """True if both grids cut the same places out of the same trajectory; embed_times are the student's own business."""
        mine, theirs = (dataclasses.asdict(grid) for grid in (self, other))
        return {**mine, "embed_times": None} == {**theirs, "embed_times": None}

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_json` turns back into an equal grid."""
        return {field.name: list(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> TimeGrid:
        """The grid of a `to_json` dictionary."""
        try:
            return cls(**{key: tuple(value) for key, value in config.items()})
        except TypeError as error:
            raise InputError(f"time grid: {error}; expected times, embed_times, state_index, denoised_index") from None
