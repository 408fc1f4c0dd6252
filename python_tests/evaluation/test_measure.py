"""Measures on samplers whose quality is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pyard.diffusion.noise import uniform_labels
from pyard.errors import InputError
from pyard.evaluation.features import Activations
from pyard.evaluation.frechet import GaussianStatistics
from pyard.evaluation.measure import Candidate, balanced_labels, measure
from pyard.evaluation.reference import Reference
from pyard.evaluation.report import Evaluation
from pyard.sampling.exposure_bias import ExposureBias

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
    assert "accuracy" not in evaluation.table()


def test_the_table_names_every_row_and_the_json_reads_back(tmp_path) -> None:
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


def test_precision_and_recall_of_rows() -> None:
    # Shifted by half the distance of two classes, hardly a sample lies among the data; half of the classes recall half of them.
    classes = np.array([0, 0, 2, 2])
    half = Candidate("half", 4, lambda noise, labels: sampler("", 0).draw(noise, classes[labels]))
    rows = run(sampler("far", 4, shift=1 / 6), half, sampler("good", 4), count=1200).rows
    teacher, far, half_row, good = rows
    assert good.precision == teacher.precision > 0.9
    assert good.recall == teacher.recall > 0.9
    assert far.precision < 0.3
    assert half_row.precision > 0.9
    assert half_row.recall == pytest.approx(0.5, abs=0.05)


def test_extrapolated_distances_are_near_those_of_many_samples() -> None:
    few, many = (run(sampler("wide", 4, spread=2 * SPREAD), count=n, extrapolate=True).row("wide") for n in (300, 4000))
    assert few.frechet_to_data_infinity != few.frechet_to_data
    for to in ("data", "teacher"):
        expected = getattr(many, f"frechet_to_{to}")
        assert getattr(few, f"frechet_to_{to}_infinity") == pytest.approx(expected, rel=0.3)
        assert getattr(many, f"frechet_to_{to}_infinity") == pytest.approx(expected, rel=0.1)
    with pytest.raises(InputError, match="extrapolation needs at least 16"):
        run(sampler("s", 4), count=10, extrapolate=True)


class PixelsAndMore(FeaturesOnly):
    """Spatial features: the upper row. Probabilities: certain of the nearest class."""

    def activations(self, images: np.ndarray) -> Activations:
        hot = np.eye(CLASSES)[Pixels().classify(images)]
        return Activations(self.features(images), images[:, 0, 0].astype(np.float64), hot)


def test_spatial_distance_and_inception_score_where_the_network_gives_them() -> None:
    shift = 0.1
    row = run(sampler("shifted", 4, shift=shift), features=PixelsAndMore()).row("shifted")
    # Two pixels in the upper row; predictions are one-hot and balanced.
    assert row.spatial_frechet_to_data == pytest.approx(2 * shift**2, rel=0.1)
    assert row.inception_score == pytest.approx(CLASSES, rel=1e-3)
    assert row.label_accuracy is None


def test_published_statistics_without_images_leave_precision_and_recall_out() -> None:
    reference = Reference("published", GaussianStatistics(np.zeros(4), np.eye(4), 0))
    row = measure_only(sampler("s", 4), data=reference).row("s")
    # Variances of the samples are about 0.14 along (1, 1, 1, 1) * 2 and spread^2 across.
    assert row.frechet_to_data > 1
    assert (row.precision, row.recall, row.frechet_to_teacher, row.endpoint_mse) == (None,) * 4


def measure_only(*students: Candidate, data: object, features: object | None = None, **changes: object) -> Evaluation:
    settings = dict(count=300, seed=5, batch_size=100, progress=False, sample_shape=SHAPE, num_classes=CLASSES) | changes
    return measure(None, students, data=data, features=features or FeaturesOnly(), **settings)


def test_latents_are_decoded_for_features_and_compared_as_latents() -> None:
    # The decoder halves: what is far out of range as a latent is in range as an image.
    seen: list[tuple[str, np.ndarray]] = []
    students = (Candidate("double", 4, lambda noise, labels: 2 * sampler("", 0).draw(noise, labels)),)
    evaluation = measure(
        Candidate("teacher", 50, lambda noise, labels: 4 * sampler("", 0).draw(noise, labels)),
        students,
        data=sampler("", 0).draw(np.random.default_rng(0).standard_normal((900, *SHAPE)), balanced_labels(900, CLASSES)),
        features=Pixels(),
        sample_shape=SHAPE,
        num_classes=CLASSES,
        count=400,
        seed=5,
        batch_size=150,
        progress=False,
        decode=lambda latents: latents / 2,
        on_images=lambda name, images: seen.append((name, images)),
    )
    row = evaluation.row("double")
    assert row.frechet_to_data < 0.01
    assert row.label_accuracy > 0.99
    variance = (centres() ** 2).mean() + SPREAD**2
    assert row.endpoint_mse == pytest.approx(4 * variance, rel=0.05)
    assert [len(images) for name, images in seen if name == "double"] == [150, 150, 100]
    assert np.abs(np.concatenate([images for _, images in seen])).max() <= 1


def test_random_labels_are_drawn_from_the_seed() -> None:
    drawn: list[np.ndarray] = []
    spy = Candidate("spy", 4, lambda noise, labels: drawn.append(labels) or sampler("", 0).draw(noise, labels))
    evaluation = measure_only(spy, data=None, labels="random")
    assert evaluation.settings["labels"] == "random"
    labels = np.concatenate(drawn)
    assert (labels == uniform_labels(5, np.arange(300), CLASSES)).all()
    assert (labels != balanced_labels(300, CLASSES)).mean() > 0.5
    with pytest.raises(InputError, match="labels is 'sorted'"):
        measure_only(spy, data=None, labels="sorted")


def test_exposure_bias_stands_in_table_and_json() -> None:
    bias = ExposureBias((0.5, 0.0), (0.001, 0.002), (0.001, 0.004))
    evaluation = run(sampler("s", 4), count=20, exposure={"s": bias})
    assert "s: 0.001 → 0.001  0.002 → 0.004" in evaluation.table()
    content = json.loads(json.dumps(evaluation.to_json()))
    assert content["rows"][1]["exposure_bias"]["rollout"] == [0.001, 0.004]
    assert Evaluation.from_json(content) == evaluation


def test_evaluations_of_earlier_versions_still_read() -> None:
    old = run(sampler("s", 4), count=20).to_json()
    for row in old["rows"]:
        for name in ("precision", "recall", "exposure_bias", "inception_score"):
            del row[name]
    assert Evaluation.from_json(old).row("s").precision is None


def test_rows_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="rows teacher, s, s; expected"):
        run(sampler("s", 4), sampler("s", 2), count=20)
