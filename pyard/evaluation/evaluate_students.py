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
from pyard.noise import standard_normal
from pyard.runtime import OnnxStudent
from pyard.sampling import sample
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
    batch_size: int = 256,
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
        batch_size: samples that run together; bounds memory.
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
        teacher_candidate(teacher, teacher_steps, cfg_scale=cfg_scale, cfg_channels=cfg_channels, batch_size=batch_size),
        [
            student_candidate(student, teacher, batch_size=batch_size)
            for student in (students if isinstance(students, list) else [students])
        ],
        data=images,
        features=digits_classifier(),
        num_classes=teacher.num_classes,
        count=count,
        seed=seed,
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
    teacher: DiTTeacher,
    num_steps: int,
    *,
    cfg_scale: float,
    cfg_channels: int | None = None,
    batch_size: int = 256,
    name: str | None = None,
) -> Candidate:
    """The teacher's own sampler as a row."""

    def draw(labels: np.ndarray, seed: int) -> np.ndarray:
        parts = []
        for start in range(0, len(labels), batch_size):
            index = np.arange(start, min(start + batch_size, len(labels)))
            noise = torch.from_numpy(standard_normal(seed, index, teacher.sample_shape)).to(teacher.device)
            classes = torch.from_numpy(labels[index]).to(teacher.device)
            ends = endpoints(teacher, noise, classes, num_steps, cfg_scale=cfg_scale, cfg_channels=cfg_channels)
            parts.append(ends.cpu().numpy())
        return np.concatenate(parts)

    passes = num_steps * (1 if cfg_scale == 1.0 else 2)
    return Candidate(name or f"teacher, {num_steps} steps", passes, draw)


def student_candidate(
    student: str | Path | Student | OnnxStudent,
    teacher: DiTTeacher,
    *,
    batch_size: int = 256,
    name: str | None = None,
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

    def draw(labels: np.ndarray, seed: int) -> np.ndarray:
        if isinstance(student, OnnxStudent):
            return student.sample(labels, seed=seed, batch_size=batch_size)
        return sample(student, labels, seed=seed, batch_size=batch_size).numpy()

    return Candidate(name or source, facts.num_steps, draw)
