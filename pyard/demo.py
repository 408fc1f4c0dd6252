"""The whole path on real data in a few minutes: teacher, trajectories, two students, ONNX, pictures and a table."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pyard.demo_figures import PicturedRow, draw_samples, draw_training
from pyard.errors import InputError
from pyard.evaluation import Candidate, Evaluation, digits_classifier, measure
from pyard.evaluation.evaluate_students import DEFAULT_SEED, student_candidate, teacher_candidate
from pyard.evaluation.measure import balanced_labels
from pyard.export import export_onnx
from pyard.models.student import Student
from pyard.noise import standard_normal
from pyard.runtime import OnnxStudent
from pyard.sampling import sample
from pyard.teachers.digits import digits_data, digits_teacher, teach
from pyard.training import train
from pyard.training.state import read_log
from pyard.trajectories import generate_trajectories
from pyard.trajectories.shard import file_sha256

TEACHER_STEPS = 25
CFG_SCALE = 1.5
NUM_STEPS = 4
PICTURED = 20  # columns of samples.png: every digit twice
TEACHER, BASELINE, ARD, ONNX = "teacher", "step distillation", "ARD", "ARD in onnxruntime"


@dataclass(frozen=True)
class Budget:
    """What the demo spends; both students get the same.

    Args:
        trajectories: that the students learn from.
        student_steps: updates of each student.
        student_batch_size: trajectories an update.
        student_learning_rate: of each student.
        samples: drawn by every row of the table.
        teacher: settings of `pyard.teachers.digits.teach`; None: the built-in teacher as it is.
        save_every: updates between a student's checkpoints.
    """

    trajectories: int
    student_steps: int
    student_batch_size: int
    student_learning_rate: float
    samples: int
    teacher: dict[str, Any] | None
    save_every: int


FULL = Budget(
    trajectories=4096,
    student_steps=1200,
    student_batch_size=32,
    student_learning_rate=1e-3,
    samples=1797,
    teacher=None,
    save_every=250,
)
QUICK = Budget(
    trajectories=512,
    student_steps=120,
    student_batch_size=32,
    student_learning_rate=2e-3,
    samples=200,
    teacher={"max_steps": 800, "depth": 2, "batch_size": 32, "learning_rate": 4e-3, "ema_decay": 0.99},
    save_every=60,
)


def demo(
    out: Path = Path("demo"), *, quick: bool = False, fresh: bool = False, seed: int = 0, progress: bool = True
) -> Evaluation:
    """Distil real handwritten digits into a student of 4 network passes, in PyTorch and in onnxruntime.

    Five stages: (1) the built-in teacher, trained on scikit-learn's digits unless the cache has it; (2) its trajectories, 25
    DDIM steps with guidance 1.5; (3) two students of the published setting and equal budget, step distillation (no history)
    and ARD (history in every layer); (4) the ARD student as ONNX; (5) `samples.png`, `training.png`, `quality.json` and a
    table. What is done already is not done again; a run that was stopped goes on where it was.

    Example: pyard demo

    Args:
        out: folder for everything but the built-in teacher, which is kept in the cache ($PYARD_CACHE, or ~/.cache/pyard).
        quick: a minute's run with a tiny teacher of its own, in the subfolder `quick`: it shows that everything works, and its
            pictures are blurred.
        fresh: remove the results of earlier runs first; the built-in teacher in the cache stays.
        seed: of trajectories and training; the samples that are measured start from other noise.
        progress: show progress bars.

    Returns:
        The table.
    """
    budget = QUICK if quick else FULL
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
    depth = teacher.network.config.depth
    students = {"step-distillation": 0, "ard": depth}
    with _stage(f"3/5  two students, {budget.student_steps} updates each", seconds):
        runs = [_settings(budget, out / name, layers, seed) for name, layers in students.items()]
        if not quick and teacher.device.type == "cpu" and (os.cpu_count() or 1) > 1:
            _train_side_by_side("digits", store.path, runs, progress)
        baseline, ard = (train(teacher, store, **run, progress=progress) for run in runs)
    with _stage("4/5  export to ONNX", seconds):
        exported = _export(ard, out / "ard.onnx")
    with _stage("5/5  evaluation and pictures", seconds):
        rows = [
            teacher_candidate(teacher, TEACHER_STEPS, cfg_scale=CFG_SCALE, name=TEACHER),
            student_candidate(baseline, teacher, name=BASELINE),
            student_candidate(ard, teacher, name=ARD),
            student_candidate(exported, teacher, name=ONNX),
        ]
        evaluated = {
            "teacher": teacher.fingerprint,
            BASELINE: file_sha256(out / "step-distillation" / "student" / "model.safetensors"),
            ARD: file_sha256(out / "ard" / "student" / "model.safetensors"),
            ONNX: file_sha256(out / "ard.onnx"),
        }
        evaluation = _earlier_evaluation(out / "quality.json", evaluated)
        if evaluation is None:
            evaluation = _evaluate(rows, teacher.num_classes, budget.samples, progress)
            evaluation.settings.update(
                evaluated=evaluated,
                budget=dataclasses.asdict(budget),
                teacher_steps=TEACHER_STEPS,
                cfg_scale=CFG_SCALE,
                max_difference_onnxruntime_pytorch=_difference(exported, ard, budget.samples),
            )
        _draw(rows, evaluation, out)
    evaluation.save(out / "quality.json", seconds_per_stage=seconds)
    print(f"\n{evaluation.table()}\n")
    difference = evaluation.settings["max_difference_onnxruntime_pytorch"]
    print(f"onnxruntime and PyTorch differ by at most {difference:.1e} in a pixel (same noise and labels, pixels: -1 to 1).")
    print(f"Pictures: {out / 'samples.png'} and {out / 'training.png'}. Numbers: {out / 'quality.json'}.")
    return evaluation


def _settings(budget: Budget, out: Path, history_layers: int, seed: int) -> dict[str, Any]:
    """A student of the published setting: denoised targets, direct outputs, a head for each step."""
    return dict(
        out=out,
        num_steps=NUM_STEPS,
        history_layers=history_layers,
        mask="causal",
        target="denoised",
        output="direct",
        heads="per_step",
        max_steps=budget.student_steps,
        batch_size=budget.student_batch_size,
        learning_rate=budget.student_learning_rate,
        save_every=budget.save_every,
        seed=seed,
    )


def _train_side_by_side(teacher: str, store: Path, runs: list[dict[str, Any]], progress: bool) -> None:
    """Train each run in a process of its own, on one core: a network this small gains nothing from a second one."""
    total = sum(run["max_steps"] for run in runs)
    with (
        ProcessPoolExecutor(len(runs), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(total=total, desc="training both students", unit="step", disable=not progress) as bar,
    ):
        pending = {pool.submit(_train_quietly, teacher, store, run) for run in runs}
        while pending:
            done, pending = wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            logs = [read_log(run["out"] / "log.jsonl") for run in runs]
            bar.update(sum(log[-1]["step"] for log in logs if log) - bar.n)


def _train_quietly(teacher: str, store: Path, run: dict[str, Any]) -> None:
    train(teacher, store, **run, progress=False)


def _export(student: Student, path: Path) -> OnnxStudent:
    """The student as ONNX; a file that is there already is kept if it draws the same samples."""
    if path.exists():
        with suppress(InputError):
            exported = OnnxStudent(path)
            if _difference(exported, student, 2 * student.num_classes) < 1e-4:
                return exported
    export_onnx(student, path)
    return OnnxStudent(path)


def _difference(exported: OnnxStudent, student: Student, count: int) -> float:
    """The largest absolute difference of `count` samples of both from the same noise."""
    labels = balanced_labels(count, student.num_classes)
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
        evaluation = Evaluation.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return evaluation if evaluation.settings.get("evaluated") == evaluated else None


def _draw(rows: list[Candidate], evaluation: Evaluation, out: Path) -> None:
    labels = np.arange(PICTURED) // 2
    images, _ = digits_data()
    noise = standard_normal(DEFAULT_SEED, np.arange(PICTURED), images.shape[1:])
    titles = {
        TEACHER: f"Teacher, {TEACHER_STEPS} steps",
        BASELINE: f"Step distillation, {NUM_STEPS} steps",
        ARD: f"ARD, {NUM_STEPS} steps",
        ONNX: f"ARD, {NUM_STEPS} steps, onnxruntime",
    }
    pictured = []
    for row in rows:
        quality = evaluation.row(row.name)
        facts = f"{quality.network_passes} network passes · Fréchet {quality.frechet_to_data:.2f}"
        pictured.append(PicturedRow(titles[row.name], facts, row.draw(noise, labels)))
    draw_samples(pictured, labels, out / "samples.png")
    runs = {"Step distillation": out / "step-distillation", "ARD": out / "ard"}
    draw_training({name: read_log(run / "log.jsonl") for name, run in runs.items()}, out / "training.png")


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
    for name in ("teacher", "teacher.training", "trajectories", "step-distillation", "ard"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("teacher.lock", "ard.onnx", "samples.png", "training.png", "quality.json"):
        (out / name).unlink(missing_ok=True)
