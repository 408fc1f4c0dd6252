"""The noise generator: golden bits, the normal distribution, independence of order and batch, errors."""

import subprocess
import sys

import numpy as np
import pytest
from scipy import special, stats

from pyard.diffusion.noise import check_labels, normal_quantile, standard_normal, uniform_labels
from pyard.errors import InputError


def test_golden_bits() -> None:
    # A change of these numbers changes every stored trajectory and every image of a seed: never adapt them.
    assert standard_normal(7, [123], (4,)).view(np.uint32).tolist() == [[3213594795, 1051071627, 3181507722, 3216817687]]
    np.testing.assert_array_equal(
        standard_normal(0, [0], (4,)), np.array([[-2.2718842, -0.7013279, -1.2189802, 0.16217156]], dtype=np.float32)
    )
    assert uniform_labels(0, range(20), 10).tolist() == [3, 1, 6, 7, 2, 2, 5, 4, 2, 9, 7, 5, 6, 5, 9, 7, 2, 5, 9, 3]
    assert uniform_labels(2**64 - 1, [2**64 - 1, 0], 1000).tolist() == [99, 773]


def test_raw_bits_are_philox_keyed_by_seed_and_index() -> None:
    generator = np.random.Philox(key=np.array([3, 5], dtype=np.uint64), counter=0)
    probability = ((generator.random_raw(6) >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52
    np.testing.assert_allclose(standard_normal(3, [5], (2, 3)).ravel(), special.ndtri(probability), rtol=1e-6)


def test_quantile_is_accurate_to_float64_rounding() -> None:
    tail = np.concatenate([2.0**-53 * np.array([1.0, 3.0, 5.0, 1001.0]), 10.0 ** -np.arange(1.0, 16.0), [0.075, 0.0750000001]])
    probability = np.concatenate([tail, 1.0 - tail, np.linspace(1e-6, 1.0 - 1e-6, 20_000)])
    expected = special.ndtri(probability)
    assert np.max(np.abs(normal_quantile(probability) - expected) / np.abs(expected)) < 4e-15


def test_quantile_is_odd_and_finite_at_the_extreme_draws() -> None:
    extreme = np.array([2.0**-53, 0.5, 1.0 - 2.0**-53])
    low, middle, high = normal_quantile(extreme)
    assert low == -high
    assert middle == 0.0
    assert 8.2 < high < 8.3


def test_values_are_standard_normal() -> None:
    values = standard_normal(11, range(100), (5, 20, 20)).astype(np.float64)
    n = values.size
    flat = values.ravel()
    # Five standard deviations of each sample moment of a normal distribution.
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(np.mean(flat**power) - moment) < 5 * np.sqrt(variance / n), f"moment {power}"
    assert stats.kstest(flat, "norm").pvalue > 1e-4
    # Neighbouring samples, and neighbouring seeds, are uncorrelated.
    other = standard_normal(12, range(100), (5, 20, 20)).astype(np.float64).ravel()
    for a, b in ((flat[:-2000], flat[2000:]), (flat[:-1], flat[1:]), (flat, other)):
        assert abs(np.mean(a * b)) < 5 / np.sqrt(a.size)


def test_labels_are_uniform_and_do_not_follow_the_noise() -> None:
    labels = uniform_labels(5, np.arange(20_000), 7)
    assert labels.dtype == np.int64
    assert labels.min() == 0
    assert labels.max() == 6
    assert stats.chisquare(np.bincount(labels)).pvalue > 1e-4
    first = standard_normal(5, np.arange(20_000), (1,))[:, 0]
    assert abs(np.corrcoef(first, labels)[0, 1]) < 5 / np.sqrt(20_000)


@pytest.mark.parametrize("indices", [[9, 2, 2, 2**63], np.array([4, 0], dtype=np.int32), range(3, 6), []])
def test_a_sample_depends_on_its_seed_and_index_alone(indices: list[int]) -> None:
    batch = standard_normal(42, indices, (2, 3, 4))
    assert batch.shape == (len(indices), 2, 3, 4)
    assert batch.dtype == np.float32
    labels = uniform_labels(42, indices, 10)
    for row, label, index in zip(batch, labels, indices, strict=True):
        np.testing.assert_array_equal(row, standard_normal(42, [int(index)], (2, 3, 4))[0])
        assert label == uniform_labels(42, [int(index)], 10)[0]


def test_seed_and_index_both_matter() -> None:
    draws = [standard_normal(seed, [index], (8,)).tobytes() for seed in (0, 1, 2**64 - 1) for index in (0, 1, 2**64 - 1)]
    assert len(set(draws)) == 9


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", None])
def test_bad_seeds(seed: int) -> None:
    with pytest.raises(InputError, match="seed"):
        standard_normal(seed, [0], (1,))
    with pytest.raises(InputError, match="seed"):
        uniform_labels(seed, [0], 10)


@pytest.mark.parametrize("indices", [[-1], [0, 2**64], [0.5], np.array([1.0])])
def test_bad_indices(indices: list[int]) -> None:
    with pytest.raises(InputError, match="sample index"):
        standard_normal(0, indices, (1,))
    with pytest.raises(InputError, match="sample index"):
        uniform_labels(0, indices, 10)


def test_bad_sizes() -> None:
    with pytest.raises(InputError, match="shape"):
        standard_normal(0, [0], (1, -1))
    with pytest.raises(InputError, match="classes"):
        uniform_labels(0, [0], 0)


def test_noise_imports_no_torch() -> None:
    code = "import sys, pyard.diffusion.noise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_labels_of_a_caller() -> None:
    for labels in ([3, 0], (3, 0), np.array([3, 0], dtype=np.uint8)):
        checked = check_labels(labels, 4)
        assert checked.dtype == np.int64
        assert checked.tolist() == [3, 0]
    assert check_labels(2, 4).tolist() == [2]
    for mixed in ([np.uint64(3), 0], (np.uint64(3), np.int8(0)), np.array([3, 0], object), [np.array(3), 0]):
        assert check_labels(mixed, 4).tolist() == [3, 0]
    for wrong in ([4], [-1], [1.0], [[1]], [[1], [1, 2]], ["1"], [True], [True, 2], [np.False_, 2], [2**70], None):
        with pytest.raises(InputError, match="label"):
            check_labels(wrong, 4)
