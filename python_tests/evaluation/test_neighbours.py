"""Precision and recall on sets whose neighbours are known, and against the definition written out."""

from __future__ import annotations

import numpy as np
import pytest

from pyard.errors import InputError
from pyard.evaluation import neighbours
from pyard.evaluation.neighbours import precision_recall


def by_definition(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    """Kynkäänniemi et al. 2019, equations 1 and 2, a sample at a time."""

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        inside = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = np.linalg.norm(np.delete(centres, i, axis=0) - centre, axis=1)
                if np.linalg.norm(point - centre) <= np.sort(others)[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_equals_the_definition(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(k)
    real, fake = rng.standard_normal((90, 5)), 0.6 + 0.8 * rng.standard_normal((70, 5))
    expected = by_definition(real, fake, k)
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    assert precision_recall(real, fake, k) == expected
    assert precision_recall(fake, real, k) == expected[::-1]
    monkeypatch.setattr(neighbours, "_CHUNK_ELEMENTS", 500)
    assert precision_recall(real, fake, k) == expected


def test_the_radius_is_the_third_neighbour_s_distance() -> None:
    # Real at 0, 1, 2, 3 on a line: radii 3, 2, 2, 3 for k = 3, so the manifold is -3 ... 6.
    real = np.arange(4.0)[:, None]
    fake = np.array([-3.0, -3.01, 6.0, 6.01, 1e6, 1e6])[:, None]
    assert precision_recall(real, fake).precision == pytest.approx(2 / 6)


def test_identical_and_separate_sets() -> None:
    rng = np.random.default_rng(0)
    real = 1000 + rng.standard_normal((300, 8))
    assert precision_recall(real, real.copy()) == (1, 1)
    assert precision_recall(real, real + 50) == (0, 0)


def test_a_collapsed_generator_is_precise_and_recalls_nothing() -> None:
    rng = np.random.default_rng(1)
    real = (1000 + rng.standard_normal((400, 6))).astype(np.float32)
    found = precision_recall(real, np.repeat(real[:1], 50, axis=0))
    # All its samples are one real image: on the manifold, and a ball of radius 0 around that image alone.
    assert found == (1, 1 / 400)


def test_half_of_the_modes() -> None:
    rng = np.random.default_rng(2)
    two = np.repeat([[0.0, 0.0], [100.0, 0.0]], 500, axis=0) + rng.standard_normal((1000, 2))
    one = rng.standard_normal((1000, 2))
    found = precision_recall(two, one)
    assert found.precision > 0.95
    assert found.recall == pytest.approx(0.5, abs=0.03)


def test_wrong_input_is_named() -> None:
    good = np.random.default_rng(0).standard_normal((9, 3))
    with pytest.raises(InputError, match=r"real_features of shape \(3, 3\).*n > k"):
        precision_recall(good[:3], good)
    with pytest.raises(InputError, match="3 real and 2 generated"):
        precision_recall(good, good[:, :2])
    with pytest.raises(InputError, match="fake_features contain NaN"):
        precision_recall(good, np.full_like(good, np.nan))
    with pytest.raises(InputError, match="k is 0"):
        precision_recall(good, good, k=0)
