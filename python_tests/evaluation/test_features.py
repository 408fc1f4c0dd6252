"""The classifier of the digits: it knows them, and it is the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from pyard.data.digits import digits_data
from pyard.evaluation import Classifier, digits_classifier


def test_it_names_digits_that_it_has_not_seen() -> None:
    classifier = digits_classifier()
    assert isinstance(classifier, Classifier)
    assert classifier.held_out_accuracy > 0.97
    images, labels = digits_data()
    assert (classifier.classify(images) == labels).mean() > 0.99
    # A wrong picture is not recognised: turned by 90 degrees only digits like 0 and 8 survive.
    turned = np.ascontiguousarray(np.rot90(images, axes=(2, 3)))
    assert (classifier.classify(turned) == labels).mean() < 0.5


def test_the_unit_of_its_features_is_the_spread_of_real_digits() -> None:
    images, _ = digits_data()
    features = digits_classifier().features(images)
    assert features.dtype == np.float64
    assert features.shape == (len(images), 32)
    assert np.isclose(features.var(axis=0, ddof=1).mean(), 1, rtol=1e-6)


@pytest.mark.slow
def test_training_it_again_gives_the_same_network() -> None:
    first = digits_classifier().fingerprint
    digits_classifier.cache_clear()
    assert digits_classifier().fingerprint == first
