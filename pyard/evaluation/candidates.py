"""Teachers and students as rows of an evaluation: ways of drawing samples from noise and condition numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyard.diffusion.scheduler_times import Visits
from pyard.errors import InputError
from pyard.evaluation.measure import Candidate
from pyard.evaluation.teacher_settings import TeacherSettings
from pyard.models.backbone import Backbone
from pyard.models.fingerprint import weights_digest
from pyard.models.student import Student
from pyard.runtime import OnnxStudent
from pyard.teachers.guidance import endpoints
from pyard.teachers.network_teacher import NetworkTeacher


def loaded_student(
    student: str | Path | Student | OnnxStudent, network: type[Backbone] | str | None = None
) -> Student | OnnxStudent:
    """A student by its folder, on the CPU, or by its ONNX file; one that is loaded already is returned as it is."""
    if not isinstance(student, str | Path):
        return student
    if str(student).endswith(".onnx"):
        return OnnxStudent(student)
    return Student.from_pretrained(student, network=network)


def over_teacher(student: Student | OnnxStudent, source: Any, teacher: NetworkTeacher) -> Student | OnnxStudent:
    """A LoRA student that was read from `source`, over the teacher's weights if they are its base: memory holds them once."""
    base = student.config.base if isinstance(student, Student) and isinstance(source, str | Path) else None
    if base is None or base.fingerprint != weights_digest(teacher.network):
        return student
    return Student.from_pretrained(source, base=teacher.network)


def teacher_candidate(
    teacher: NetworkTeacher, num_steps: int, *, cfg_scale: float, cfg_channels: int | None = None, name: str | None = None
) -> Candidate:
    """The teacher's own sampler as a row."""
    return teacher_row(teacher, TeacherSettings(num_steps, cfg_scale, cfg_channels, None, None), name)


def teacher_row(
    teacher: NetworkTeacher, settings: TeacherSettings, name: str | None = None, visits: Visits | None = None
) -> Candidate:
    """The teacher's sampler with these settings as a row; it visits the schedule's own times unless others are given."""
    how = asdict(settings)
    steps = how.pop("teacher_steps")

    def draw(noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        start, classes = (torch.from_numpy(array).to(teacher.device) for array in (noise, labels))
        return endpoints(teacher, start, classes, visits or steps, **how).cpu().numpy()

    return Candidate(name or f"teacher, {steps} steps", settings.passes(teacher.schedule, visits), draw)


def student_candidate(
    student: str | Path | Student | OnnxStudent,
    teacher: NetworkTeacher,
    *,
    name: str | None = None,
    sample_shape: tuple[int, ...] | None = None,
) -> Candidate:
    """A student, in PyTorch or in onnxruntime, as a row; it draws samples of the teacher's usual shape if none is given.

    Raises:
        InputError: it draws something else than the teacher.
    """
    source = name or (str(student) if isinstance(student, str | Path) else type(student).__name__)
    if isinstance(student, str | Path):
        student = loaded_student(student)
        if isinstance(student, Student):
            student.to(teacher.device)
    facts = student.info if isinstance(student, OnnxStudent) else student
    numbers = facts.num_conditions
    shapes = facts.sample_shapes if isinstance(facts, Student) else (tuple(facts.sample_shape),)
    wanted = sample_shape or teacher.sample_shape
    if wanted not in shapes or numbers != teacher.conditions.count:
        raise InputError(
            f"{source} draws {', '.join(map(str, shapes))} of {numbers} classes; the teacher draws "
            f"{wanted} of {teacher.conditions.count}"
        )

    @torch.inference_mode()
    def draw(noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if isinstance(student, OnnxStudent):
            from pyard.export.condition_inputs import as_arrays  # the exporter's imports take a second

            samples = student.sample(condition=as_arrays(teacher.conditions.take(labels)), noise=noise)
            return samples.transpose(0, 3, 1, 2) if student.info.pictures else samples
        device = student.embed_times.device
        *_, last = student.rollout(torch.from_numpy(noise).to(device), torch.from_numpy(labels).to(device))
        return last.float().cpu().numpy()

    return Candidate(source, facts.num_steps, draw)
