from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomise, tiny_student, tiny_teacher
from ops.tolerance import assert_as_exact_as_plain

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.models.history import ConcatenatingCache
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig
from pyard.ops.masks import visible
from pyard.teachers.guidance import solve
from pyard.training import TrainConfig

MASKS = [("diagonal", None), ("window", 1), ("window", 2), ("anchor", None), ("causal", None)]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def inputs(student: Student, batch: int = 3, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    history = torch.randn(batch, student.num_steps, *student.sample_shape, generator=generator)
    return history, torch.randint(student.num_classes, (batch,), generator=generator)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("history_layers", [0, 1, 2, 3])
@pytest.mark.parametrize(("mask", "window"), MASKS)
@torch.inference_mode()
def test_cached_rollout_equals_parallel_pass(num_steps, history_layers, mask, window):
    student = tiny_student(num_steps, history_layers=history_layers, mask=mask, window=window)
    history, labels = inputs(student)
    for cache in (student.new_cache(len(history)), ConcatenatingCache()):
        rollout = list(student.rollout(history[:, 0], labels, cache))
        seen = torch.stack([history[:, 0], *rollout[:-1]], dim=1)
        assert relative_error(torch.stack(rollout, dim=1), student(seen, labels)) < 1e-5


@pytest.mark.parametrize("settings", [
    dict(heads="shared"), dict(target="state"), dict(target="state", output="jump"), dict(history_bias=-1.5),
    dict(target="state", output="jump", heads="shared", history_bias=0.5),
])  # fmt: skip
@torch.inference_mode()
def test_cached_rollout_equals_parallel_pass_with_options(settings):
    student = tiny_student(4, history_layers=2, **settings)
    history, labels = inputs(student)
    rollout = list(student.rollout(history[:, 0], labels))
    seen = torch.stack([history[:, 0], *rollout[:-1]], dim=1)
    assert relative_error(torch.stack(rollout, dim=1), student(seen, labels)) < 1e-5


@pytest.mark.parametrize(("mask", "window"), MASKS)
@torch.inference_mode()
def test_a_step_sees_exactly_the_steps_of_its_mask(mask, window):
    # One history layer: with more, what a step sees reaches further through the steps between.
    student = tiny_student(4, history_layers=1, mask=mask, window=window)
    history, labels = inputs(student)
    before = student(history, labels)
    for changed in range(4):
        other = history.clone()
        other[:, changed] += 1.0
        moved = (student(other, labels) - before).abs().amax(dim=(0, 2, 3, 4)) > 1e-4
        assert moved.tolist() == [visible(mask, step, changed, window) for step in range(4)]


@torch.inference_mode()
def test_without_history_layers_steps_are_independent_and_labels_matter():
    student = tiny_student(4, history_layers=0)
    history, labels = inputs(student)
    before = student(history, labels)
    other = history.clone()
    other[:, 0] += 1.0
    assert torch.equal(student(other, labels)[:, 1:], before[:, 1:])
    assert (student(history, (labels + 1) % student.num_classes) - before).abs().max() > 1e-3


@pytest.mark.parametrize("schedule", [
    NoiseSchedule(), NoiseSchedule(prediction="v_prediction", rescale_betas_zero_snr=True),
    NoiseSchedule(kind="flow", prediction="velocity"), NoiseSchedule(kind="flow", prediction="velocity", shift=3.0),
], ids=["eps", "v, zero SNR", "flow", "shifted flow"])  # fmt: skip
@pytest.mark.parametrize("num_steps", [1, 2, 4])
@torch.inference_mode()
def test_untrained_jump_student_without_history_is_the_teachers_sampler(schedule, num_steps):
    # With n = S teacher steps, grid and solver visit the same times.
    teacher = tiny_teacher(schedule)
    grid = TimeGrid.build(schedule, num_steps, teacher_steps=num_steps)
    student = Student.from_teacher(teacher, grid, history_layers=0, target="state", output="jump")
    noise, labels = torch.randn(3, *teacher.sample_shape), torch.tensor([0, 3, 4])
    teacher_states = [state for state, _ in solve(teacher, noise, labels, num_steps)]
    for ours, theirs in zip(student.rollout(noise, labels), teacher_states, strict=True):
        assert relative_error(ours, theirs) < 2e-5


@torch.inference_mode()
def test_bias_of_minus_infinity_is_the_diagonal_mask():
    with_bias = tiny_student(3, history_layers=2, history_bias=0.0)
    assert with_bias.history_bias is not None
    with_bias.history_bias.fill_(-1e4)
    diagonal = tiny_student(3, history_layers=2, mask="diagonal")
    diagonal.load_state_dict({k: v for k, v in with_bias.state_dict().items() if k != "history_bias"})
    history, labels = inputs(with_bias)
    assert relative_error(with_bias(history, labels), diagonal(history, labels)) < 1e-5


def test_every_parameter_gets_a_gradient():
    student = tiny_student(3, history_layers=2, history_bias=-1.0).train()
    history, labels = inputs(student, batch=8)
    student(history, labels).square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_variance_channels_of_the_teacher_are_dropped():
    teacher = tiny_teacher(out_channels=4)
    x, labels = torch.randn(2, *teacher.sample_shape), torch.tensor([1, 2])
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 1, 12), history_layers=0)
    with torch.inference_mode():
        ours = student(x[:, None], labels)[:, 0]
        theirs = teacher.predict(x, 999.0, labels)
    assert ours.shape == x.shape
    assert relative_error(ours, theirs) < 1e-6


