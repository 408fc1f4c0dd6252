"""Measures on samplers whose quality is known."""

from __future__ import annotations

import numpy as np
import pytest

from pyard.errors import InputError
from pyard.evaluation.measure import Candidate, balanced_labels, measure
from pyard.evaluation.report import Evaluation

SHAPE, CLASSES, SPREAD = (1, 2, 2), 4, 0.05


class Pixels:
    """Features that are the pixels, and classes that are their mean: everything has a closed form."""

    name, fingerprint = "pixels", "0"

    def features(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float64)

    def classify(self, images: np.ndarray) -> np.ndarray:
        return np.abs(images.mean(axis=(1, 2, 3))[:, None] - centres()).argmin(axis=1)


class FeaturesOnly:
    name, fingerprint = "pixels", "0"
    features = Pixels.features


def centres() -> np.ndarray:
    return np.linspace(-0.5, 0.5, CLASSES)


def sampler(name: str, passes: int, shift: float = 0.0, spread: float = SPREAD) -> Candidate:
    """Class centre + shift + spread * noise."""

    def draw(noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        samples = centres()[labels][:, None, None, None] + shift + spread * noise
        return samples.astype(np.float32)

    return Candidate(name, passes, draw)


def run(*students: Candidate, features: object = None, **changes: object) -> Evaluation:
    data = sampler("data", 0).draw(
        np.random.default_rng(0).standard_normal((4000, *SHAPE)).astype(np.float32), balanced_labels(4000, CLASSES)
    )
    settings = dict(count=4000, seed=5, batch_size=1500, progress=False) | changes
    shapes = dict(sample_shape=SHAPE, num_classes=CLASSES)
    return measure(sampler("teacher", 50), students, data=data, features=features or Pixels(), **shapes, **settings)


def test_a_perfect_student_equals_the_teacher_and_a_shifted_one_is_off_by_the_shift() -> None:
    shift = 0.3
    evaluation = run(sampler("perfect", 4), sampler("shifted", 2, shift=shift))
    teacher, perfect, shifted = evaluation.rows
    assert (teacher.network_passes, perfect.network_passes, shifted.network_passes) == (50, 4, 2)
    assert perfect.frechet_to_data == teacher.frechet_to_data
    assert perfect.frechet_to_teacher == teacher.frechet_to_teacher
    assert perfect.endpoint_mse == 0
    assert teacher.label_accuracy == perfect.label_accuracy == pytest.approx(1, abs=0.005)
    # The reference is drawn from other noise, so even the teacher is off by what chance leaves.
    assert 0 < teacher.frechet_to_teacher < 1e-3
    # Every pixel moves by the shift: 4 pixels in the features.
    assert shifted.endpoint_mse == pytest.approx(shift**2, rel=1e-4)
    assert shifted.frechet_to_teacher == pytest.approx(4 * shift**2, rel=0.05)
    assert shifted.frechet_to_data == pytest.approx(4 * shift**2, rel=0.05)
    # The classes are 1/3 apart: a shift of 0.3 turns all but the last into their neighbour.
    assert shifted.label_accuracy == pytest.approx(1 / CLASSES, abs=0.02)


def test_spread_shows_in_the_distance_and_in_the_endpoint_error() -> None:
    wide = run(sampler("wide", 4, spread=3 * SPREAD)).row("wide")
    assert wide.endpoint_mse == pytest.approx((2 * SPREAD) ** 2, rel=0.03)
    # Within a class the pixels are independent; between classes they move together, which the spread does not touch: the
    # covariance is spread^2 I + v J, with one large eigenvalue and three of spread^2.
    v = centres().var()
    along = (np.sqrt(4 * v + 9 * SPREAD**2) - np.sqrt(4 * v + SPREAD**2)) ** 2
    assert wide.frechet_to_teacher == pytest.approx(along + 3 * (2 * SPREAD) ** 2, rel=0.06)


def test_the_batch_size_changes_nothing_but_the_time() -> None:
    one, many = (run(sampler("s", 4, shift=0.1), count=100, batch_size=size) for size in (100, 7))
    for a, b in zip(one.rows, many.rows, strict=True):
        assert a.frechet_to_data == pytest.approx(b.frechet_to_data, rel=1e-9)
        assert a.endpoint_mse == pytest.approx(b.endpoint_mse, rel=1e-9)


def test_features_without_classes_leave_the_accuracy_out() -> None:
    evaluation = run(sampler("s", 4), features=FeaturesOnly(), count=50)
    assert evaluation.row("s").label_accuracy is None
    assert " - " in evaluation.table()


def test_the_table_names_every_row_and_the_json_reads_back(tmp_path) -> None:
    import json

    evaluation = run(sampler("s", 4), count=50)
    table = evaluation.table()
    assert "teacher" in table
    assert "50 samples a row" in table
    evaluation.save(tmp_path / "deep" / "quality.json", note="more")
    content = json.loads((tmp_path / "deep" / "quality.json").read_text())
    assert content["note"] == "more"
    assert Evaluation.from_json(content) == evaluation
    with pytest.raises(InputError, match="no row 'x'"):
        evaluation.row("x")


def test_samples_out_of_range_are_clipped_and_nan_is_an_error() -> None:
    # What is far out of range counts as white or black, as in a picture.
    far = run(Candidate("far", 4, lambda noise, labels: np.full_like(noise, 100)), count=200).row("far")
    assert far.endpoint_mse < 4
    with pytest.raises(InputError, match="'broken' contain NaN"):
        run(Candidate("broken", 4, lambda noise, labels: np.full_like(noise, np.nan)), count=20)
    with pytest.raises(InputError, match="count is 1"):
        run(count=1)
