"""The Inception Score where its value is known."""

from __future__ import annotations

import numpy as np
import pytest

from pyard.errors import InputError
from pyard.evaluation.inception_score import inception_score, softmax


def test_one_hot_predictions_of_all_classes_score_the_number_of_classes() -> None:
    assert inception_score(np.eye(7)[np.arange(70) % 7]) == pytest.approx(7, rel=1e-12)


def test_undecided_predictions_and_a_single_class_score_1() -> None:
    assert inception_score(np.full((20, 5), 0.2)) == pytest.approx(1, rel=1e-12)
    assert inception_score(np.eye(5)[np.zeros(20, int)]) == pytest.approx(1, rel=1e-12)


def test_a_binary_channel_has_a_closed_form() -> None:
    # p(class | sample) = (q, 1 - q) or (1 - q, q), equally often: log 2 - H(q) nats.
    q = 0.9
    entropy = -(q * np.log(q) + (1 - q) * np.log(1 - q))
    rows = np.tile([[q, 1 - q], [1 - q, q]], (50, 1))
    assert inception_score(rows) == pytest.approx(np.exp(np.log(2) - entropy), rel=1e-12)


def test_parts_have_marginals_of_their_own() -> None:
    # Sorted by class, every part sees one class alone.
    rows = np.eye(4)[np.repeat(np.arange(4), 10)]
    assert inception_score(rows, split_size=10) == pytest.approx(1, rel=1e-12)
    assert inception_score(rows, split_size=40) == pytest.approx(4, rel=1e-12)
    assert inception_score(rows, split_size=20) == pytest.approx(2, rel=1e-12)


def test_softmax_of_large_logits() -> None:
    np.testing.assert_allclose(softmax(np.array([[1000.0, 1000.0 + np.log(3)]])), [[0.25, 0.75]], rtol=1e-10)


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match="expected softmax outputs, not logits"):
        inception_score(np.random.default_rng(0).standard_normal((5, 3)))
    with pytest.raises(InputError, match=r"shape \(0, 3\)"):
        inception_score(np.zeros((0, 3)))
