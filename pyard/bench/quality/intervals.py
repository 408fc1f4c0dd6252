"""Bootstrap intervals: of the degradation ratio, the paper's headline, and of a change in how many prompts are followed.

n samples · F features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pyard.evaluation.frechet import GaussianStatistics, frechet_distance

_LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and the bootstrap's percentile interval around it.

    Args:
        value: from all samples and seeds.
        low, high: 2.5 % and 97.5 % of the resampled values.
        resamples: how many those are.
    """

    value: float
    low: float
    high: float
    resamples: int

    def __str__(self) -> str:
        return f"{self.value:.2f} (95 % interval {self.low:.2f} to {self.high:.2f}, {self.resamples} resamples)"

    def to_json(self) -> dict[str, float]:
        """A JSON-able dictionary."""
        return asdict(self)


def degradation_ratio(
    data: np.ndarray,  # [m, F]
    teacher: np.ndarray,  # [n, F]
    students: Sequence[Sequence[np.ndarray]],  # a pair (step distillation, ARD), each [n, F], for every seed
    resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """(step distillation - teacher) / (ARD - teacher), the ratio of what two students lose on their teacher.

    In Fréchet distances to the data. Seeds and samples are resampled together; a student's sample and the
    teacher's of the same noise stay a pair. Where ARD is as good as its teacher the ratio has no bound: look at the distances.

    Args:
        data: features of real samples.
        teacher: features of the teacher's samples.
        students: features of both students' samples of the same noise, by seed.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    random = np.random.default_rng(seed)
    everything = np.arange(len(teacher))
    value = _ratio(data, teacher, students, everything)
    drawn = []
    for _ in range(resamples):
        chosen = [students[i] for i in random.integers(len(students), size=len(students))]
        rows = random.integers(len(teacher), size=len(teacher))
        real = data[random.integers(len(data), size=len(data))]
        drawn.append(_ratio(real, teacher, chosen, rows))
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(value, float(low), float(high), resamples)


def paired_difference(
    ours: Sequence[np.ndarray],  # [n], for every seed
    theirs: Sequence[np.ndarray],  # [n], of the same seeds
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """How much larger the mean of `ours` is, where both have the same seeds and samples.

    Seeds and samples are resampled together, as in `degradation_ratio`; of one seed, the samples alone.

    Args:
        ours, theirs: numbers or answers, by seed and sample.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    differences = np.stack(ours).astype(np.float64) - np.stack(theirs)  # [seeds, n]
    random = np.random.default_rng(seed)
    seeds, n = differences.shape
    drawn = [
        differences[random.integers(seeds, size=seeds)].mean(axis=0)[random.integers(n, size=n)].mean()
        for _ in range(resamples)
    ]
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(float(differences.mean()), float(low), float(high), resamples)


def _ratio(data: np.ndarray, teacher: np.ndarray, students: Sequence[Sequence[np.ndarray]], rows: np.ndarray) -> float:
    to_data = GaussianStatistics.of(data)

    def distance(features: np.ndarray) -> float:
        return frechet_distance(GaussianStatistics.of(features[rows]), to_data)

    floor = distance(teacher)
    losses = np.array([[distance(features) - floor for features in pair] for pair in students]).mean(axis=0)
    return float(losses[0] / losses[1])
