from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from factories import tiny_student
from golden import relative_error

from pyard.conditions import ClassConditions
from pyard.diffusion.noise import check_labels, standard_normal
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.sampling.draw import condition_numbers, sample
from pyard.sampling.inference import batch_size_that_fits, graphed_rollout


@pytest.fixture(scope="module")
def student() -> Student:
    return tiny_student(3, history_layers=2)


def test_a_sample_is_the_same_in_any_batch(student):
    labels = [0, 1, 2, 3, 4, 0, 1]
    together = sample(student, labels, seed=5)
    for batch_size in (1, 2, 5):
        torch.testing.assert_close(together, sample(student, labels, seed=5, batch_size=batch_size), rtol=1e-5, atol=1e-5)
    assert (sample(student, labels, seed=6) - together).abs().max() > 0.1
    assert (sample(student, [1, 1, 2, 3, 4, 0, 1], seed=5)[0] - together[0]).abs().max() > 1e-3


def test_every_sample_can_have_a_seed_of_its_own(student):
    apart = sample(student, [2, 3, 2], seed=[7, 8, 7])
    torch.testing.assert_close(apart[0], sample(student, [2], seed=7)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(apart[1], sample(student, [3], seed=8)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(apart[2], apart[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="2 seeds for 3 samples"):
        sample(student, [2, 3, 2], seed=[7, 8])


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
    assert sample(student, [], seed=[], return_trajectory=True).shape == (0, 3, *student.sample_shape)


@pytest.mark.parametrize("labels", [[5], [-1], [1.5], [[1]], "3"])
def test_labels_out_of_range_are_refused(student, labels):
    with pytest.raises(InputError, match="label"):
        sample(student, labels)


def test_labels_of_any_integer_array():
    for labels in ([1, 2], np.array([1, 2], np.int32), torch.tensor([1, 2])):
        assert check_labels(labels, 3).tolist() == [1, 2]


def test_names_stand_for_classes_where_the_student_knows_them():
    named = tiny_student(2, history_layers=1)
    with pytest.raises(InputError, match="has no class names"):
        condition_numbers(["zero"], named)
    names = ("tench, Tinca tinca", "goldfish", "white shark", "cock", "hen")
    named.conditions = ClassConditions(5, names)
    assert condition_numbers(["Tinca tinca", "tench", "HEN", 3, "tench, Tinca tinca"], named).tolist() == [0, 0, 4, 3, 0]
    with pytest.raises(InputError, match=r"no class is named 'shark'; near: white shark"):
        condition_numbers(["shark"], named)
    with pytest.raises(InputError, match=r"expected a list, such as \['hen'\]"):
        condition_numbers("hen", named)


@pytest.mark.parametrize("settings", [dict(), dict(target="state", output="jump", history_bias=-1.0)], ids=str)
def test_half_precision_draws_nearly_the_same(settings):
    student = tiny_student(4, history_layers=2, **settings)
    exact = sample(student, [0, 1, 2])
    rough = sample(student, [0, 1, 2], dtype="bfloat16")
    assert rough.dtype == torch.float32
    assert 1e-5 < relative_error(rough, exact) < 3e-2
    assert next(student.parameters()).dtype == torch.float32  # the caller's student is left as it is
    again = student.to(torch.bfloat16).to(torch.float32)
    assert again.embed_times.tolist() == list(student.config.grid.embed_times)


class Small(Student):
    """A student on a machine without memory for more than three samples."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.most, self.sizes = 3, []

    def rollout(self, noise: torch.Tensor, *rest: Any) -> Any:
        self.sizes.append(len(noise))
        if len(noise) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().rollout(noise, *rest)


def test_batches_that_run_out_of_memory_are_halved(student):
    small = Small(student.config)
    small.load_state_dict(student.state_dict())
    labels = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    torch.testing.assert_close(sample(small, labels), sample(student, labels), rtol=1e-5, atol=1e-5)
    assert small.sizes == [11, 6, 3, 3, 3, 2]
    small.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        sample(small, labels)


def test_real_memory_exhaustion_on_the_cpu_is_recognised(student):
    from pyard.sampling.inference import is_out_of_memory

    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_batch_size_follows_free_memory(student, monkeypatch):
    import pyard.sampling.inference as inference

    assert batch_size_that_fits(student) == inference.LARGEST_BATCH
    sizes = []
    for megabytes in (0, 1, 2, 4):
        monkeypatch.setattr(inference, "free_memory", lambda device, m=megabytes: m << 20)
        sizes.append(batch_size_that_fits(student))
    assert sizes[0] == 1
    assert sizes == sorted(sizes)
    assert sizes[3] > 1.9 * sizes[2] > 1


def test_cuda_graphs_need_cuda(student):
    with pytest.raises(InputError, match="CUDA graphs need a student on a CUDA device"):
        graphed_rollout(student, 2, student.require_conditions().take([0]))


@pytest.mark.cuda
def test_a_cuda_graph_draws_the_same():
    student = tiny_student(3, history_layers=2).to("cuda")
    labels: Sequence[int] = [0, 1, 2, 3, 4]
    expected = sample(student, labels, batch_size=2)
    torch.testing.assert_close(sample(student, labels, batch_size=2, cuda_graph=True), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_steps_draw_the_same():
    student = tiny_student(2, history_layers=1, target="state", output="jump", history_bias=-1.0)
    labels = [0, 1, 2, 3, 4]
    expected = sample(student, labels, return_trajectory=True)
    found = sample(student, labels, return_trajectory=True, batch_size=3, compile=True)  # batches of 3 and 2
    assert relative_error(found, expected) < 1e-5
