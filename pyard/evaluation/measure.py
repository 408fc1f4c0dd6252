"""Measuring ways of drawing samples side by side: same noise, same labels, same count, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from pyard.errors import InputError
from pyard.evaluation.features import Classifier, FeatureNetwork
from pyard.evaluation.frechet import GaussianStatistics, frechet_distance
from pyard.evaluation.report import Evaluation, Quality
from pyard.noise import standard_normal


@dataclass(frozen=True)
class Candidate:
    """A way of drawing samples.

    Args:
        name: of its row.
        network_passes: network passes a sample.
        draw: (noise float32 [n, C, H, W], labels int64 [n]) to samples float32 [n, C, H, W].
    """

    name: str
    network_passes: int
    draw: Callable[[np.ndarray, np.ndarray], np.ndarray]


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """0, 1, ... num_classes - 1, 0, 1, ...: int64 [count]."""
    return np.arange(count, dtype=np.int64) % num_classes


def measure(
    teacher: Candidate,
    students: Sequence[Candidate],
    *,
    data: np.ndarray,
    features: FeatureNetwork,
    sample_shape: tuple[int, ...],
    num_classes: int,
    count: int,
    seed: int,
    batch_size: int = 128,
    progress: bool = True,
) -> Evaluation:
    """Measure a teacher and its students.

    All draw `count` samples with balanced labels from the same noise. Samples are clipped to -1 ... 1, as a picture would be:
    a solver that starts where alpha = 0.006 throws one sample in hundreds far out, and unclipped these few would be the whole
    error. The teacher's reference samples come from noise of their own (seed + 1), so the teacher's own distance to them is
    not zero but what chance alone leaves.

    Args:
        teacher: whose samples the students should draw.
        students: the other rows.
        data: real images float32 [m, C, H, W], -1 to 1.
        features: what Fréchet distances are taken in; its classes give the label accuracy if it is a `Classifier`.
        sample_shape: (C, H, W).
        num_classes: labels are 0 to num_classes - 1, in turn.
        count: samples a row, at least 2; the same for all, as distances from different counts do not compare.
        seed: of the noise; not the seed of the trajectories that the students were trained on.
        batch_size: samples that are drawn, and timed, together.
        progress: show a progress bar.

    Returns:
        A row for each, the teacher's first.

    Raises:
        InputError: too few samples, or samples that are not finite.
    """
    for name, value, least in (("count", count, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise InputError(f"evaluation: {name} is {value}; expected at least {least}")
    labels = balanced_labels(count, num_classes)
    candidates = [teacher, *students]
    samples: dict[str, list[np.ndarray]] = {candidate.name: [] for candidate in candidates}
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    references = []
    with tqdm(total=count, desc="evaluating", unit="sample", disable=not progress) as bar:
        for start in range(0, count, batch_size):
            index = np.arange(start, min(start + batch_size, count))
            noise = standard_normal(seed, index, sample_shape)
            references.append(teacher.draw(standard_normal(seed + 1, index, sample_shape), labels[index]))
            # In turn, so that a busy spell of the machine hits all alike.
            for candidate in candidates:
                begin = time.perf_counter()
                samples[candidate.name].append(candidate.draw(noise, labels[index]))
                seconds[candidate.name].append((time.perf_counter() - begin) / len(index))
            bar.update(len(index))
    to_data = GaussianStatistics.of(features.features(data))
    to_teacher = GaussianStatistics.of(features.features(np.clip(np.concatenate(references), -1, 1)))
    ends = np.clip(np.concatenate(samples[teacher.name]), -1, 1)
    rows = []
    for candidate in candidates:
        drawn = np.concatenate(samples[candidate.name])
        if not np.isfinite(drawn).all():
            raise InputError(f"evaluation: samples of {candidate.name!r} contain NaN or infinity")
        clipped = np.clip(drawn, -1, 1)
        gaussian = GaussianStatistics.of(features.features(clipped))
        accuracy = float((features.classify(clipped) == labels).mean()) if isinstance(features, Classifier) else None
        rows.append(
            Quality(
                name=candidate.name,
                network_passes=candidate.network_passes,
                frechet_to_data=frechet_distance(gaussian, to_data),
                frechet_to_teacher=frechet_distance(gaussian, to_teacher),
                label_accuracy=accuracy,
                endpoint_mse=float(np.square(clipped - ends, dtype=np.float64).mean()),
                # The first batch warms up, the last one may be smaller.
                seconds_per_image=statistics.median(seconds[candidate.name][1:-1] or seconds[candidate.name]),
            )
        )
    settings = {
        "count": count,
        "seed": seed,
        "reference_seed": seed + 1,
        "labels": "balanced",
        "real_images": len(data),
        "features": features.name,
        "features_fingerprint": features.fingerprint,
        "batch_size": batch_size,
    }
    return Evaluation(tuple(rows), settings)
