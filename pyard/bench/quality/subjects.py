"""What students of the quality benchmark are made of and measured by: a teacher, real data, and features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from pyard.bench.quality.plan import TEXT
from pyard.data.captioned_scenes import scene_batch
from pyard.data.captioned_scenes.tokenizer import MAX_TOKENS
from pyard.data.digits import digits_data
from pyard.data.mixture import mixture_2d, mixture_16
from pyard.data.scenes import scenes_data
from pyard.evaluation.captioned_scenes import DATA_SEED
from pyard.evaluation.features import FeatureNetwork, digits_classifier
from pyard.evaluation.measure import balanced_labels
from pyard.evaluation.scene_features import MixtureFeatures, ObjectCounter, object_counter, scenes_classifier
from pyard.teachers import load_teacher, scenes
from pyard.teachers.digits import digits_teacher, teach
from pyard.teachers.mixture_teacher import fit
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.teachers.scenes_text import teach as teach_scenes_text
from pyard.teachers.teaching import teaching_device

# Samples of data are drawn from a seed of their own; trajectories count theirs from 0, evaluation its noise from 1000.
_DATA_SEED = 2000
TEACHER_STEPS = 25


@dataclass(frozen=True)
class Subject:
    """A teacher and what its students are compared with.

    Args:
        name: of the subject.
        teacher: whose network students start from, and whose `predict` makes the trajectories.
        cfg_scale: of its trajectories.
        data: (count) to real samples float32 [m, C, H, W] and labels int64 [m]; m is `count`, or less where there are no more.
        features: what Fréchet distances, precision and recall are taken in.
    """

    name: str
    teacher: NetworkTeacher
    cfg_scale: float
    data: Callable[[int], tuple[np.ndarray, np.ndarray]]
    features: FeatureNetwork


def load_subject(name: str, folder: Path, quick: bool = False, progress: bool = False) -> Subject:
    """A subject; what has to be trained is trained into `folder` the first time.

    Args:
        name: `digits`, `mixture-2d`, `mixture-16`, `scenes` or `scenes-text`.
        folder: of the subject's own files.
        quick: with a teacher of next to no training.
        progress: show progress bars.
    """
    if name == "digits":
        teacher = digits_teacher(progress) if not quick else teach(
            folder / "teacher", max_steps=200, depth=2, batch_size=32, learning_rate=4e-3, ema_decay=0.98, progress=progress
        )  # fmt: skip
        return Subject(name, teacher, 1.5, lambda count: _first(digits_data(), count), digits_classifier())
    if name == "scenes":
        return _scenes(folder, quick, progress)
    if name == TEXT:
        return _scenes_text(folder, quick, progress)
    return _mixture(name, folder, quick, progress)


def _first(data: tuple[np.ndarray, np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    return data[0][:count], data[1][:count]


def _scenes(folder: Path, quick: bool, progress: bool) -> Subject:
    small = {"max_steps": 20, "hidden_size": 32, "depth": 2, "num_heads": 2, "batch_size": 16} if quick else {}
    teacher = scenes.teach(folder / "teacher", progress=progress, **small).to(teaching_device())

    def data(count: int) -> tuple[np.ndarray, np.ndarray]:
        return scenes_data(_DATA_SEED, np.arange(count), balanced_labels(count, teacher.conditions.count))

    return Subject("scenes", teacher, 1.5, data, scenes_classifier())


def _scenes_text(folder: Path, quick: bool, progress: bool) -> Subject:
    source: str | Path = TEXT
    if quick:
        source = teach_scenes_text(
            folder / "teacher", max_steps=2, hidden_size=32, depth=2, num_heads=1, text_hidden_size=32, text_depth=1,
            batch_size=16, progress=progress,
        )  # fmt: skip
    teacher = load_teacher(source, max_sequence_length=MAX_TOKENS).to(teaching_device())
    # Kept beside the students: another machine, which would train another network, goes on with this one.
    features = folder / "features.safetensors"
    with FileLock(features.with_name("features.lock")):
        if not features.exists():
            object_counter(**({"steps": 10} if quick else {})).save(features)

    def data(count: int) -> tuple[np.ndarray, np.ndarray]:
        return scene_batch(DATA_SEED, range(count)).pictures, np.arange(count)

    # The guidance that benchmarks/results/scenes-teacher.json has the teacher's own adherence at.
    return Subject(TEXT, teacher, 2.0, data, ObjectCounter.load(features))


def _mixture(name: str, folder: Path, quick: bool, progress: bool) -> Subject:

    mixture, patch_size = (mixture_2d(), 1) if name == "mixture-2d" else (mixture_16(), 4)
    steps = {"max_steps": 100, "depth": 2} if quick else {}
    teacher = fit(mixture, folder / "teacher", patch_size=patch_size, progress=progress, **steps)

    def data(count: int) -> tuple[np.ndarray, np.ndarray]:
        return mixture.sample(_DATA_SEED, np.arange(count), balanced_labels(count, mixture.num_classes))

    return Subject(name, teacher, 1.0, data, MixtureFeatures(mixture))
