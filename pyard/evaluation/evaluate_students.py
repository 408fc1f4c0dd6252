"""The public face: students and a teacher in, a table out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pyard.errors import InputError
from pyard.evaluation.features import digits_classifier
from pyard.evaluation.measure import Candidate, measure
from pyard.evaluation.report import Evaluation
from pyard.models.student import Student
from pyard.runtime import OnnxStudent
from pyard.solvers import endpoints
from pyard.teachers import load_teacher
from pyard.teachers.digits import digits_data
from pyard.teachers.dit import DiTTeacher

# Kept apart from the seeds that trajectories are made with: a student is not to be measured on the noise it was trained on.
DEFAULT_SEED = 1000


def evaluate(
    students: str | Path | Student | OnnxStudent | list[str],
    teacher: str | Path | DiTTeacher = "digits",
    *,
    count: int = 1797,
    seed: int = DEFAULT_SEED,
    teacher_steps: int = 25,
    cfg_scale: float = 1.5,
    cfg_channels: int | None = None,
    batch_size: int = 128,
    out: Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure students against their teacher and real data, and print the table.

    Fréchet distances are taken in the features of a small classifier trained on scikit-learn's digits; they tell students of
    the digits apart and compare with no published FID.

    Example: pyard evaluate --students '[runs/step-distillation, runs/ard, runs/ard/student.onnx]' --out quality.json

    Args:
        students: a run folder, a student's folder or an ONNX file; or a list of them.
        teacher: `digits`, or the folder of a teacher of the digits.
        count: samples for each row; 1797 is the number of real digits.
        seed: of the noise; choose another than the trajectories were made with.
        teacher_steps: DDIM steps of the teacher.
        cfg_scale: its guidance weight; 1 is none.
        cfg_channels: guide only the first so many channels; none: all.
        batch_size: samples that are drawn, and timed, together.
        out: a JSON file to write as well.
        progress: show a progress bar.

    Returns:
        The rows, the teacher's first.

    Raises:
        InputError: a student of another sample shape or number of classes, or a teacher of other data than the digits.
    """
    if isinstance(teacher, str | Path):
        teacher = load_teacher(teacher)
    images, _ = digits_data()
    if teacher.sample_shape != images.shape[1:]:
        raise InputError(
            f"evaluate: the teacher draws {teacher.sample_shape}; pyard has features for digits, {images.shape[1:]}, only"
        )
    evaluation = measure(
        teacher_candidate(teacher, teacher_steps, cfg_scale=cfg_scale, cfg_channels=cfg_channels),
        [student_candidate(student, teacher) for student in (students if isinstance(students, list) else [students])],
        data=images,
        features=digits_classifier(),
        sample_shape=teacher.sample_shape,
        num_classes=teacher.num_classes,
        count=count,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    evaluation.settings.update(
        teacher_fingerprint=teacher.fingerprint,
        teacher_steps=teacher_steps,
        cfg_scale=cfg_scale,
        cfg_channels=cfg_channels,
        classifier_accuracy_on_held_out_digits=digits_classifier().held_out_accuracy,
    )
    print(evaluation.table())
    if out is not None:
        evaluation.save(out)
    return evaluation


def teacher_candidate(
    teacher: DiTTeacher, num_steps: int, *, cfg_scale: float, cfg_channels: int | None = None, name: str | None = None
) -> Candidate:
    """The teacher's own sampler as a row."""

    def draw(noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        start, classes = (torch.from_numpy(array).to(teacher.device) for array in (noise, labels))
        return endpoints(teacher, start, classes, num_steps, cfg_scale=cfg_scale, cfg_channels=cfg_channels).cpu().numpy()

    passes = num_steps * (1 if cfg_scale == 1.0 else 2)
    return Candidate(name or f"teacher, {num_steps} steps", passes, draw)


def student_candidate(
    student: str | Path | Student | OnnxStudent, teacher: DiTTeacher, *, name: str | None = None
) -> Candidate:
    """A student, in PyTorch or in onnxruntime, as a row.

    Raises:
        InputError: it draws something else than the teacher.
    """
    source = str(student) if isinstance(student, str | Path) else type(student).__name__
    if isinstance(student, str | Path):
        student = OnnxStudent(student) if str(student).endswith(".onnx") else Student.from_pretrained(student)
    facts = student.info if isinstance(student, OnnxStudent) else student
    if (tuple(facts.sample_shape), facts.num_classes) != (teacher.sample_shape, teacher.num_classes):
        raise InputError(
            f"{source} draws {tuple(facts.sample_shape)} of {facts.num_classes} classes; the teacher draws "
            f"{teacher.sample_shape} of {teacher.num_classes}"
        )

    @torch.inference_mode()
    def draw(noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if isinstance(student, OnnxStudent):
            return student.sample(labels, noise=noise)
        device = student.embed_times.device
        *_, last = student.rollout(torch.from_numpy(noise).to(device), torch.from_numpy(labels).to(device))
        return last.float().cpu().numpy()

    return Candidate(name or source, facts.num_steps, draw)
