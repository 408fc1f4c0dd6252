"""The demo's students: who they are, what they may spend, and their training side by side."""

from __future__ import annotations

from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pyard.storage.log import read_log
from pyard.training import train
from pyard.training.adversarial_config import DIGITS_DISCRIMINATORS

NUM_STEPS = 4
BASELINE, ARD, RECIPE, ADVERSARIAL = "step distillation", "ARD", "ARD, defaults", "ARD + GAN"


@dataclass(frozen=True)
class DemoStudent:
    """A row of the demo's table.

    Args:
        folder: of its run.
        title: in pictures.
        history: whether all layers see earlier steps, or none; None: as many as `pyard.train` takes by default.
        settings: fields of `TrainConfig` by which it differs from the others.
        follows: the student that it goes on from, adversarially.
    """

    folder: str
    title: str
    history: bool | None
    settings: dict[str, Any]
    follows: str | None = None


# The authors' code: the teacher's denoised predictions are the targets, the head's output is the prediction.
_AUTHORS_CODE = dict(target="denoised", output="direct", heads="per_step")
STUDENTS = {
    BASELINE: DemoStudent("step-distillation", "Step distillation", False, _AUTHORS_CODE),
    ARD: DemoStudent("ard", "ARD", True, _AUTHORS_CODE),
    RECIPE: DemoStudent("ard-defaults", "ARD, defaults", None, {}),
    ADVERSARIAL: DemoStudent("ard-gan", "ARD + GAN", True, dict(learning_rate=3e-4), follows=ARD),
}


@dataclass(frozen=True)
class Budget:
    """What the demo spends; all students get the same, and the adversarial one its own updates on top.

    Args:
        trajectories: that the students learn from.
        student_steps: updates of each student.
        adversarial_steps: further updates of the one that discriminators judge.
        student_batch_size: trajectories an update.
        student_learning_rate: of each student.
        samples: drawn by every row of the table.
        teacher: settings of `pyard.teachers.digits.teach`; None: the built-in teacher as it is.
        save_every: updates between a student's checkpoints.
    """

    trajectories: int
    student_steps: int
    adversarial_steps: int
    student_batch_size: int
    student_learning_rate: float
    samples: int
    teacher: dict[str, Any] | None
    save_every: int


FULL = Budget(
    trajectories=4096,
    student_steps=1000,
    adversarial_steps=1500,
    student_batch_size=32,
    student_learning_rate=1e-3,
    samples=1797,
    teacher=None,
    save_every=250,
)
QUICK = Budget(
    trajectories=512,
    student_steps=100,
    adversarial_steps=60,
    student_batch_size=32,
    student_learning_rate=2e-3,
    samples=200,
    teacher={"max_steps": 800, "depth": 2, "batch_size": 32, "learning_rate": 4e-3, "ema_decay": 0.99},
    save_every=60,
)


def run_of(name: str, budget: Budget, out: Path, depth: int, seed: int) -> dict[str, Any]:
    """Arguments of `pyard.train` for a student, but for teacher and trajectories.

    Args:
        name: in `STUDENTS`.
        budget: what it may spend.
        out: the demo's folder.
        depth: layers of the teacher.
        seed: of the training.
    """
    student = STUDENTS[name]
    run: dict[str, Any] = dict(
        out=out / student.folder,
        num_steps=NUM_STEPS,
        max_steps=budget.student_steps,
        batch_size=budget.student_batch_size,
        learning_rate=budget.student_learning_rate,
        save_every=budget.save_every,
        seed=seed,
    )
    if student.history is not None:
        run["history_layers"] = depth if student.history else 0
    if student.follows is not None:
        run |= dict(
            stage="adversarial",
            student=str(out / STUDENTS[student.follows].folder),
            adversarial={**DIGITS_DISCRIMINATORS, "warmup_steps": min(100, budget.adversarial_steps // 10)},
            max_steps=budget.adversarial_steps,
        )
    return run | student.settings


def train_side_by_side(
    teacher: str, store: Path, runs: dict[str, dict[str, Any]], progress: bool, follows: dict[str, str] | None = None
) -> None:
    """Train each student in a process of its own, on one core: a network this small gains nothing from a second one.

    One that follows another waits for it in the same process.

    Args:
        teacher: by name.
        store: folder of the trajectories.
        runs: arguments of `pyard.train` by the student's name.
        progress: show a progress bar.
        follows: for those that go on from another student, that student's name.
    """
    follows = follows or {}
    chains = [[run] for name, run in runs.items() if name not in follows]
    for name, run in runs.items():
        if name in follows:
            next(chain for chain in chains if chain[0] is runs[follows[name]]).append(run)
    chains.sort(key=len, reverse=True)
    total = sum(run["max_steps"] for run in runs.values())
    with (
        ProcessPoolExecutor(len(chains), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(
            total=total,
            desc="training all students",
            unit="step",
            disable=not progress,
        ) as bar,
    ):
        pending = {pool.submit(_train_quietly, teacher, store, chain) for chain in chains}
        while pending:
            done, pending = wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            logs = [read_log(run["out"] / "log.jsonl") for run in runs.values()]
            bar.update(sum(log[-1]["step"] for log in logs if log) - bar.n)


def _train_quietly(teacher: str, store: Path, chain: list[dict[str, Any]]) -> None:
    for run in chain:
        train(teacher, store, **run, progress=False)
