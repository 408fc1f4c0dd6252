"""The Fréchet distance against its closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from pyard.errors import InputError
from pyard.evaluation import frechet
from pyard.evaluation.frechet import GaussianStatistics, RunningStatistics, frechet_distance, frechet_infinity


def random_covariance(rng: np.random.Generator, dim: int, rank: int | None = None) -> np.ndarray:
    factor = rng.standard_normal((dim, rank or 2 * dim))
    return factor @ factor.T


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> GaussianStatistics:
    return GaussianStatistics(mean, covariance, 1000)


def test_commuting_covariances_have_a_sum_over_eigenvalues() -> None:
    # For C_a = Q diag(s^2) Q', C_b = Q diag(t^2) Q' the distance is |m_a - m_b|^2 + sum (s - t)^2.
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.standard_normal((9, 9)))
    s, t, shift = rng.uniform(0.1, 3, 9), rng.uniform(0.1, 3, 9), rng.standard_normal(9)
    a = gaussian(np.zeros(9), rotation * s**2 @ rotation.T)
    b = gaussian(shift, rotation * t**2 @ rotation.T)
    assert frechet_distance(a, b) == pytest.approx(shift @ shift + ((s - t) ** 2).sum(), rel=1e-12)


def test_general_covariances_agree_with_the_matrix_square_root() -> None:
    rng = np.random.default_rng(1)
    a, b = (gaussian(rng.standard_normal(12), random_covariance(rng, 12)) for _ in range(2))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    difference = a.mean - b.mean
    expected = difference @ difference + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_singular_covariances() -> None:
    # u u' against v v': overlap |u.v|. Matrix square roots of such products are where implementations return complex numbers.
    rng = np.random.default_rng(2)
    u, v = rng.standard_normal((2, 30))
    a, b = gaussian(np.zeros(30), np.outer(u, u)), gaussian(np.zeros(30), np.outer(v, v))
    assert frechet_distance(a, b) == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-9)
    low_rank = gaussian(np.zeros(30), random_covariance(rng, 30, rank=3))
    assert frechet_distance(low_rank, low_rank) == pytest.approx(0, abs=1e-9 * np.trace(low_rank.covariance))


def test_statistics_of_features_far_from_zero() -> None:
    rng = np.random.default_rng(3)
    features = (1e4 + rng.standard_normal((500, 4))).astype(np.float32)
    found = GaussianStatistics.of(features)
    np.testing.assert_allclose(found.covariance, np.cov(features.astype(np.float64).T), rtol=1e-10)
    np.testing.assert_allclose(found.mean, features.astype(np.float64).mean(axis=0), rtol=1e-14)
    assert found.count == 500


def test_statistics_of_batches_are_those_of_all_at_once() -> None:
    rng = np.random.default_rng(5)
    features = (1e4 + np.linspace(0, 30, 500)[:, None] + rng.standard_normal((500, 4))).astype(np.float32)
    running = RunningStatistics()
    for start in range(0, 500, 70):
        running.add(features[start : start + 70])
    found, expected = running.result(), GaussianStatistics.of(features)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-10)
    assert found.count == 500
    with pytest.raises(InputError, match=r"\(3, 5\)"):
        running.add(np.zeros((3, 5)))
    with pytest.raises(InputError, match="0 vectors"):
        RunningStatistics().result()


def test_samples_of_known_gaussians_approach_the_closed_form() -> None:
    rng = np.random.default_rng(4)
    a = GaussianStatistics.of(rng.standard_normal((200_000, 3)))
    b = GaussianStatistics.of(np.array([1.0, 0, 0]) + 2 * rng.standard_normal((200_000, 3)))
    assert frechet_distance(a, b) == pytest.approx(1 + 3 * (2 - 1) ** 2, rel=0.02)


def test_extrapolation_removes_the_bias_of_few_samples() -> None:
    # N(0, I) against N(0, 1.2^2 I) in 16 dimensions: 16 * 0.2^2 = 0.64.
    dim, count, expected = 16, 600, 16 * 0.2**2
    exact = gaussian(np.zeros(dim), np.eye(dim))
    plain, fixed, both = [], [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        samples, reference = 1.2 * rng.standard_normal((count, dim)), rng.standard_normal((count, dim))
        plain.append(frechet_distance(GaussianStatistics.of(samples), GaussianStatistics.of(reference)))
        fixed.append(frechet_infinity(samples, exact))
        both.append(frechet_infinity(samples, reference))
    # Means over seeds; their own spread is about 0.01.
    assert np.mean(plain) - expected > 0.15
    assert np.mean(fixed) == pytest.approx(expected, abs=0.05)
    assert np.mean(both) == pytest.approx(expected, abs=0.05)


def test_extrapolation_keeps_balanced_labels_balanced() -> None:
    # Two classes at -3 and 3, in turn: their share, which varies most in random subsets, is exact in every part.
    rng = np.random.default_rng(8)
    centres = np.where(np.arange(400) % 2, 3.0, -3.0)[:, None]
    found = [frechet_infinity(centres + 0.5 * rng.standard_normal((400, 2)), exact_pair()) for _ in range(20)]
    assert np.mean(found) == pytest.approx(0, abs=2e-3)


def exact_pair() -> GaussianStatistics:
    # Covariance 9 (1 1; 1 1) + 0.25 I.
    return gaussian(np.zeros(2), 9 * np.ones((2, 2)) + 0.25 * np.eye(2))


def test_extrapolation_of_a_perfect_generator_is_about_0() -> None:
    rng = np.random.default_rng(7)
    pairs = rng.standard_normal((16, 2, 1000, 8))
    plain = np.mean([frechet_distance(GaussianStatistics.of(a), GaussianStatistics.of(b)) for a, b in pairs])
    assert plain > 0.03
    assert abs(np.mean([frechet_infinity(a, b) for a, b in pairs])) < plain / 5


def test_extrapolation_fits_a_line_in_1_over_n(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 + 300 / n, exactly, whatever the samples: only the line's value at 1 / n = 0 is 2.
    monkeypatch.setattr(frechet, "frechet_distance", lambda a, b: 2 + 300 / a.count)
    features = np.random.default_rng(0).standard_normal((1200, 3))
    assert frechet_infinity(features, gaussian(np.zeros(3), np.eye(3))) == pytest.approx(2, abs=1e-9)


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match=r"3 and 4 dimensions"):
        frechet_distance(gaussian(np.zeros(3), np.eye(3)), gaussian(np.zeros(4), np.eye(4)))
    with pytest.raises(InputError, match=r"\(1, 5\)"):
        GaussianStatistics.of(np.zeros((1, 5)))
    with pytest.raises(InputError, match=r"15 vectors of 4 features; extrapolation needs at least 16"):
        frechet_infinity(np.zeros((15, 4)), gaussian(np.zeros(4), np.eye(4)))
    with pytest.raises(InputError, match="not finite"):
        GaussianStatistics.of(np.full((4, 2), np.nan))
