from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import tiny_student

from pyard.errors import InputError
from pyard.noise import check_labels, standard_normal
from pyard.sampling import sample


@pytest.fixture(scope="module")
def student():
    return tiny_student(3, history_layers=2)


def test_a_sample_is_the_same_in_any_batch(student):
    labels = [0, 1, 2, 3, 4, 0, 1]
    together = sample(student, labels, seed=5)
    apart = sample(student, labels, seed=5, batch_size=2)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert (sample(student, labels, seed=6) - together).abs().max() > 0.1
    assert (sample(student, [1, 1, 2, 3, 4, 0, 1], seed=5)[0] - together[0]).abs().max() > 1e-3


def test_trajectory_holds_every_prediction(student):
    trajectory = sample(student, [2, 3], return_trajectory=True)
    assert trajectory.shape == (2, 3, *student.sample_shape)
    torch.testing.assert_close(trajectory[:, -1], sample(student, [2, 3]))
    noise = torch.from_numpy(standard_normal(0, [0, 1], student.sample_shape))
    history = torch.cat([noise[:, None], trajectory[:, :-1]], dim=1)
    with torch.inference_mode():
        torch.testing.assert_close(student(history, torch.tensor([2, 3])), trajectory, rtol=1e-5, atol=1e-5)


def test_no_labels_no_samples(student):
    assert sample(student, []).shape == (0, *student.sample_shape)


@pytest.mark.parametrize("labels", [[5], [-1], [0.5], [[1]], ["a"]])
def test_labels_that_are_none_are_refused(student, labels):
    with pytest.raises(InputError, match="label"):
        sample(student, labels)


def test_labels_of_every_integer_kind():
    for kind in (list, np.array, torch.tensor):
        assert check_labels(kind([1, 0]), 2).tolist() == [1, 0]
