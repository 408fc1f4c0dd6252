"""A pass with some of the steps above the history, against the whole pass: averages over all subsets, memory, bad input."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from torch import nn

from pyard.conditions import Condition
from pyard.cost.flops import student_flops, subset_flops
from pyard.cost.memory import student_activations
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.models.lora import add_lora
from pyard.models.step_subset import StepSubset
from pyard.models.student import Student
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.training.config import TrainConfig
from pyard.training.processes import Processes
from pyard.training.regression import Regression
from pyard.trajectories import TrajectoryBatch

sys.path.append(str(Path(__file__).parent / "wrapped"))
from tiny_transformers import NAMES, tiny_condition, tiny_network

FLOW = NoiseSchedule(kind="flow", prediction="velocity")
LABEL = Condition({"label": torch.zeros(1, dtype=torch.int64)})


class TwoPrompts:
    """The conditions of a tiny text-to-image network."""

    count, fingerprint, free_sizes = 2, "two prompts", {}

    def __init__(self, name: str):
        self.name = name

    def take(self, numbers: Sequence[int]) -> Condition:
        return tiny_condition(self.name).index(torch.tensor(numbers))


def student_of(name: str, steps: int = 3, history_layers: int | str = 1, **settings: Any) -> Student:
    """A student with every parameter random; `all` layers remember, or so many."""
    teacher = (
        factories.tiny_teacher(FLOW) if name == "dit" else NetworkTeacher(tiny_network(name), FLOW, conditions=TwoPrompts(name))
    )
    layers = teacher.network.config.depth if history_layers == "all" else history_layers
    settings = {"history_bias": -1.0 if layers else None, "output": "jump", **settings}
    made = Student.from_teacher(teacher, TimeGrid.build(FLOW, steps, 6 * steps), history_layers=layers, **settings)
    if name == "dit":
        factories.randomise(made, 1)
    else:
        for number, module in enumerate((*made.heads, made)):
            for parameter in module.parameters() if number < len(made.heads) else [made.history_bias]:
                if parameter is not None:
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                    parameter.data += 0.1 * noise
    return made


def batch_of(name: str, size: int = 2, steps: int = 3, lengths: tuple[int, ...] = (5, 3)) -> TrajectoryBatch:
    random = torch.Generator().manual_seed(3)
    channels = 2 if name == "dit" else 4
    history, target = torch.randn(2, size, steps, channels, 8, 8, generator=random)
    condition = Condition({"label": torch.arange(size) % 5}) if name == "dit" else tiny_condition(name, lengths)
    return TrajectoryBatch(history, target, condition)


def stage_of(student: Student, batch: TrajectoryBatch, k: int | None, **settings: Any) -> Regression:
    size, steps = batch.history.shape[:2]
    weights = tuple(float(1 + s) for s in range(steps))
    config = TrainConfig(
        teacher="",
        out=Path(),
        num_steps=steps,
        batch_size=size,
        grad_clip=1e9,
        steps_per_update=k,
        step_weights=weights,
        **settings,
    )
    return Regression(config, student, Processes())


def updates(stage: Regression, batch: TrajectoryBatch, subsets: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Loss and gradients of one update, or the mean of those with given subsets."""
    totals: dict[str, torch.Tensor] = {}
    for subset in subsets:
        stage.optimizer.zero_grad()
        if stage.steps is not None:
            stage._drawn_steps = lambda step, count, subset=subset: torch.tensor(subset)  # type: ignore[method-assign]
        found = {"loss": stage.compute(1, batch).loss}
        found |= {name: p.grad for name, p in stage.student.named_parameters() if p.grad is not None}
        for name, value in found.items():
            totals[name] = totals.get(name, 0) + value.detach().double() / len(subsets)
    return totals