def test_saved_student_is_the_same_student(tmp_path: Path):
    student = tiny_student(3, history_layers=2, mask="window", window=2, history_bias=-2.0)
    student.save_pretrained(tmp_path / "run" / "student")
    history, labels = inputs(student)
    for path in (tmp_path / "run", tmp_path / "run" / "student"):
        again = Student.from_pretrained(path)
        assert again.config == student.config
        with torch.inference_mode():
            assert torch.equal(again(history, labels), student(history, labels))
    randomise(student, seed=5)
    student.save_pretrained(tmp_path / "run" / "student")  # replaces the folder
    with torch.inference_mode():
        assert torch.equal(Student.from_pretrained(tmp_path / "run")(history, labels), student(history, labels))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["student"]


def test_damaged_folders_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no config\.json"):
        Student.from_pretrained(tmp_path)
    tiny_student(2, history_layers=1).save_pretrained(tmp_path / "student")
    weights = tmp_path / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cut off"):
        Student.from_pretrained(tmp_path)
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="holds a NetworkTeacher; expected a Student"):
        Student.from_pretrained(tmp_path / "teacher")


@pytest.mark.parametrize(("changes", "message"), [
    (dict(history_layers=4), "has 3 layers"),
    (dict(mask="window"), "window"),
    (dict(mask="causal", window=2), "window"),
    (dict(mask="dense"), "dense"),
    (dict(target="velocity"), "target is 'velocity'"),
    (dict(target="denoised", output="jump"), "needs target 'state'"),
    (dict(heads="two"), "heads is 'two'"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        tiny_student(4, **{"history_layers": 1, **changes})


def test_config_survives_json():
    config = tiny_student(4, history_layers=1, target="state").config
    assert StudentConfig.from_json(config.to_json()) == config
    assert config.grid.embed_times == config.grid.times[:-1]


def test_state_targets_of_three_steps_and_more_jump_unless_told_otherwise():
    assert tiny_student(3, history_layers=1, target="state").config.output == "jump"
    assert tiny_student(3, history_layers=1, target="state", output="direct").config.output == "direct"
    assert tiny_student(2, history_layers=1, target="state").config.output == "direct"
    assert tiny_student(4, history_layers=1, target="denoised").config.output == "direct"
    teacher = tiny_teacher()
    config = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 4, 12), history_layers=1).config
    assert (config.target, config.output) == ("state", "jump")


def test_history_of_another_shape_is_refused():
    student = tiny_student(4, history_layers=1)
    with pytest.raises(InputError, match=r"expected \[B, 4, 2, 8, 8\]"):
        student(torch.zeros(1, 3, 2, 8, 8), torch.tensor([0]))


UNEVEN = dict(state_index=[0, 1, 5, 12], denoised_index=[2, 9], embed_times=[990.5, 700.25, 3.0])


@pytest.mark.parametrize("settings", [dict(), dict(target="state", output="jump")], ids=str)
@torch.inference_mode()
def test_cached_rollout_equals_parallel_pass_on_an_uneven_grid(settings, tmp_path: Path):
    teacher = tiny_teacher()
    grid = TimeGrid.build(teacher.schedule, 3, 12, **UNEVEN)
    student = Student.from_teacher(teacher, grid, history_layers=2, **settings)
    randomise(student, 1)
    history, labels = inputs(student)
    rollout = list(student.rollout(history[:, 0], labels))
    seen = torch.stack([history[:, 0], *rollout[:-1]], dim=1)
    assert relative_error(torch.stack(rollout, dim=1), student(seen, labels)) < 1e-5
    student.save_pretrained(tmp_path / "student")
    assert Student.from_pretrained(tmp_path).config.grid == student.config.grid
    even = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 3, 12), history_layers=2, **settings)
    even.load_state_dict(student.state_dict())
    assert relative_error(even(seen, labels), student(seen, labels)) > 1e-4


