"""Backbones of somebody else behind pyard's seams: what a student computes, whatever it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden import relative_error
from own_backbones import TextBackbone, VideoBackbone
from own_teachers import TALL, TEXT, VIDEO, WIDE, student_of, text_teacher, video_teacher

import pyard
from pyard.conditions import Condition
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.models.history import ConcatenatingCache
from pyard.models.student import Student
from pyard.ops.masks import visible_steps
from pyard.teachers.guidance import solve
from pyard.teachers.network_teacher import NetworkTeacher

TEACHERS = {"text": text_teacher, "video": video_teacher}
SHAPES = {"text": TALL, "video": (2, 3, 2, 4)}


def reached(step, attentions, mask, window):
    """The steps that a step depends on: in every attention, those seen by what it has seen."""
    steps = {step}
    for _ in range(attentions):
        steps |= {earlier for s in steps for earlier in visible_steps(mask, s, window)}
    return steps


@pytest.mark.parametrize("heads", ["per_step", "shared"])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize(
    ("mask", "window", "bias"), [("diagonal", None, -0.5), ("window", 2, None), ("anchor", None, 0.7), ("causal", None, -0.5)]
)
@pytest.mark.parametrize("kind", TEACHERS)
@torch.inference_mode()
def test_parallel_pass_is_the_cached_rollout(kind, mask, window, bias, num_steps, heads):
    teacher, shape, numbers = TEACHERS[kind](), SHAPES[kind], torch.tensor([1, 3])
    for layers in range(teacher.network.config.depth + 1):
        student = student_of(
            teacher, num_steps, history_layers=layers, mask=mask, window=window, history_bias=bias, heads=heads
        )
        attentions = student.trunk.attention_shapes(layers, shape)
        noise = torch.randn(2, *shape)
        for cache in (None, ConcatenatingCache()):
            rollout = torch.stack(list(student.rollout(noise, numbers, cache)), dim=1)
            history = torch.cat([noise[:, None], rollout[:, :-1]], dim=1)
            together = student(history, numbers)
            assert relative_error(rollout, together) < 1e-5
        # Each step sees what the mask shows of the others, and nothing else.
        for changed in range(num_steps):
            other = history.clone()
            other[:, changed] = torch.randn_like(noise)
            moved = student(other, numbers)
            for step in range(num_steps):
                error = relative_error(moved[:, step], together[:, step])
                seen = changed in reached(step, len(attentions), mask, window)
                assert error > 1e-4 if seen else error < 1e-5, (layers, changed, step)


@torch.inference_mode()
def test_a_history_that_is_biased_away_is_none():
    noise, numbers = torch.randn(2, *TALL), torch.tensor([0, 4])
    off, none = (
        student_of(text_teacher(), history_layers=layers, history_bias=bias) for layers, bias in ((2, -1.0), (0, None))
    )
    none.load_state_dict({name: tensor for name, tensor in off.state_dict().items() if name != "history_bias"})
    torch.nn.init.constant_(off.history_bias, -torch.inf)
    for ours, theirs in zip(off.rollout(noise, numbers), none.rollout(noise, numbers), strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("kind", TEACHERS)
@torch.inference_mode()
def test_an_untrained_student_of_jumps_is_the_teacher_s_sampler(kind):
    teacher = TEACHERS[kind]()
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 4, 4), history_layers=0, output="jump")
    noise, numbers = torch.randn(2, *SHAPES[kind]), torch.tensor([3, 0])
    for ours, (theirs, _) in zip(student.rollout(noise, numbers), solve(teacher, noise, numbers, 4), strict=True):
        assert relative_error(ours, theirs) < 1e-5


@torch.inference_mode()
def test_padding_is_none_of_the_condition_and_the_prompt_is():
    teacher = text_teacher()
    student, table, noise = student_of(teacher), teacher.conditions, torch.randn(2, *WIDE)
    *_, sample = student.rollout(noise, table.take([0, 2]))
    longer = Condition.cat([table.take([0, 2]), table.take([1])]).index([0, 1])
    assert longer["tokens"].shape[1] == 5 > table.take([0, 2])["tokens"].shape[1]
    assert relative_error(list(student.rollout(noise, longer))[-1], sample) < 1e-5
    assert relative_error(list(student.rollout(noise, table.take([0, 3])))[-1][1], sample[1]) > 1e-2


@torch.inference_mode()
def test_one_backbone_takes_several_sizes():
    student = student_of(text_teacher())
    for shape in (WIDE, TALL, (3, 2, 2)):
        noise = torch.randn(1, *shape)
        assert student(noise[:, None].expand(-1, 4, -1, -1, -1), torch.tensor([1])).shape == (1, 4, *shape)
        assert [sample.shape for sample in student.rollout(noise, torch.tensor([1]))] == [(1, *shape)] * 4
    with pytest.raises(InputError, match=r"history of shape \(1, 4, 3, 5, 4\)"):
        student(torch.randn(1, 4, 3, 5, 4), torch.tensor([1]))
    with pytest.raises(InputError, match=r"expected \[B, 4, 2, 3, 2, 4\]"):
        student_of(video_teacher())(torch.randn(1, 4, 2, 3, 4, 2), torch.tensor([1]))


@pytest.mark.parametrize(
    ("kind", "network"), [("text", TextBackbone), ("text", TEXT), ("video", VideoBackbone), ("video", VIDEO)]
)
@torch.inference_mode()
def test_folders_are_read_by_the_class_or_its_name(kind, network, tmp_path: Path):
    teacher = TEACHERS[kind]()
    student = student_of(teacher, history_bias=-1.0)
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    read = Student.from_pretrained(tmp_path / "student", network=network)
    assert read.config == student.config
    numbers = [2, 0, 3]
    assert torch.equal(pyard.sample(read, numbers, seed=3), pyard.sample(student, numbers, seed=3))
    again = pyard.load_teacher(tmp_path / "teacher", network=network)
    assert again.fingerprint == NetworkTeacher(teacher.network, teacher.schedule, conditions=teacher.conditions).fingerprint
    for folder, read_it in ((tmp_path / "student", Student.from_pretrained), (tmp_path / "teacher", pyard.load_teacher)):
        with pytest.raises(InputError, match=r"uses the network own_backbones:.*give network="):
            read_it(folder)


def test_samples_do_not_depend_on_the_batch():
    student = student_of(text_teacher())
    together = pyard.sample(student, [0, 1, 2, 3, 4], seed=5)
    for size in (1, 2):
        assert relative_error(pyard.sample(student, [0, 1, 2, 3, 4], seed=5, batch_size=size), together) < 1e-5
    steps = pyard.sample(student, [0, 1, 2, 3, 4], seed=5, return_trajectory=True)
    assert steps.shape == (5, 4, *WIDE)
    assert torch.equal(steps[:, -1], together)
    table = student.require_conditions()
    assert torch.equal(pyard.sample(student, condition=table.take([0, 1, 2, 3, 4]), seed=5), together)
    with pytest.raises(InputError, match="exactly one of labels, prompts and condition"):
        pyard.sample(student, [0], condition=table.take([0]))
    half = pyard.sample(student, [0, 1, 2, 3, 4], seed=5, dtype="bfloat16")
    assert 0 < relative_error(half, together) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEACHERS)
def test_compiled_it_draws_the_same(kind):
    student = student_of(TEACHERS[kind](), history_bias=-0.3)
    plain, fast = (pyard.sample(student, [0, 1, 2], seed=5, compile=compiled) for compiled in (False, True))
    assert relative_error(fast, plain) < 1e-4