def assert_averages_to_the_whole(make: Callable[[], Student], batch: TrajectoryBatch, *counts: int, **settings: Any) -> None:
    steps = batch.history.shape[1]
    whole = updates(stage_of(make(), batch, None, **settings), batch, [()])
    for k in counts:
        stage = stage_of(make(), batch, k, **settings)
        average = updates(stage, batch, list(itertools.combinations(range(steps), k)))
        assert average.keys() == whole.keys(), "the same parameters get a gradient"
        # The bias of keys changes no attention, so that its gradient is rounding alone.
        rounding = 1e-6 * max(float(expected.norm()) for expected in whole.values())
        for name, expected in whole.items():
            error = float((average[name] - expected).norm())
            assert error <= 1e-5 * float(expected.norm()) + rounding, (name, k, error)
        one = updates(stage, batch, [tuple(range(k))])
        assert float((one["loss"] - whole["loss"]).abs()) > 1e-3 * float(whole["loss"]), "a subset alone is something else"


HISTORIES: list[tuple[Any, str]] = [(1, "per_step"), ("all", "per_step"), (1, "shared"), (0, "per_step")]


@pytest.mark.parametrize(
    ("name", "history_layers", "heads"),
    [
        pytest.param(name, *history, marks=() if name == "dit" or i == n % len(HISTORIES) else pytest.mark.slow)
        for n, name in enumerate(("dit", *NAMES))
        for i, history in enumerate(HISTORIES)
    ],
)
def test_the_average_over_all_subsets_is_the_whole_update(name: str, history_layers: Any, heads: str) -> None:
    def make() -> Student:
        return student_of(name, history_layers=history_layers, heads=heads)

    assert_averages_to_the_whole(make, batch_of(name), 1, 2)


@pytest.mark.parametrize(
    "settings",
    [dict(mask="window", window=2), dict(mask="anchor"), dict(mask="diagonal"), dict(output="direct", target="denoised")],
    ids=str,
)
@pytest.mark.parametrize("name", ["dit", pytest.param("sd3", marks=pytest.mark.slow)])
def test_with_every_mask_and_output(name: str, settings: dict[str, Any]) -> None:
    make = lambda: student_of(name, 4, 2, **settings)  # noqa: E731
    assert_averages_to_the_whole(make, batch_of(name, steps=4), 2)


