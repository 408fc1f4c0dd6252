"""How the teacher of a comparison samples: as it did for the trajectories that its students were trained on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.scheduler_times import Visits
from pyard.diffusion.solvers import Solver, solver_of
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.runtime import OnnxStudent
from pyard.teachers.guidance import scale_at

Auto = Literal["auto"]

# For students that do not say what they were trained on.
_DEFAULTS: dict[str, Any] = {
    "teacher_steps": 25, "cfg_scale": 1.5, "cfg_channels": None, "cfg_interval": None, "solver": None,
}  # fmt: skip


@dataclass(frozen=True)
class TeacherSettings:
    """Settings of the teacher's sampler.

    Args:
        teacher_steps: solver steps; 0: the teacher is left out.
        cfg_scale: guidance weight; 1 is none.
        cfg_channels: channels that are guided; None: all.
        cfg_interval: lowest and highest teacher time with guidance; None: all times.
        solver: None: the schedule's usual one.
    """

    teacher_steps: int
    cfg_scale: float
    cfg_channels: int | None
    cfg_interval: tuple[float, float] | None
    solver: Solver | None

    @classmethod
    def of(
        cls, students: Sequence[tuple[str, Student | OnnxStudent]], given: dict[str, Any], fingerprint: str
    ) -> TeacherSettings:
        """What the students were trained on; for students that do not say it, what was given, and a warning.

        Args:
            students: with the names they go by in messages.
            given: settings that a caller asked for; "auto" or missing: the students' own.
            fingerprint: of the teacher at hand.

        Raises:
            InputError: a student of another teacher, a given setting that is not the student's, or students that differ.
        """
        asked = {name: value for name, value in given.items() if value != "auto"}
        recorded: dict[str, Any] = {}
        first = ""
        silent = []
        for name, student in students:
            theirs = fingerprint_of(student)
            if theirs and theirs != fingerprint:
                raise InputError(
                    f"evaluate: {name} was made from teacher {theirs[:12]}, but this is teacher {fingerprint[:12]}; give its "
                    "own teacher with --teacher"
                )
            own = recorded_settings(student)
            if own is None:
                silent.append(name)
                continue
            for setting, value in asked.items():
                left_out = setting == "teacher_steps" and value == 0
                if not left_out and not (setting == "solver" and value is None) and value != own[setting]:
                    raise InputError(
                        f"evaluate: {setting} is {_text(value)}, but {name} was trained on trajectories with "
                        f"{setting} {_text(own[setting])}; leave --{setting} out"
                    )
            differing = [setting for setting in recorded if recorded[setting] != own[setting]]
            if differing:
                setting = differing[0]
                raise InputError(
                    f"evaluate: {first} was trained on trajectories with {setting} {_text(recorded[setting])}, {name} with "
                    f"{_text(own[setting])}; evaluate them separately"
                )
            recorded, first = recorded or own, first or name
        settings = {**_DEFAULTS, **recorded, **asked}
        if silent and settings["teacher_steps"]:
            chosen = ", ".join(f"{name} {_text(settings[name])}" for name in _DEFAULTS)
            warnings.warn(
                f"evaluate: {', '.join(silent)} does not record the teacher's settings that it was trained with (it was "
                f"written by an earlier pyard, or not by `train`); it is compared with {chosen}, as the flags say. Check that "
                "these are the student's",
                stacklevel=2,
            )
        return cls(**settings)

    def passes(self, schedule: NoiseSchedule, visits: Visits | None = None) -> int:
        """Network passes of a sample, two for each evaluation with guidance, at given times or the schedule's own."""
        told = (visits or Visits.of(schedule, self.teacher_steps)).embed_times
        evaluated = list(told)
        if solver_of(schedule, self.solver) == "heun":
            evaluated += told[1:]
        return sum(1 if scale_at(time, self.cfg_scale, self.cfg_interval) == 1.0 else 2 for time in evaluated)


def recorded_settings(student: Student | OnnxStudent) -> dict[str, Any] | None:
    """The teacher's settings that a student was trained on, by name; None: it does not say."""
    found = student.info.teacher_settings if isinstance(student, OnnxStudent) else student.config.teacher_settings
    if found is None or found["solver"] != "unknown":
        return found
    return {**found, "solver": None}  # of imported trajectories


def fingerprint_of(student: Student | OnnxStudent) -> str:
    """The fingerprint of a student's teacher; empty where it is unknown."""
    return student.info.teacher_fingerprint if isinstance(student, OnnxStudent) else student.config.teacher_fingerprint


def _text(value: Any) -> str:
    return "none" if value is None else str(list(value)) if isinstance(value, tuple) else str(value)
