"""One cell of the quality benchmark: train a student, measure it, keep the numbers.

n samples · F features · S num_steps
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from pyard.bench.quality.plan import Budget, Cell
from pyard.bench.quality.subjects import TEACHER_STEPS, Subject, load_subject
from pyard.cost.flops import without_weights
from pyard.diffusion.noise import standard_normal
from pyard.estimate.update_cost import stage_flops
from pyard.evaluation.evaluate_students import DEFAULT_SEED
from pyard.evaluation.features import Classifier
from pyard.evaluation.frechet import GaussianStatistics, frechet_distance
from pyard.evaluation.measure import balanced_labels
from pyard.evaluation.neighbours import precision_recall
from pyard.models.folder import WEIGHTS_NAME
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig
from pyard.sampling.exposure_bias import exposure_bias
from pyard.storage.checkpoints import Checkpoints
from pyard.storage.files import file_sha256, new_file, write_text
from pyard.teachers.guidance import endpoints
from pyard.training import TrainConfig, train
from pyard.trajectories import TrajectoryReader, TrajectoryStore, generate_trajectories

_DRAWN_TOGETHER = 500
_HELD_OUT_SEED = 3000


@dataclass(frozen=True)
class Workshop:
    """Where a subject's cells are made: the subject, its budget and its folder."""

    subject: Subject
    budget: Budget
    folder: Path

    def store(self, num_steps: int, seed: int) -> TrajectoryStore:
        """The trajectories that students of S steps and a seed learn from."""
        return self._trajectories(num_steps, self.budget.trajectories, seed, f"S{num_steps}-seed-{seed}")

    def held_out(self, num_steps: int) -> TrajectoryStore:
        """Trajectories that nobody learns from."""
        return self._trajectories(num_steps, self.budget.held_out, _HELD_OUT_SEED, f"S{num_steps}-held-out")

    def _trajectories(self, num_steps: int, count: int, seed: int, name: str) -> TrajectoryStore:
        path = self.folder / "trajectories" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(name + ".lock")):
            return generate_trajectories(
                self.subject.teacher,
                path,
                count,
                num_steps=num_steps,
                teacher_steps=TEACHER_STEPS,
                cfg_scale=self.subject.cfg_scale,
                seed=seed,
                batch_size=min(256, count),
                progress=False,
            )

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Balanced labels of the samples that are measured: int64 [n]."""
        return balanced_labels(self.budget.samples, self.subject.teacher.conditions.count)

    def noise(self, seed: int = DEFAULT_SEED) -> np.ndarray:
        """Their noise, float32 [n, C, H, W]."""
        return standard_normal(seed, np.arange(self.budget.samples), self.subject.teacher.sample_shape)

    def teacher_samples(self) -> dict[str, np.ndarray]:
        """The teacher's endpoints of that noise, `ends`, and of other noise, `reference`; drawn once."""
        path = self.folder / "teacher-samples.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name("teacher-samples.lock")):
            kept = self._kept_samples(path)
            if kept is None:
                kept = {"ends": self._endpoints(DEFAULT_SEED), "reference": self._endpoints(DEFAULT_SEED + 1)}
                with new_file(path) as partial, partial.open("wb") as file:
                    teacher = np.array(self.subject.teacher.fingerprint)
                    np.savez(file, ends=kept["ends"], reference=kept["reference"], teacher=teacher)
        return kept

    def _kept_samples(self, path: Path) -> dict[str, np.ndarray] | None:
        """What a file has of this teacher and so many; None if it has not."""
        if not path.exists():
            return None
        with np.load(path) as file:
            if str(file.get("teacher", "")) != self.subject.teacher.fingerprint or len(file["ends"]) != self.budget.samples:
                return None
            return {name: file[name] for name in ("ends", "reference")}

    def _endpoints(self, seed: int) -> np.ndarray:
        teacher, drawn = self.subject.teacher, []
        noise = self.noise(seed)
        for start in range(0, len(noise), _DRAWN_TOGETHER):
            piece = slice(start, start + _DRAWN_TOGETHER)
            arrays = (torch.from_numpy(noise[piece]), torch.from_numpy(self.labels[piece]))
            x, labels = (tensor.to(teacher.device) for tensor in arrays)
            drawn.append(endpoints(teacher, x, labels, TEACHER_STEPS, cfg_scale=self.subject.cfg_scale).float().cpu().numpy())
        return np.clip(np.concatenate(drawn), *self.limits)

    @property
    def limits(self) -> tuple[float, float]:
        """Samples are clipped as pictures are: an ODE that starts where alpha = 0.006 throws one in hundreds far out."""
        return (-1.0, 1.0) if self.subject.name in ("digits", "scenes") else (-4.0, 4.0)

    @functools.cached_property
    def references(self) -> dict[str, Any]:
        """Features and statistics that every row is compared with."""
        samples, features = self.teacher_samples(), self.subject.features
        data = features.features(self.subject.data(self.budget.samples)[0])
        return {
            "ends": samples["ends"],
            "data": data,
            "to_data": GaussianStatistics.of(data),
            "to_teacher": GaussianStatistics.of(features.features(samples["reference"])),
        }

    def real_data(self) -> str:
        """What the adversarial stage reads real data from."""
        if self.subject.name == "digits":
            return "digits"
        path = self.folder / "real.npz"
        with FileLock(path.with_name("real.lock")):
            if not path.exists():
                images, labels = self.subject.data(self.budget.trajectories)
                with new_file(path) as partial, partial.open("wb") as file:
                    np.savez(file, images=images, labels=labels)
        return str(path)

    def measure(self, samples: np.ndarray) -> dict[str, Any]:
        """What tells how good samples [n, C, H, W] of the benchmark's noise and labels are."""
        features, references = self.subject.features, self.references
        seen = features.features(samples)
        gaussian = GaussianStatistics.of(seen)
        precision, recall = precision_recall(references["data"], seen)
        found: dict[str, Any] = {
            "frechet_to_data": frechet_distance(gaussian, references["to_data"]),
            "frechet_to_teacher": frechet_distance(gaussian, references["to_teacher"]),
            "precision": precision,
            "recall": recall,
            "endpoint_mse": float(np.square(samples - references["ends"], dtype=np.float64).mean()),
        }
        if isinstance(features, Classifier):
            found["label_accuracy"] = float((features.classify(samples) == self.labels).mean())
        return found


