"""The coarse grid T = tau_S > ... > tau_0 on which a student jumps, and the teacher steps that it corresponds to."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pyard.diffusion.noise_schedule import MOST_TIMESTEPS, NoiseSchedule
from pyard.diffusion.scheduler_times import Visits
from pyard.errors import InputError
from pyard.storage.numbers import number, whole_number

Target = Literal["denoised", "state"]


@dataclass(frozen=True)
class TimeGrid:
    """The times at which a student's S jumps begin and end, on a teacher's trajectory of n steps.

    It is stored with the trajectories and with the student, so a disagreement between them is found.

    Args:
        times: S + 1 teacher times, decreasing; the first is pure noise, the last clean data.
        embed_times: S times that are given to the student's time embedding, one for each input.
        state_index: for each of the S + 1 grid times, the number of teacher steps done by then: from 0 to n.
        denoised_index: numbers, counted from 1, of the S - 1 teacher evaluations whose denoised prediction is an input and a
            target of a student with `target="denoised"`. (Its first input is the noise, and its last target the trajectory's
            end.)
        teacher_times: the n + 1 times that the teacher's solver visits, clean data last; None: the schedule's own times.
        teacher_embed_times: the n times that are given to the teacher's network; None: teacher_times without the last.
    """

    times: tuple[float, ...]
    embed_times: tuple[float, ...]
    state_index: tuple[int, ...]
    denoised_index: tuple[int, ...]
    teacher_times: tuple[float, ...] | None = None
    teacher_embed_times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("times", "embed_times", "teacher_times", "teacher_embed_times"):
            if name.startswith("teacher") and getattr(self, name) is None:
                continue
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
        self._check_teacher_times()

    def _check_teacher_times(self) -> None:
        visited, told, n = self.teacher_times, self.teacher_embed_times, self.teacher_steps
        if told is not None and (visited is None or len(told) != n):
            found = "no teacher_times" if visited is None else f"{len(told)} times"
            raise InputError(f"time grid: teacher_embed_times with {found}; expected {n} beside {n + 1} teacher_times")
        if visited is None:
            return
        if len(visited) != n + 1 or any(a <= b for a, b in itertools.pairwise(visited)):
            raise InputError(f"time grid: {len(visited)} teacher_times; expected {n + 1}, decreasing")
        if self.times != tuple(visited[k] for k in self.state_index):
            raise InputError(f"time grid: times {self.times} are not the teacher_times at state_index {self.state_index}")

    @property
    def num_steps(self) -> int:
        """S, the number of the student's jumps."""
        return len(self.times) - 1

    @property
    def teacher_steps(self) -> int:
        """n, the number of steps of the teacher's trajectory."""
        return self.state_index[-1]

    def visits(self, schedule: NoiseSchedule) -> Visits:
        """The times of the teacher's solver, for `pyard.diffusion.solvers.integrate`; by default the schedule's times."""
        if self.teacher_times is None:
            return Visits.of(schedule, self.teacher_steps)
        return Visits.of(schedule, Visits(self.teacher_times, self.teacher_embed_times or self.teacher_times[:-1]))

    @classmethod
    def build(
        cls,
        schedule: NoiseSchedule,
        num_steps: int = 4,
        teacher_steps: int | None = None,
        *,
        state_index: Sequence[int] | None = None,
        denoised_index: Sequence[int] | None = None,
        embed_times: Sequence[float] | None = None,
        visits: Visits | None = None,
    ) -> TimeGrid:
        """Divide a trajectory of `teacher_steps` steps into `num_steps` jumps.

        Args:
            schedule: the teacher's noise schedule, which determines the times of its steps.
            num_steps: S.
            teacher_steps: n; None: those of `visits`, or 25.
            state_index: number of teacher steps done at each grid time; None: evenly spaced, floor(s n / S).
            denoised_index: numbers of the evaluations whose denoised prediction is used; None: floor((s + 1) n / (S + 1)) for s
                = 1 ... S - 1, which for S = 4 and n = 25 gives the published 10, 15, 20.
            embed_times: times given to the time embedding; None: the published T (1 - s / S). `for_target` changes them.
            visits: the times of the teacher's solver, such as those from `pyard.diffusion.scheduler_times.visited`; None: the
                schedule's times.

        Raises:
            InputError: there are more jumps than teacher steps, an index is out of range or order, or the visits belong to
                another schedule.
        """
        if teacher_steps is None:
            teacher_steps = 25 if visits is None else len(visits.embed_times)
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
        own = Visits.of(schedule, teacher_steps)
        visits = own if visits is None else Visits.of(schedule, visits)
        if len(visits.embed_times) != teacher_steps:
            raise InputError(
                f"time grid: visits of {len(visits.embed_times)} steps; expected those of {teacher_steps} teacher steps"
            )
        if len(state_index) != num_steps + 1 or state_index[-1] != teacher_steps or min(state_index) < 0:
            raise InputError(
                f"time grid: state_index {tuple(state_index)}; expected {num_steps + 1} numbers from 0 to {teacher_steps}"
            )
        return cls(
            times=tuple(visits.times[k] for k in state_index),
            embed_times=tuple(embed_times),
            state_index=tuple(state_index),
            denoised_index=tuple(denoised_index),
            # The schedule's own times go without saying, so that one trajectory has one description.
            teacher_times=None if visits == own else visits.times,
            teacher_embed_times=None if visits.embed_times == visits.times[:-1] else visits.embed_times,
        )

    def for_target(self, target: Target) -> TimeGrid:
        """The same grid, with embed_times that suit a target.

        The inputs of a student with `state` targets are states, so it is given the times that the teacher's network was given
        there. A student with `denoised` targets keeps the published, evenly spaced times, because its inputs contain no noise.
        """
        if target == "denoised":
            return self
        told = self.teacher_embed_times
        embed_times = self.times[:-1] if told is None else tuple(told[k] for k in self.state_index[:-1])
        return dataclasses.replace(self, embed_times=embed_times)

    def same_trajectory(self, other: TimeGrid) -> bool:
        """Whether both grids divide the same trajectory at the same places; embed_times may differ."""
        mine, theirs = (dataclasses.asdict(grid) for grid in (self, other))
        return {**mine, "embed_times": None} == {**theirs, "embed_times": None}

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_json` turns back into an equal grid."""
        # Left out where the schedule says them: digests of grids from before there were any stay what they are.
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) for name, value in found.items() if value is not None}

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> TimeGrid:
        """The grid of a `to_json` dictionary."""
        try:
            return cls(**{key: tuple(value) for key, value in config.items()})
        except TypeError as error:
            raise InputError(
                f"time grid: {error}; expected times, embed_times, state_index, denoised_index, and teacher_times or none"
            ) from None
