"""The Fréchet distance between two sets of features, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyard.errors import InputError


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean and covariance of a set of feature vectors.

    Args:
        mean: float64 [D].
        covariance: float64 [D, D], symmetric.
        count: vectors they were estimated from, 0: not known; two distances compare only if their counts are equal, for the
            estimate of the distance falls with the count (Chong & Forsyth 2020).
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    def __post_init__(self) -> None:
        dim = self.mean.shape[-1] if self.mean.ndim else 0
        if self.mean.shape != (dim,) or self.covariance.shape != (dim, dim):
            raise InputError(
                f"feature statistics: mean {self.mean.shape} and covariance {self.covariance.shape}; expected [D] and [D, D]"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise InputError("feature statistics: mean or covariance is not finite; look for NaN in the images")

    @classmethod
    def of(cls, features: np.ndarray) -> GaussianStatistics:
        """Mean and unbiased covariance of features [n, D], n >= 2, accumulated in float64."""
        if features.ndim != 2 or len(features) < 2:
            raise InputError(f"feature statistics: features of shape {features.shape}; expected [n, D] with n >= 2")
        features = features.astype(np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))


class RunningStatistics:
    """Mean and covariance of feature vectors that come in batches and are not kept, accumulated in float64.

    The first batch's mean is taken off all vectors, so that features far from zero lose no digits.
    """

    def __init__(self) -> None:
        self._count = 0
        self._origin = self._sum = self._products = np.zeros(0)

    def add(self, features: np.ndarray) -> None:
        """Take a batch [n, D]."""
        if features.ndim != 2 or (self._count and features.shape[1] != len(self._origin)):
            raise InputError(f"feature statistics: a batch of shape {features.shape}; expected [n, D] with one D for all")
        features = features.astype(np.float64)
        if not self._count:
            self._origin = features.mean(axis=0)
            self._sum, self._products = np.zeros_like(self._origin), np.zeros((features.shape[1],) * 2)
        features -= self._origin
        self._count += len(features)
        self._sum += features.sum(axis=0)
        self._products += features.T @ features

    def result(self) -> GaussianStatistics:
        """The statistics of all vectors so far, at least 2."""
        if self._count < 2:
            raise InputError(f"feature statistics: {self._count} vectors; expected at least 2")
        mean = self._sum / self._count
        covariance = (self._products - self._count * np.outer(mean, mean)) / (self._count - 1)
        return GaussianStatistics(self._origin + mean, covariance, self._count)


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """The squared 2-Wasserstein distance of two Gaussians, which is what FID reports.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)    (Dowson & Landau 1982; Heusel et al. 2017, section 2)

    The last trace is the sum of the singular values of C_a^1/2 C_b^1/2. Both roots come from symmetric eigenproblems, so
    singular covariances (dead features, fewer vectors than dimensions) need neither a small diagonal term nor complex numbers.

    Args:
        a, b: statistics of the same features.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        InputError: the statistics have different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"Fréchet distance: features of {a.mean.shape[0]} and {b.mean.shape[0]} dimensions; expected the same")
    overlap = np.linalg.norm(_symmetric_root(a.covariance) @ _symmetric_root(b.covariance), ord="nuc")
    difference = a.mean - b.mean
    return max(0.0, float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap))


def frechet_infinity(features: np.ndarray, reference: np.ndarray | GaussianStatistics, *, parts: int = 5) -> float:
    """The Fréchet distance that infinitely many samples would have (Chong & Forsyth 2020, section 3).

    The distance of n samples is too large by about c / n, where c depends on the generator, so that few samples rank
    generators wrongly. The samples are cut into 1, 2, ... `parts` parts; the mean distance of the parts of each cut is fitted
    by a line in 1 / n, whose value at 0 is the result. With 5 cuts these are 15 distances, as in the paper, which draws a
    random subset for each. Parts are consecutive samples instead: where labels are balanced, the bias of all samples is that of
    a stratified draw, and only parts that are balanced, too, share its law; random subsets would subtract too much. Cuts whose
    parts would have fewer than 2 D vectors are left out: there the law does not hold.

    Args:
        features: [n, D], n at least 4 D, in an order in which every part is like the whole: labels in turn or at random, never
            sorted.
        reference: features [m, D] of the reference in such an order, which is then cut alike and loses its own part of the
            bias, too; or its statistics, which stay as they are.
        parts: of the finest cut, at least 2.

    Returns:
        The distance; it may be a little below 0 where the true one is near 0.

    Raises:
        InputError: too few samples to extrapolate from, or statistics of other dimensions.
    """
    if features.ndim != 2 or parts < 2:
        raise InputError(f"Fréchet distance: features of shape {features.shape} in {parts} parts; expected [n, D], 2 or more")
    sets = [features] if isinstance(reference, GaussianStatistics) else [features, reference]
    least = min(len(s) for s in sets)
    parts = min(parts, least // (2 * features.shape[1]))
    if parts < 2:
        raise InputError(
            f"Fréchet distance: {least} vectors of {features.shape[1]} features; extrapolation needs at least "
            f"{4 * features.shape[1]}"
        )
    distances = []
    for cut in range(1, parts + 1):
        pieces = [[GaussianStatistics.of(piece) for piece in np.array_split(s, cut)] for s in sets]
        others = [reference] * cut if isinstance(reference, GaussianStatistics) else pieces[1]
        distances.append(np.mean([frechet_distance(a, b) for a, b in zip(pieces[0], others, strict=True)]))
    # 1 / n is cut / len(features); the unit of the slope does not matter.
    _, intercept = np.polyfit(np.arange(1, parts + 1), distances, deg=1)
    return float(intercept)


def _symmetric_root(covariance: np.ndarray) -> np.ndarray:
    """C^1/2 of a positive semi-definite [D, D]; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