def open_workshop(subject: str, budget: Budget, folder: Path, quick: bool, progress: bool = False) -> Workshop:
    """The place where a subject's cells are made; trains its teacher the first time."""
    folder = folder / subject
    folder.mkdir(parents=True, exist_ok=True)
    return Workshop(load_subject(subject, folder, quick, progress), budget, folder)


def run_cell(workshop: Workshop, cell: Cell) -> dict[str, Any]:
    """Train and measure a student, unless `result.json` has it already; what was stopped goes on where it was."""
    budget = workshop.budget
    settings = train_settings(cell, budget, workshop)
    folder = workshop.folder / cell.setting.name / f"seed-{cell.seed}"
    done = valid_result(workshop, cell)
    if done is not None:
        return done
    if (folder / "result.json").exists():
        shutil.rmtree(folder)
    begin = time.perf_counter()
    store = workshop.store(cell.setting.num_steps, cell.seed)
    begun = max(Checkpoints(folder / "run" / "checkpoints").steps(), default=0)
    trained = time.perf_counter()
    student = train(workshop.subject.teacher, store, out=folder / "run", **settings)
    seconds = time.perf_counter() - trained
    samples = draw(workshop, student)
    np.save(folder / "features.npy", workshop.subject.features.features(samples).astype(np.float32))
    bias = exposure_bias(student, _batches(workshop.held_out(cell.setting.num_steps), student))
    result: dict[str, Any] = {
        "identity": identity_of(workshop, cell),
        "subject": cell.subject,
        "setting": cell.setting.name,
        "seed": cell.seed,
        "num_steps": student.num_steps,
        "history_layers": student.config.history_layers,
        "updates": settings["max_steps"],
        **workshop.measure(samples),
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
    identity = {
        "teacher": workshop.subject.teacher.fingerprint,
        "features": workshop.subject.features.fingerprint,
        "budget": {name: getattr(workshop.budget, name) for name in ("trajectories", "samples", "held_out")},
        "settings": {k: v for k, v in settings.items() if k != "student"},
        "student": None if cell.setting.base is None else file_sha256(Path(settings["student"]) / "student" / WEIGHTS_NAME),
    }
    return dict(json.loads(json.dumps(identity)))


def valid_result(workshop: Workshop, cell: Cell) -> dict[str, Any] | None:
    """A cell's numbers, if it is done and is what it would be today."""
    done = read_result(workshop.folder / cell.setting.name / f"seed-{cell.seed}" / "result.json")
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
    ghost = without_weights(network)
    made = Student(student, *ghost.trunk.for_student(ghost.head)).requires_grad_(True)
    return stage_flops(config, network, made)


def read_result(path: Path) -> dict[str, Any] | None:
    """A cell's numbers, if it is done."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


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
        settings |= {**setting.train, "adversarial": {**budget.adversarial, **own, "real": workshop.real_data()}}
    else:
        settings["history_layers"] = setting.history_layers(workshop.subject.teacher.network.config.depth)
        settings |= {"history_bias": None, **setting.train}  # a setting that has one says so
    if settings.get("rollout_probability"):
        settings["rollout_start"] = updates // 2
    return settings


def draw(workshop: Workshop, student: Student, count: int | None = None) -> np.ndarray:
    """A student's samples of the benchmark's noise and labels: float32 [n, C, H, W]."""
    noise, labels, drawn = workshop.noise()[:count], workshop.labels[:count], []
    device = student.embed_times.device
    with torch.inference_mode():
        for start in range(0, len(noise), _DRAWN_TOGETHER):
            piece = slice(start, start + _DRAWN_TOGETHER)
            *_, last = student.rollout(torch.from_numpy(noise[piece]).to(device), torch.from_numpy(labels[piece]).to(device))
            drawn.append(last.float().cpu().numpy())
    return np.clip(np.concatenate(drawn), *workshop.limits)


def _batches(store: TrajectoryStore, student: Student) -> Any:
    size = math.gcd(store.count, 256)
    reader = TrajectoryReader(store, size, target=student.config.target)
    for first in range(0, store.count, size):
        yield reader.gather(np.arange(first, first + size))
