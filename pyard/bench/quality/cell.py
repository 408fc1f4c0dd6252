"""One cell of the quality benchmark: train a student, measure it, keep the numbers.

S num_steps
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from pyard.bench.quality.plan import TEXT, Budget, Cell
from pyard.bench.quality.subjects import load_subject
from pyard.bench.quality.text_workshop import TextWorkshop
from pyard.bench.quality.workshop import Workshop
from pyard.cost.flops import without_weights
from pyard.estimate.update_cost import stage_flops
from pyard.models.folder import WEIGHTS_NAME
from pyard.models.lora import add_lora
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig
from pyard.sampling.exposure_bias import exposure_bias
from pyard.storage.checkpoints import Checkpoints
from pyard.storage.files import file_sha256, write_text
from pyard.storage.reading import read_object
from pyard.training import TrainConfig, train
from pyard.trajectories import TrajectoryReader, TrajectoryStore


def open_workshop(subject: str, budget: Budget, folder: Path, quick: bool, progress: bool = False) -> Workshop:
    """The place where a subject's cells are made; trains its teacher the first time."""
    folder = folder / subject
    folder.mkdir(parents=True, exist_ok=True)
    kind = TextWorkshop if subject == TEXT else Workshop
    return kind(load_subject(subject, folder, quick, progress), budget, folder)


def run_cell(workshop: Workshop, cell: Cell) -> dict[str, Any]:
    """Train and measure a student, unless `result.json` has it already; what was stopped goes on where it was."""
    budget = workshop.budget
    settings = train_settings(cell, budget, workshop)
    folder = workshop.folder_of(cell)
    done = valid_result(workshop, cell)
    if done is not None:
        return done
    if (folder / "result.json").exists():
        shutil.rmtree(folder)
    begin = time.perf_counter()
    store = workshop.store(cell.setting.num_steps, cell.seed, cell.setting.guided)
    begun = max(Checkpoints(folder / "run" / "checkpoints").steps(), default=0)
    trained = time.perf_counter()
    student = train(workshop.subject.teacher, store, out=folder / "run", **settings)
    seconds = time.perf_counter() - trained
    samples = workshop.draw(student)
    held_out = workshop.held_out(cell.setting.num_steps, cell.setting.guided)
    bias = exposure_bias(student, _batches(held_out, student))
    result: dict[str, Any] = {
        "identity": identity_of(workshop, cell),
        "subject": cell.subject,
        "setting": cell.setting.name,
        "seed": cell.seed,
        "num_steps": student.num_steps,
        "history_layers": student.config.history_layers,
        "updates": settings["max_steps"],
        **workshop.measure(samples, folder),
        "exposure_bias": dataclasses.asdict(bias),
        "training_flops": training_flops(workshop, settings, student.config),
        # While other cells were trained beside it.
        "training_samples_per_second": None if begun else settings["max_steps"] * budget.batch_size / seconds,
        "seconds": time.perf_counter() - begin,
    }
    text = json.dumps(result, indent=1) + "\n"
    write_text(folder / "result.json", text)
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    return dict(json.loads(text))


def identity_of(workshop: Workshop, cell: Cell) -> dict[str, Any]:
    """All that decides a cell's numbers, JSON-able; the student that it goes on from has to be there."""
    settings = train_settings(cell, workshop.budget, workshop)
    decisive = {k: v for k, v in settings.items() if k != "student"}
    if cell.setting.base is not None:
        # By name: the folder of the benchmark may have been copied from another machine.
        decisive["adversarial"] = {**settings["adversarial"], "real": Path(settings["adversarial"]["real"]).name}
    identity = {
        **workshop.identity(),
        "settings": decisive,
        "student": None if cell.setting.base is None else file_sha256(Path(settings["student"]) / "student" / WEIGHTS_NAME),
    }
    if not cell.setting.guided:
        identity["guided"] = False
    return dict(json.loads(json.dumps(identity)))


def valid_result(workshop: Workshop, cell: Cell) -> dict[str, Any] | None:
    """A cell's numbers, if it is done and is what it would be today."""
    done = read_result(workshop.folder_of(cell) / "result.json")
    if done is None:
        return None
    try:
        return done if done["identity"] == identity_of(workshop, cell) else None
    except FileNotFoundError:  # the student that it went on from
        return None


def training_flops(workshop: Workshop, settings: dict[str, Any], student: StudentConfig) -> float:
    """Of all updates: the student's, its rollouts', the discriminators'."""
    config = TrainConfig.of({"teacher": "", "out": Path(), **settings})
    network = workshop.subject.teacher.network
    weightless = without_weights(network)
    made = Student(student, *weightless.trunk.for_student(weightless.head)).requires_grad_(True)
    if student.base is not None:
        add_lora(made, student.base.rank, student.base.heads)
    conditions = workshop.conditions
    one = conditions.take(range(min(conditions.count, config.batch_size))).index(slice(0, 1))  # as long as in a batch
    return stage_flops(config, network, made, one)


def read_result(path: Path) -> dict[str, Any] | None:
    """A cell's numbers, if it is done."""
    return read_object(path, "the numbers of a cell", finite=False) if path.exists() else None


def train_settings(cell: Cell, budget: Budget, workshop: Workshop) -> dict[str, Any]:
    """All settings of a cell's `pyard.train`."""
    setting = cell.setting
    updates = max(1, round(budget.updates * setting.updates))
    settings: dict[str, Any] = {
        "max_steps": updates,
        "batch_size": budget.batch_size,
        "learning_rate": budget.learning_rate,
        "save_every": max(1, min(500, updates)),
        "seed": cell.seed,
        "progress": False,
        "num_steps": setting.num_steps,
        **budget.train,
    }
    if setting.base is not None:
        settings["student"] = str(workshop.folder / setting.base / f"seed-{cell.seed}" / "run")
        own = setting.train.get("adversarial", {})
        settings |= {**setting.train, "adversarial": {**budget.adversarial, **own, "real": workshop.real_data(cell.seed)}}
    else:
        settings["history_layers"] = setting.history_layers(workshop.subject.teacher.network.config.depth)
        settings |= {"history_bias": None, **setting.train}  # a setting that has one says so
    if settings.get("rollout_probability"):
        settings["rollout_start"] = updates // 2
    return settings


def _batches(store: TrajectoryStore, student: Student) -> Any:
    size = math.gcd(store.count, 256)
    reader = TrajectoryReader(store, size, target=student.config.target)
    for first in range(0, store.count, size):
        yield reader.gather(np.arange(first, first + size))