@pytest.mark.parametrize("settings", [
    dict(), dict(mask="window", window=2), dict(mask="anchor", heads="shared"), dict(target="state", output="jump"),
    dict(target="state", output="jump", history_bias=-1.5),
], ids=str)  # fmt: skip
@torch.inference_mode()
def test_rollout_in_bfloat16_is_as_exact_as_the_parallel_pass(settings):
    student = tiny_student(4, history_layers=2, **settings).to(torch.bfloat16)
    exact = copy.deepcopy(student).double()
    history, labels = inputs(student)
    rollout = list(student.rollout(history[:, 0], labels))
    seen = torch.stack([history[:, 0], *rollout[:-1]], dim=1).float()
    assert_as_exact_as_plain(torch.stack(rollout, dim=1), student(seen, labels), exact(seen.double(), labels))
    assert student.embed_times.dtype == torch.float32


@pytest.mark.parametrize("num_steps", [1, 4])
@torch.inference_mode()
def test_jumps_are_float32_in_any_precision(num_steps):
    # a_s is 157 at S = 1: a bfloat16 product of it and the noise would be off by half.
    student = tiny_student(num_steps, history_layers=1, target="state", output="jump").to(torch.bfloat16)
    for head in student.heads:
        for parameter in head.linear.parameters():
            parameter.zero_()
    history, labels = inputs(student)
    out = student(history, labels)
    assert out.dtype == torch.float32
    scales = torch.tensor([a for a, _ in student.jumps])[:, None, None, None]
    assert relative_error(out, scales * history) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(student.float()(history, labels), scales * history) < 1e-6


@pytest.mark.parametrize("settings", [dict(mask="diagonal"), dict(history_bias=-1e4)], ids=str)
@pytest.mark.parametrize("num_steps", [1, 4])
@torch.inference_mode()
def test_with_the_history_masked_out_a_fresh_student_is_the_teachers_jump(settings, num_steps):
    teacher = tiny_teacher()
    grid = TimeGrid.build(teacher.schedule, num_steps, teacher_steps=12)
    student = Student.from_teacher(teacher, grid, history_layers=3, target="state", output="jump", **settings)
    history, labels = inputs(student)
    out = student(history, labels)
    for s, (time, later) in enumerate(itertools.pairwise(grid.times)):
        a, b = teacher.schedule.jump_coefficients(time, later)
        jump = a * history[:, s] + b * teacher.predict(history[:, s], time, labels)
        assert relative_error(out[:, s], jump) < 2e-5
    # With its history, the untrained student is not the teacher: the bias or the mask is what keeps the start.
    if num_steps > 1:
        seeing = Student.from_teacher(teacher, grid, history_layers=3, target="state", output="jump", history_bias=None)
        assert relative_error(seeing(history, labels)[:, 1:], out[:, 1:]) > 1e-3


def test_a_rollout_reads_every_modulation_once() -> None:
    """The modulations of all steps come from one product; the samples are those of single steps, up to rounding."""
    student = tiny_student(history_layers=2, history_bias=0.5)
    noise, labels = torch.randn(2, *student.sample_shape), torch.tensor([1, 0])
    calls = []
    for block in student.trunk.blocks:
        block.modulation.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        ours = list(student.rollout(noise, labels))
        assert len(calls) == student.config.network.depth
        cache, latest, expected = student.new_cache(len(noise)), noise, []
        for step in range(student.num_steps):
            latest, cache = student.step(latest, step, labels, cache)
            expected.append(latest)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_rollout_with_gradients_leaves_the_modulations_to_the_blocks() -> None:
    student = tiny_student(history_layers=1)
    calls = []
    student.trunk.blocks[0].modulation.register_forward_hook(lambda *_: calls.append(1))
    list(student.rollout(torch.randn(1, *student.sample_shape), torch.tensor([0])))
    assert len(calls) == student.num_steps


@pytest.mark.parametrize(("num_steps", "target"), [(4, "state"), (2, "state"), (4, "denoised")])
def test_all_three_ways_of_making_a_student_have_the_same_defaults(num_steps: int, target: Any) -> None:
    teacher = tiny_teacher(depth=5)
    grid = TimeGrid.build(teacher.schedule, num_steps, 12)
    made = Student.from_teacher(teacher, grid, target=target).config
    alone = StudentConfig(teacher.network.config, grid.for_target(target), teacher.schedule, target=target)
    settings = TrainConfig(teacher="", out=Path(), num_steps=num_steps, target=target).resolved(5)
    for name in ("history_layers", "mask", "window", "target", "output", "heads", "history_bias"):
        assert getattr(made, name) == getattr(alone, name) == getattr(settings, name)
    assert StudentConfig.from_json(json.loads(json.dumps(alone.to_json()))) == alone
    assert alone.history_layers == 2
    expected = ("jump", -4.0) if (num_steps, target) == (4, "state") else ("direct", None)
    assert (alone.output, alone.history_bias) == expected
