"""Where a subject's students are made and measured: its trajectories, its teacher's samples, its measures.

n samples · F features · S num_steps
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from pyard.bench.quality.plan import Budget, Cell
from pyard.bench.quality.subjects import TEACHER_STEPS, Subject
from pyard.conditions import Conditions
from pyard.diffusion.noise import standard_normal
from pyard.evaluation.evaluate_students import DEFAULT_SEED
from pyard.evaluation.features import Classifier
from pyard.evaluation.frechet import GaussianStatistics, frechet_distance
from pyard.evaluation.measure import balanced_labels
from pyard.evaluation.neighbours import precision_recall
from pyard.models.student import Student
from pyard.storage.files import new_file
from pyard.teachers.guidance import endpoints
from pyard.trajectories import TrajectoryStore, generate_trajectories

DRAWN_TOGETHER = 500
FEATURES_NAME = "features.npy"
_HELD_OUT_SEED = 3000


@dataclass(frozen=True)
class Workshop:
    """Where a subject's cells are made: the subject, its budget and its folder."""

    subject: Subject
    budget: Budget
    folder: Path

    def folder_of(self, cell: Cell) -> Path:
        """Of a cell's student and results."""
        return self.folder / cell.setting.name / f"seed-{cell.seed}"

    def store(self, num_steps: int, seed: int, guided: bool = True) -> TrajectoryStore:
        """The trajectories that students of S steps and a seed learn from."""
        return self._trajectories(num_steps, self.budget.trajectories, seed, f"S{num_steps}-seed-{seed}", guided)

    def held_out(self, num_steps: int, guided: bool = True) -> TrajectoryStore:
        """Trajectories that nobody learns from."""
        return self._trajectories(num_steps, self.budget.held_out, _HELD_OUT_SEED, f"S{num_steps}-held-out", guided)

    def _trajectories(self, num_steps: int, count: int, seed: int, name: str, guided: bool) -> TrajectoryStore:
        path = self.folder / "trajectories" / (name if guided else f"{name}-unguided")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            return generate_trajectories(
                self.subject.teacher,
                path,
                count,
                num_steps=num_steps,
                teacher_steps=self.teacher_steps,
                cfg_scale=self.subject.cfg_scale if guided else 1.0,
                seed=seed,
                batch_size=min(256, count),
                prompts=self.prompts_of(seed, count),
                progress=False,
            )

    @property
    def teacher_steps(self) -> int:
        """Of the teacher's solver."""
        return TEACHER_STEPS

    def prompts_of(self, seed: int, count: int) -> list[str] | None:
        """The prompts of a seed's trajectories; None: the teacher is of classes."""
        return None

    @property
    def conditions(self) -> Conditions:
        """The table that the labels of the measured samples are rows of."""
        return self.subject.teacher.conditions

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
        for start in range(0, len(noise), DRAWN_TOGETHER):
            piece = slice(start, start + DRAWN_TOGETHER)
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

    def real_data(self, seed: int) -> str:
        """What the adversarial stage reads real data from; only with prompts it depends on the seed of the trajectories."""
        if self.subject.name == "digits":
            return "digits"
        path = self.folder / "real.npz"
        with FileLock(path.with_name("real.lock")):
            if not path.exists():
                images, labels = self.subject.data(self.budget.trajectories)
                with new_file(path) as partial, partial.open("wb") as file:
                    np.savez(file, images=images, labels=labels)
        return str(path)

    def draw(self, student: Student, count: int | None = None) -> np.ndarray:
        """A student's samples of the benchmark's noise and labels: float32 [n, C, H, W]."""
        noise, labels, drawn = self.noise()[:count], self.labels[:count], []
        device = student.embed_times.device
        with torch.inference_mode():
            for start in range(0, len(noise), DRAWN_TOGETHER):
                piece = slice(start, start + DRAWN_TOGETHER)
                condition = self.conditions.take(labels[piece]).to(device)
                *_, last = student.rollout(torch.from_numpy(noise[piece]).to(device), condition)
                drawn.append(last.float().cpu().numpy())
        return np.clip(np.concatenate(drawn), *self.limits)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of all cells beside their own settings."""
        return {
            "teacher": self.subject.teacher.fingerprint,
            "features": self.subject.features.fingerprint,
            "budget": {name: getattr(self.budget, name) for name in ("trajectories", "samples", "held_out")},
        }

    def measure(self, samples: np.ndarray, folder: Path | None = None) -> dict[str, Any]:
        """What tells how good samples [n, C, H, W] of the benchmark's noise and labels are.

        Args:
            samples: what `draw` drew.
            folder: where to leave what the report needs of each sample; None: nowhere.
        """
        features, references = self.subject.features, self.references
        seen = features.features(samples)
        if folder is not None:
            np.save(folder / FEATURES_NAME, seen.astype(np.float32))
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