@pytest.mark.parametrize(
    "settings",
    [
        dict(activation_checkpointing=True),
        dict(gradient_accumulation=2),
        dict(rollout_probability=1.0),
        dict(loss="pseudo_huber"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_with_other_settings_of_the_update(name: str, settings: dict[str, Any]) -> None:
    assert_averages_to_the_whole(lambda: student_of(name), batch_of(name), 2, **settings)


@pytest.mark.parametrize(("name", "size", "tokens"), [("flux", 5, 4), ("qwen_image", 4, 5), ("qwen_image", 4, 4)])
def test_tables_that_happen_to_have_as_many_rows_are_left_alone(name: str, size: int, tokens: int) -> None:
    """Positions of 16 image tokens, and of 4 text tokens with them, beside B * S = 16 and 20 rows."""
    batch = batch_of(name, size, 4, (tokens,) * size)
    assert_averages_to_the_whole(lambda: student_of(name, 4), batch, 1)


def test_with_low_rank_additions() -> None:
    pytest.importorskip("peft")

    def make() -> Student:
        student = student_of("sd3")
        torch.manual_seed(4)
        add_lora(student, 2)
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        return student

    assert_averages_to_the_whole(make, batch_of("sd3"), 1)


def test_other_passes_of_the_student_are_what_they_were() -> None:
    plain, hooked = student_of("flux"), student_of("flux")
    batch = batch_of("flux")
    subset = StepSubset(hooked)
    with torch.no_grad():
        expected = plain(batch.history, batch.condition)
        some = subset(batch.history, batch.condition, torch.tensor([0, 2]))
        torch.testing.assert_close(some, expected[:, [0, 2]], rtol=1e-5, atol=1e-5)
        assert torch.equal(hooked(batch.history, batch.condition), expected)
        assert torch.equal(subset(batch.history, batch.condition, torch.arange(3)), expected)
        for ours, theirs in zip(*(s.rollout(batch.history[:, 0], batch.condition) for s in (hooked, plain)), strict=True):
            assert torch.equal(ours, theirs)


def saved_bytes(student: Student, batch: TrajectoryBatch, kept: torch.Tensor) -> float:
    """What autograd keeps of a pass, in bytes."""
    subset = StepSubset(student)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*student.parameters(), *student.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prediction = subset(batch.history, batch.condition, kept)
    total = sum(storage.nbytes() for storage in storages.values())
    del prediction
    return total


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_memory_falls_with_the_steps_and_is_what_is_estimated(name: str) -> None:
    one = LABEL if name == "dit" else tiny_condition(name, (5,))
    student, saved, counted = student_of(name, 4), {}, {}
    for k in (1, 2, 4):
        few, many = (saved_bytes(student, batch_of(name, size, 4, (5,) * size), torch.arange(k)) for size in (2, 8))
        saved[k], counted[k] = (many - few) / 6, student_activations(student, one, device_type="cpu", steps=k)
        assert counted[k].everything == pytest.approx(saved[k], rel=0.02)
    # One of three or four layers sees all steps.
    assert saved[1] < 0.8 * saved[2] < 0.65 * saved[4]
    for checkpointing in (False, True):
        peaks = [counted[k].peak(checkpointing) for k in (1, 2, 4)]
        assert peaks[0] < peaks[1] < peaks[2]


def test_operations_fall_by_those_of_the_upper_layers() -> None:
    counts = {n: [subset_flops(student_of("dit", 4, n), LABEL, k) for k in (1, 2, 4)] for n in (0, 1, "all")}
    for n, (one, two, four) in counts.items():
        assert four == student_flops(student_of("dit", 4, n), LABEL)
        assert four - two == 2 * (two - one), "every step costs the same above the history"
    # Without a history all three blocks are left out, with one in one layer two of them.
    saved = {n: two - one for n, (one, two, _) in counts.items()}
    assert saved["all"] == 0 < saved[1] < saved[0]
    assert saved[1] == pytest.approx(saved[0] * 2 / 3)


def test_a_backbone_that_does_not_say_what_its_rows_are_is_refused() -> None:
    student = student_of("dit")
    student.trunk.__class__ = type("Unknown", (type(student.trunk),), {"row_arguments": None})
    with pytest.raises(InputError, match=r"steps_per_update: Unknown does not say which arguments .* set .* row_arguments"):
        StepSubset(student)
    student.trunk.__class__ = type("Wrong", (type(student.trunk),), {"row_arguments": ("condition",), "folds_steps": True})
    batch = batch_of("dit")
    with pytest.raises(InputError, match=r"argument condition of a block has shape \(2, 3, 32\); expected 6 rows"):
        StepSubset(student)(batch.history, batch.condition, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps_per_update=0), "steps_per_update is 0; expected 1 to 4"),
        (dict(steps_per_update=5), "steps_per_update is 5; expected 1 to 4"),
        (dict(steps_per_update=2, stage="adversarial", student="run"), "steps_per_update is for the regression"),
        (dict(steps_per_update=2, rollout_probability=0.5, rollout_gradient="backprop"), "use rollout_gradient 'detach'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(teacher="", out=Path(), **settings)


def test_the_subset_is_that_of_the_seed_and_the_update() -> None:
    batch = batch_of("dit", steps=4)
    stages = [stage_of(student_of("dit", 4), batch, 2, seed=seed) for seed in (0, 0, 1)]
    drawn = [[tuple(stage._drawn_steps(step, 2).tolist()) for step in range(1, 400)] for stage in stages]
    assert drawn[0] == drawn[1] != drawn[2]
    counts = {subset: drawn[0].count(subset) for subset in itertools.combinations(range(4), 2)}
    assert sum(counts.values()) == 399
    assert min(counts.values()) > 40, "every subset is drawn, about as often as another"
    measured = stages[0].compute(7, batch).per_step
    assert tuple(torch.isfinite(measured).nonzero().flatten().tolist()) == drawn[0][6]
