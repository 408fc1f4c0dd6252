"""Where students of captioned scenes are made and measured: by prompts, and by how exactly pictures follow them.

n prompts · P side of a picture in pixels · S num_steps
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock

from pyard.bench.quality.workshop import DRAWN_TOGETHER, Workshop
from pyard.conditions import PromptLine, PromptTable
from pyard.data.captioned_scenes import SceneSetting, follow_prompts, scene_batch
from pyard.diffusion.scheduler_times import Visits
from pyard.evaluation.captioned_scenes import PromptSet, judge, shares
from pyard.evaluation.scene_features import ObjectCounter
from pyard.storage.arrays import read_npz
from pyard.storage.files import new_file
from pyard.teachers.guidance import endpoints
from pyard.teachers.text_to_image.teacher import PipelineTeacher

PICTURED = 8
FOLLOWED_NAME, PICTURES_NAME = "followed.npy", "pictures.npy"
_TEACHER_STEPS = 20  # a multiple of every S


class Reference(NamedTuple):
    """A way in which the teacher itself draws.

    Args:
        title: in tables.
        num_steps: of its solver.
        guided: by the subject's guidance, for which every step is two passes.
    """

    title: str
    num_steps: int
    guided: bool = True

    @property
    def passes(self) -> int:
        """Of the network for a picture."""
        return self.num_steps * (2 if self.guided else 1)


REFERENCES = {
    "teacher": Reference(f"teacher, {_TEACHER_STEPS} steps", _TEACHER_STEPS),
    "teacher-S4": Reference("teacher, 4 steps", 4),
    "teacher-unguided": Reference(f"teacher, {_TEACHER_STEPS} steps without guidance", _TEACHER_STEPS, guided=False),
}


@dataclass(frozen=True)
class TextWorkshop(Workshop):
    """A workshop whose conditions are prompts of captioned scenes, which the teacher has to have been trained on."""

    @property
    def teacher(self) -> PipelineTeacher:
        """The subject's, without prompts."""
        teacher = self.subject.teacher
        assert isinstance(teacher, PipelineTeacher)
        return teacher

    @property
    def setting(self) -> SceneSetting:
        """Of the scenes."""
        return SceneSetting(size=self.teacher.sample_shape[-1])

    @property
    def teacher_steps(self) -> int:
        """Of the teacher's solver."""
        return _TEACHER_STEPS

    @property
    def limits(self) -> tuple[float, float]:
        """Of a picture's values."""
        return -1.0, 1.0

    @functools.cached_property
    def prompts(self) -> PromptSet:
        """The prompts that are measured."""
        return PromptSet.draw(self.budget.samples, self.setting)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Their numbers: int64 [n]."""
        return np.arange(self.budget.samples)

    @functools.cached_property
    def conditions(self) -> PromptTable:
        """Their embeddings."""
        lines = [PromptLine(caption) for caption in self.prompts.captions]
        folder = self.folder / f"prompts-{len(lines)}"
        return PromptTable.build(self.teacher.text_encoder, lines, folder, progress=False)

    def prompts_of(self, seed: int, count: int) -> list[str]:
        """Captions of the training split, one for each trajectory of a seed."""
        return list(scene_batch(seed, range(count), self.setting).captions)

    def real_data(self, seed: int) -> str:
        """The scenes that the captions of a seed's trajectories were written for, numbered as those are."""
        path = self.folder / f"real-seed-{seed}.npz"
        with FileLock(path.with_name(path.name + ".lock")):
            if not path.exists():
                count = self.budget.trajectories
                pictures = scene_batch(seed, range(count), self.setting).pictures
                with new_file(path) as partial, partial.open("wb") as file:
                    np.savez(file, images=pictures, labels=np.arange(count))
        return str(path)

    def teacher_samples(self) -> dict[str, np.ndarray]:
        """The teacher's endpoints of the measured noise, `ends`; drawn once."""
        return {"ends": self.reference("teacher")}

    def reference(self, name: str) -> np.ndarray:
        """What the teacher itself draws, drawn once: float32 [n, 3, P, P].

        Args:
            name: in `REFERENCES`.
        """
        path = self.folder / "references" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            if path.exists():
                kept = read_npz(path)
                if str(kept["teacher"]) == self.teacher.fingerprint and len(kept["pictures"]) == self.budget.samples:
                    return kept["pictures"]
            pictures = self._drawn(REFERENCES[name])
            with new_file(path) as partial, partial.open("wb") as file:
                np.savez(file, pictures=pictures, teacher=np.array(self.teacher.fingerprint))
        return pictures

    def _drawn(self, reference: Reference) -> np.ndarray:
        teacher, noise, drawn = self.teacher.with_prompts(self.conditions), self.noise(), []
        visits: Visits = teacher.visits(reference.num_steps, teacher.sample_shape)
        for start in range(0, len(noise), DRAWN_TOGETHER):
            piece = slice(start, start + DRAWN_TOGETHER)
            x, numbers = (torch.from_numpy(array[piece]).to(teacher.device) for array in (noise, self.labels))
            scale = self.subject.cfg_scale if reference.guided else 1.0
            drawn.append(endpoints(teacher, x, numbers, visits, cfg_scale=scale, solver=teacher.solver).float().cpu().numpy())
        return np.clip(np.concatenate(drawn), *self.limits)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of all cells beside their own settings."""
        return {
            **super().identity(),
            "text_encoder": self.teacher.text_encoder.fingerprint,
            "guidance": self.subject.cfg_scale,
            "teacher_steps": _TEACHER_STEPS,
        }

    def measure(self, samples: np.ndarray, folder: Path | None = None) -> dict[str, Any]:
        """What tells how well pictures [n, 3, P, P] of the measured noise follow their prompts, and how close they are.

        Args:
            samples: the pictures.
            folder: where to leave which prompts were followed, and a few of the pictures.
        """
        features = self.subject.features
        assert isinstance(features, ObjectCounter)
        followed = follow_prompts(samples, self.prompts.prompts, self.setting)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / FOLLOWED_NAME, followed)
            np.save(folder / PICTURES_NAME, samples[list(self.prompts.examples(PICTURED))])
        found = judge(
            "",
            samples,
            self.prompts,
            passes=0,
            milliseconds=0.0,
            teacher=self.teacher_samples()["ends"],
            setting=self.setting,
            features=features,
            followed=followed,
        )
        return {
            "by_category": shares(found.by_category),
            "by_split": shares(found.by_split),
            "frechet_to_data": found.frechet,
            "error": found.error,
        }
