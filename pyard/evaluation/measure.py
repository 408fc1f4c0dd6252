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

TIMED_BATCH_SIZE = 64
TIMED_BATCHES = 7


@dataclass(frozen=True)
class Candidate:
    """A way of drawing samples.

    Args:
        name: of its row.
        network_passes: network passes a sample.
        draw: (labels int64 [n], seed) to samples float32 [n, C, H, W]; sample i starts from `pyard.noise`'s noise i.
    """

    name: str
    network_passes: int
    draw: Callable[[np.ndarray, int], np.ndarray]


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """0, 1, ... num_classes - 1, 0, 1, ...: int64 [count]."""
    return np.arange(count, dtype=np.int64) % num_classes


def measure(
    teacher: Candidate,
    students: Sequence[Candidate],
    *,
    data: np.ndarray,
    features: FeatureNetwork,
    num_classes: int,
    count: int,
    seed: int,
    progress: bool = True,
) -> Evaluation:
    """Measure a teacher and its students.

    All draw `count` samples with balanced labels from the same noise. Samples are clipped to -1 ... 1 before features are
    taken, not before the endpoint error is. The teacher's reference samples come from noise of their own (seed + 1), so the
    teacher's own distance to them is not zero but what chance alone leaves.

    Args:
        teacher: whose samples the students should draw.
        students: the other rows.
        data: real images float32 [m, C, H, W], -1 to 1.
        features: what Fréchet distances are taken in; its classes give the label accuracy if it is a `Classifier`.
        num_classes: of the teacher.
        count: samples a row, at least 2; the same for all, as distances from different counts do not compare.
        seed: of the noise; not the seed of the trajectories that the students were trained on.
        progress: show a progress bar.

    Returns:
        A row for each, the teacher's first.

    Raises:
        InputError: too few samples, or samples that are not finite.
    """
    if count < 2:
        raise InputError(f"evaluation: count is {count}; expected at least 2")
    labels = balanced_labels(count, num_classes)
    candidates = [teacher, *students]
    with tqdm(total=len(candidates) + 2, desc="evaluating", unit="row", disable=not progress) as bar:
        to_data = GaussianStatistics.of(features.features(data))
        reference = GaussianStatistics.of(features.features(np.clip(teacher.draw(labels, seed + 1), -1, 1)))
        bar.update()
        samples = []
        for candidate in candidates:
            samples.append(candidate.draw(labels, seed))
            bar.update()
        seconds = time_in_turn(candidates, labels[:TIMED_BATCH_SIZE], seed)
        bar.update()
    rows = []
    for candidate, drawn in zip(candidates, samples, strict=True):
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
                frechet_to_teacher=frechet_distance(gaussian, reference),
                label_accuracy=accuracy,
                endpoint_mse=float(np.square(drawn - samples[0], dtype=np.float64).mean()),
                seconds_per_image=seconds[candidate.name],
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
        "timed_batch_size": min(TIMED_BATCH_SIZE, count),
        "timed_batches": TIMED_BATCHES,
    }
    return Evaluation(tuple(rows), settings)


def time_in_turn(candidates: Sequence[Candidate], labels: np.ndarray, seed: int) -> dict[str, float]:
    """Median seconds per sample of each candidate; they take turns, so that a busy spell of the machine hits all alike."""
    taken: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for _ in range(1 + TIMED_BATCHES):
        for candidate in candidates:
            begin = time.perf_counter()
            candidate.draw(labels, seed)
            taken[candidate.name].append((time.perf_counter() - begin) / len(labels))
    return {name: statistics.median(values[1:]) for name, values in taken.items()}  # the first batch warms up
