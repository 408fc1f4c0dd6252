"""Arguments of public functions: numbers of any kind are numbers, one precision has several names, the rest is one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from factories import tiny_student, tiny_teacher

import pyard
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.storage.typed import checked, convert
from pyard.training.config import TrainConfig
from pyard.trajectories import TrajectoryReader

INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return pyard.generate_trajectories(
        tiny_teacher(), folder / "store", 8, num_steps=2, teacher_steps=4, batch_size=4, progress=False
    )


@pytest.mark.parametrize("kind", INTEGERS, ids=lambda kind: kind.__name__)
def test_labels_and_seeds_may_be_integers_of_any_kind(kind):
    student = tiny_student()
    expected = pyard.sample(student, [1, 4], seed=[3, 5])
    for labels, seed in (
        ([kind(1), kind(4)], [kind(3), kind(5)]),
        (np.array([1, 4], kind), np.array([3, 5], kind)),
        (torch.from_numpy(np.array([1, 4], kind)), torch.from_numpy(np.array([3, 5], kind))),
    ):
        assert torch.equal(pyard.sample(student, labels, seed=seed, batch_size=kind(2)), expected)


@pytest.mark.parametrize("kind", INTEGERS, ids=lambda kind: kind.__name__)
def test_trajectories_take_numbers_of_any_kind(kind, tmp_path):
    plain = dict(count=4, num_steps=2, teacher_steps=4, batch_size=2, shard_size=4, seed=3, cfg_channels=1)
    ours = {name: kind(value) for name, value in plain.items()}
    given = dict(labels=np.array([1, 0], kind), cfg_scale=np.float32(1.5), cfg_interval=np.array([0, 500]), progress=False)
    one = pyard.generate_trajectories(tiny_teacher(), tmp_path / "a", **ours, **given)
    other = pyard.generate_trajectories(
        tiny_teacher(), tmp_path / "b", **plain, labels=[1, 0], cfg_scale=1.5, cfg_interval=(0.0, 500.0), progress=False
    )
    assert one.manifest == other.manifest
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_students_made_with_numbers_of_numpy_can_be_saved(tmp_path):
    teacher = tiny_teacher()
    grid = TimeGrid.build(teacher.schedule, np.int64(2), np.uint8(4))
    settings = dict(history_layers=np.int64(1), mask="window", window=np.int16(2), history_bias=np.float32(-1))
    Student.from_teacher(teacher, grid, **settings).save_pretrained(tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text(encoding="utf-8"))
    assert (config["history_layers"], config["window"], config["history_bias"]) == (1, 2, -1.0)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"batch_size": "2"}, "sample: batch_size is '2'; expected a whole number, or none"),
        ({"batch_size": 2.0}, "sample: batch_size is 2.0; expected a whole number, or none"),
        ({"batch_size": True}, "sample: batch_size is True; expected a whole number, or none"),
        ({"seed": "2"}, "sample: seed is '2'; expected a whole number, or a list of whole numbers"),
        ({"seed": None}, "sample: seed is None; expected a whole number"),
        ({"dtype": "half"}, "sample: dtype is 'half'; expected one of float32, "),
        ({"dtype": "int64"}, "sample: dtype is 'int64'; expected one of"),
        ({"sample_shape": "2,8,8"}, "sample: sample_shape is '2,8,8'; expected a list of whole numbers, or none"),
        ({"labels": [True]}, "labels: found shape"),
        ({"labels": [1.0]}, "labels: found shape"),
    ],
    ids=str,
)
def test_arguments_of_other_types_are_refused_in_one_line(argument, message):
    with pytest.raises(InputError) as refused:
        pyard.sample(tiny_student(), **{"labels": [1], **argument})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "argument",
    [
        {"count": "4"}, {"num_steps": "2"}, {"teacher_steps": 4.0}, {"seed": True}, {"shard_size": "4"}, {"cfg_scale": "1.5"},
        {"seed": None}, {"labels": 3}, {"labels": ["a"]}, {"cfg_interval": 3}, {"cfg_interval": (0, "x")}, {"part": 3},
        {"precision": "half"}, {"keep": "all"}, {"compile": "yes"},
    ],
    ids=str,
)  # fmt: skip
def test_trajectories_of_arguments_of_other_types_are_refused_in_one_line(argument, tmp_path):
    (name,) = argument
    with pytest.raises(InputError, match=f"^trajectories: {name} is ") as refused:
        pyard.generate_trajectories(tiny_teacher(), tmp_path / "new", **{"count": 4, "progress": False, **argument})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_a_reader_takes_numbers_of_numpy_and_refuses_texts(store):
    reader = TrajectoryReader(store, np.int32(4), target="state", seed=np.uint8(3), rank=np.int64(0), dtype="fp32")
    expected = TrajectoryReader(store, 4, target="state", seed=3)
    assert torch.equal(next(reader).history, next(expected).history)
    with pytest.raises(InputError, match="reader: batch_size is '4'; expected a whole number"):
        TrajectoryReader(store, "4", target="state")


@pytest.mark.parametrize("name", ["bfloat16", "bf16", torch.bfloat16], ids=str)
def test_a_precision_has_the_same_names_everywhere(name, tmp_path):
    drawn = pyard.sample(tiny_student(), [1], dtype=name)
    assert torch.equal(drawn, pyard.sample(tiny_student(), [1], dtype="bfloat16"))
    given = dict(num_steps=2, teacher_steps=4, progress=False)
    store = pyard.generate_trajectories(tiny_teacher(), tmp_path / "store", 4, precision=name, dtype=name, **given)
    assert (store.manifest.precision, store.manifest.dtype) == ("bfloat16", "bfloat16")
    assert TrainConfig(teacher="", out=tmp_path, mixed_precision=name).mixed_precision == "bf16"


def test_an_argument_keeps_what_cannot_be_checked():
    @checked("it")
    def function(a: int | Sequence[int], b: torch.Tensor | int, c: Literal["x", "none"] = "x") -> tuple[object, ...]:
        return a, b, c

    assert function(np.array([1, 2]), "anything", None) == ([1, 2], "anything", "none")
    with pytest.raises(InputError, match="it: c is 'y'; expected one of x, none"):
        function(1, 2, "y")
    with pytest.raises(TypeError):
        convert("3", int)
