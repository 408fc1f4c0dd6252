"""The whole path on real data in a few minutes: teacher, trajectories, students, ONNX, pictures and a table."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from pyard.data.digits import digits_data
from pyard.demo.figures import PicturedRow, draw_samples, draw_training
from pyard.demo.students import ADVERSARIAL, ARD, FULL, NUM_STEPS, QUICK, STUDENTS, run_of, train_side_by_side
from pyard.diffusion.noise import standard_normal
from pyard.errors import InputError
from pyard.evaluation import Candidate, Evaluation, digits_classifier, measure
from pyard.evaluation.candidates import student_candidate, teacher_candidate
from pyard.evaluation.captioned_scenes import TextQuality
from pyard.evaluation.evaluate_students import DEFAULT_SEED
from pyard.evaluation.measure import balanced_labels
from pyard.export import export_onnx
from pyard.models.student import Student
from pyard.runtime import OnnxStudent
from pyard.sampling.draw import sample
from pyard.storage.files import file_sha256
from pyard.storage.log import read_log
from pyard.storage.reading import read_object
from pyard.storage.typed import checked
from pyard.teachers.digits import digits_teacher, teach
from pyard.training import train
from pyard.trajectories import generate_trajectories

TEACHER_STEPS = 25
CFG_SCALE = 1.5
PICTURED = 20  # columns of samples.png: every digit twice
TEACHER, ONNX = "teacher", "ARD in onnxruntime"


@checked("demo")
def demo(
    out: Path = Path("demo"),
    *,
    text: bool = False,
    quick: bool = False,
    adversarial: bool = False,
    fresh: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation | list[TextQuality]:
    """Distil real handwritten digits into a student of 4 network passes, in PyTorch and in onnxruntime.

    Five stages: (1) the built-in teacher, trained on scikit-learn's digits unless the cache has it; (2) its trajectories, 25
    DDIM steps with guidance 1.5; (3) three students of equal budget: step distillation (no history) and ARD (history in every
    layer) in the setting of the authors' code, and ARD as `pyard.train` does it by default; (4) the ARD student as ONNX; (5)
    `samples.png`, `training.png`, `quality.json` and a table. Finished stages are not repeated; an interrupted run
    resumes.

    Example: pyard demo

    Args:
        out: folder for everything but the built-in teacher, which is kept in the cache ($PYARD_CACHE, or ~/.cache/pyard).
        text: run the text-to-image demo instead, in the subfolder `text`: captioned scenes, and an exact measure of how well
            students follow prompts; without `adversarial`.
        quick: a one-minute run with a tiny teacher, in the subfolder `quick`: it shows that everything works; its pictures are
            blurred.
        adversarial: continue training with discriminators that compare the ARD student's samples with real digits: one
            more row of the table, about four minutes more.
        fresh: remove the results of earlier runs first; the built-in teacher in the cache stays.
        seed: random seed of trajectories and training; the measured samples start from different noise.
        progress: show progress bars.

    Returns:
        The table.
    """
    if text:
        if adversarial:
            raise InputError("demo: adversarial is for the digits; leave it out with text")
        from pyard.demo.text import demo_text

        return demo_text(Path(out) / "text", quick=quick, fresh=fresh, seed=seed, progress=progress)
    budget = QUICK if quick else FULL
    names = [name for name in STUDENTS if adversarial or name != ADVERSARIAL]
    out = Path(out) / "quick" if quick else Path(out)
    if fresh:
        _remove_results(out)
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    with _stage("1/5  teacher", seconds):
        if budget.teacher is None:
            teacher = digits_teacher(progress)
        else:
            teacher = teach(out / "teacher", **budget.teacher, progress=progress)
    with _stage(f"2/5  {budget.trajectories} trajectories of {TEACHER_STEPS} DDIM steps", seconds):
        store = generate_trajectories(
            teacher,
            out / "trajectories",
            budget.trajectories,
            num_steps=NUM_STEPS,
            teacher_steps=TEACHER_STEPS,
            cfg_scale=CFG_SCALE,
            seed=seed,
            batch_size=min(256, budget.trajectories),
            progress=progress,
        )
    runs = {name: run_of(name, budget, out, teacher.network.config.depth, seed) for name in names}
    with _stage(f"3/5  {len(names)} students, {sum(run['max_steps'] for run in runs.values())} updates in all", seconds):
        if not quick and teacher.device.type == "cpu" and (os.cpu_count() or 1) > 1:
            follows = {name: STUDENTS[name].follows for name in names}
            train_side_by_side("digits", store.path, runs, progress, {name: to for name, to in follows.items() if to})
        students = {name: train(teacher, store, **run, progress=progress) for name, run in runs.items()}
    with _stage("4/5  export to ONNX", seconds):
        exported = _export(students[ARD], out / "ard.onnx")
    with _stage("5/5  evaluation and pictures", seconds):
        rows = [
            teacher_candidate(teacher, TEACHER_STEPS, cfg_scale=CFG_SCALE, name=TEACHER),
            *(student_candidate(student, teacher, name=name) for name, student in students.items()),
            student_candidate(exported, teacher, name=ONNX),
        ]
        evaluated = {
            "teacher": teacher.fingerprint,
            **{name: file_sha256(run["out"] / "student" / "model.safetensors") for name, run in runs.items()},
            ONNX: file_sha256(out / "ard.onnx"),
        }
        evaluation = _earlier_evaluation(out / "quality.json", evaluated)
        if evaluation is None:
            evaluation = _evaluate(rows, teacher.conditions.count, budget.samples, progress)
            evaluation.settings.update(
                evaluated=evaluated,
                budget=dataclasses.asdict(budget),
                teacher_steps=TEACHER_STEPS,
                cfg_scale=CFG_SCALE,
                max_difference_onnxruntime_pytorch=_difference(exported, students[ARD], budget.samples),
            )
        _draw(rows, evaluation, out)
        draw_training(
            {STUDENTS[name].title: read_log(run["out"] / "log.jsonl") for name, run in runs.items()}, out / "training.png"
        )
    evaluation.save(out / "quality.json", seconds_per_stage=seconds)
    print(f"\n{evaluation.table()}\n")
    difference = evaluation.settings["max_difference_onnxruntime_pytorch"]
    print(f"onnxruntime and PyTorch differ by at most {difference:.1e} in a pixel (same noise and labels, pixels: -1 to 1).")
    print(f"Pictures: {out / 'samples.png'} and {out / 'training.png'}. Numbers: {out / 'quality.json'}.")
    return evaluation


def _export(student: Student, path: Path) -> OnnxStudent:
    """The student as ONNX; a file that is there already is kept if it draws the same samples."""
    if path.exists():
        with suppress(InputError):
            exported = OnnxStudent(path)
            if _difference(exported, student, 2 * student.num_conditions) < 1e-4:
                return exported
    export_onnx(student, path)
    return OnnxStudent(path)


def _difference(exported: OnnxStudent, student: Student, count: int) -> float:
    """The largest absolute difference of `count` samples of both from the same noise."""
    labels = balanced_labels(count, student.num_conditions)
    ours = sample(student, labels, seed=DEFAULT_SEED).numpy()
    return float(np.abs(exported.sample(labels, seed=DEFAULT_SEED, batch_size=256) - ours).max())


def _evaluate(rows: list[Candidate], num_classes: int, count: int, progress: bool) -> Evaluation:
    teacher, *students = rows
    images, _ = digits_data()
    classifier = digits_classifier()
    evaluation = measure(
        teacher,
        students,
        data=images,
        features=classifier,
        sample_shape=images.shape[1:],
        num_classes=num_classes,
        count=count,
        seed=DEFAULT_SEED,
        batch_size=min(128, max(1, count // 4)),
        progress=progress,
    )
    evaluation.settings["classifier_accuracy_on_held_out_digits"] = classifier.held_out_accuracy
    return evaluation


def _earlier_evaluation(path: Path, evaluated: dict[str, str]) -> Evaluation | None:
    """The evaluation that an earlier run stored, if it was of the same weights."""
    try:
        evaluation = Evaluation.from_json(read_object(path, finite=False))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return evaluation if evaluation.settings.get("evaluated") == evaluated else None


def _draw(rows: list[Candidate], evaluation: Evaluation, out: Path) -> None:
    labels = np.arange(PICTURED) // 2
    images, _ = digits_data()
    noise = standard_normal(DEFAULT_SEED, np.arange(PICTURED), images.shape[1:])
    titles = {
        TEACHER: f"Teacher, {TEACHER_STEPS} steps",
        **{name: f"{student.title}, {NUM_STEPS} steps" for name, student in STUDENTS.items()},
        ONNX: f"{STUDENTS[ARD].title}, {NUM_STEPS} steps, onnxruntime",
    }
    pictured = []
    for row in rows:
        quality = evaluation.row(row.name)
        facts = f"{quality.network_passes} network passes · Fréchet {quality.frechet_to_data:.2f}"
        pictured.append(PicturedRow(titles[row.name], facts, row.draw(noise, labels)))
    draw_samples(pictured, labels, out / "samples.png")


@contextmanager
def _stage(title: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a stage and note how long it took."""
    print(f"[{title}]", flush=True)
    begin = time.perf_counter()
    yield
    seconds[title] = round(time.perf_counter() - begin, 2)
    print(f"    {seconds[title]:.1f} s", flush=True)


def _remove_results(out: Path) -> None:
    """Remove what the demo writes, by name: `out` may be a folder with other things in it."""
    for name in ("teacher", "teacher.training", "trajectories", *(student.folder for student in STUDENTS.values())):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("teacher.lock", "ard.onnx", "samples.png", "training.png", "quality.json"):
        (out / name).unlink(missing_ok=True)
