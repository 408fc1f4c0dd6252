"""What an update computes: gradients, accumulation, precision, averages, rollouts; each against what it must equal."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path

import factories
import pytest
import torch
from dit_formulas import flops_of_passes
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pyard.cost.devices import peak_tflops
from pyard.cost.flops import student_flops, update_flops
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.models.history import ConcatenatingCache
from pyard.models.lora import add_lora
from pyard.models.student import Student
from pyard.storage.checkpoints import Checkpoints
from pyard.training import TrainConfig
from pyard.training.processes import Processes
from pyard.training.regression import Regression, own_history
from pyard.trajectories import TrajectoryBatch

S, B = 3, 8


def student(**settings) -> Student:
    teacher = factories.tiny_teacher(NoiseSchedule(kind="flow", prediction="velocity"))
    grid = TimeGrid.build(teacher.schedule, S, 6)
    made = Student.from_teacher(teacher, grid, **{"history_layers": 2, "history_bias": -1.0, **settings})
    factories.randomise(made, 1)
    return made


def batch(seed: int = 0, labels: list[int] | None = None) -> TrajectoryBatch:
    random = torch.Generator().manual_seed(seed)
    history, target = torch.randn(2, B, S, 2, 8, 8, generator=random)
    classes = torch.tensor(labels) if labels else torch.arange(B) % 5
    return TrajectoryBatch(history, target, classes)


def stage(model: Student | None = None, **settings) -> Regression:
    config = TrainConfig(teacher="", out=Path(), **{"num_steps": S, "batch_size": B, "grad_clip": 1e9, **settings})
    return Regression(config, model or student(), Processes())


def gradients(made: Regression, step: int = 1, data: TrajectoryBatch | None = None) -> dict[str, torch.Tensor]:
    made.compute(step, data or batch())
    return {name: p.grad.clone() for name, p in made.student.named_parameters() if p.grad is not None}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rel: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rel, atol=rel * float(b[name].abs().max()), msg=name)


@pytest.mark.parametrize("heads", ["per_step", "shared"])
@pytest.mark.parametrize(
    "rollout", [dict(), dict(rollout_probability=1.0, rollout_gradient="backprop")], ids=["forced", "backprop"]
)
def test_every_parameter_that_should_train_does(heads, rollout):
    made = stage(student(heads=heads), **rollout)
    in_optimizer = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in made.student.parameters()}
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    made.compute(1, batch(labels=[0, 1, 1, 2, 2, 0, 1, 2]))
    groups: dict[str, list[str]] = {}
    for name, parameter in made.student.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad if name == "trunk.label_embed.weight" else parameter.grad.flatten()[None]
        alive = rows.abs().sum(dim=1) > 0
        if name == "trunk.label_embed.weight":
            assert alive.tolist() == [True, True, True, False, False, False], "classes of the batch, and no others"
        else:
            assert bool(alive.all()), name
            assert float((parameter.grad != 0).float().mean()) > 0.99 or "time_embed" in name or "qkv.bias" in name, name
        groups.setdefault(".".join(name.split(".")[: 3 if "blocks" in name else 2]), []).append(name)
    heads_of = [f"heads.{i}" for i in range(S if heads == "per_step" else 1)]
    blocks = [f"trunk.blocks.{i}" for i in range(3)]
    assert set(groups) == {*heads_of, *blocks, "trunk.patch_embed", "trunk.time_embed", "trunk.label_embed", "history_bias"}
    made.apply()
    moved = {name for name, p in made.student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)
    assert torch.equal(made.student.trunk.label_embed.weight[3:], before["trunk.label_embed.weight"][3:])


def test_what_should_not_train_does_not():
    model = student()
    model.trunk.blocks[0].requires_grad_(False)  # as an adapter does with the weights below it
    frozen = copy.deepcopy(model.trunk.blocks[0].state_dict())
    made = stage(model)
    for step in (1, 2):
        made.compute(step, batch(step))
        made.apply()
    assert all(torch.equal(value, frozen[name]) for name, value in model.trunk.blocks[0].state_dict().items())
    assert "pos_embed" not in dict(model.trunk.named_parameters())


def test_low_rank_trains_its_additions_heads_and_bias_and_nothing_else():
    pytest.importorskip("peft")
    model = student()
    add_lora(model, 2)
    made = stage(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = {name for name in before if "lora_" in name or name.startswith("heads.") or name == "history_bias"}
    assert {name.split(".")[2] for name in wanted if "lora_" in name} == {"0", "1", "2"}, "every block, with history or without"
    in_optimizer = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for name, p in model.named_parameters() if name in wanted}
    for step in (1, 2):  # the second matrix of an addition starts at zero, so that the first gets no gradient before
        made.compute(step, batch(step))
        assert {name for name, p in model.named_parameters() if p.grad is not None} == wanted
        made.apply()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == wanted


@pytest.mark.parametrize("changes", [
    dict(gradient_accumulation=4), dict(activation_checkpointing=True),
    dict(rollout_probability=1.0, gradient_accumulation=2),
    dict(rollout_probability=1.0, rollout_gradient="backprop", activation_checkpointing=True),
], ids=lambda changes: ", ".join(changes))  # fmt: skip
def test_memory_savers_do_not_change_the_gradient(changes):
    plain = {k: v for k, v in changes.items() if k.startswith("rollout")}
    assert_close(gradients(stage(**changes)), gradients(stage(**plain)))


def test_activation_checkpointing_saves_memory():
    def kept(made: Regression) -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made.model(batch().history, batch().condition)
        return sum(sizes)

    assert kept(stage(activation_checkpointing=True)) < 0.5 * kept(stage())


def test_clipping():
    made = stage(grad_clip=0.1)
    measured = made.compute(1, batch())
    norm = torch.stack([p.grad.square().sum() for p in made.parameters]).sum().sqrt()
    assert float(measured.grad_norm) > 0.1
    assert float(norm) == pytest.approx(0.1, rel=1e-4)


def test_bf16_is_near_float32_and_trains_every_parameter():
    exact = gradients(stage())
    made = stage()
    made.processes = Processes("bf16")
    for settings in (dict(), dict(rollout_probability=1.0)):
        made.config = dataclasses.replace(made.config, **settings)
        reference = exact if not settings else gradients(stage(**settings))
        rough = gradients(made)
        made.optimizer.zero_grad()
        assert rough.keys() == reference.keys()
        for name in reference:
            error = (rough[name] - reference[name]).norm() / reference[name].norm()
            assert 0 < float(error) < 0.1, (name, float(error))


def test_fp16_without_a_gpu_is_refused():
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(InputError, match="needs a GPU; use 'bf16'"):
        Processes("fp16")


def test_fp16_scales_its_loss_and_skips_what_overflows():
    """float16 on the CPU, which `train` refuses for its speed: near float32 once the scale has come down far enough."""
    exact = gradients(stage())
    made = stage(max_skipped_in_a_row=100)
    made.processes._dtype = torch.float16
    made.processes.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    start = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    for step in range(1, 60):
        if made.compute(step, batch()).finite():
            break
        made.skip()
        assert all(torch.equal(p, start[name]) for name, p in made.student.named_parameters())
    assert 2 < step < 40
    assert made.processes.scaler.get_scale() == 2.0 ** (41 - step)
    rough = {name: p.grad for name, p in made.student.named_parameters()}
    for name in exact:
        assert float((rough[name] - exact[name]).norm() / exact[name].norm()) < 0.02, name
    made.apply()
    assert all(not torch.equal(p, start[name]) for name, p in made.student.named_parameters() if "label" not in name)


def test_loss_scale_is_in_the_checkpoint(tmp_path):
    """The third good update in a row doubles the scale: a resumed run must know of the two before."""

    def scaled(scale: float) -> Regression:
        processes = Processes()
        processes.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        return Regression(TrainConfig(teacher="", out=Path(), num_steps=S, batch_size=B), student(), processes)

    def update(one: Regression, step: int) -> float:
        assert one.compute(step, batch(step)).finite()
        one.apply()
        return one.processes.scaler.get_scale()

    made, resumed = scaled(32.0), scaled(4.0)
    assert [update(made, step) for step in (1, 2)] == [32.0, 32.0]
    Checkpoints(tmp_path).save(2, made.parts)
    Checkpoints(tmp_path).load(2, resumed.parts)
    for step in (3, 4):
        assert update(made, step) == update(resumed, step) == 64.0
    for (name, ours), theirs in zip(made.student.named_parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.cuda
def test_fp16_on_a_gpu_trains():
    made = stage(student().cuda(), mixed_precision="fp16")
    made.processes = Processes("fp16")
    before = made.student.heads[0].linear.weight.detach().clone()
    for step in range(1, 30):
        measured = made.compute(step, batch())
        if measured.finite():
            made.apply()
        else:
            made.skip()
    assert measured.finite()
    assert not torch.equal(before, made.student.heads[0].linear.weight)


def test_several_averages_follow_their_decays():
    made = stage(ema_decay=(0.5, 0.9), learning_rate=1e-2)
    reference = {
        decay: torch.optim.swa_utils.AveragedModel(made.student, multi_avg_fn=get_ema_multi_avg_fn(decay))
        for decay in (0.5, 0.9)
    }
    for step in range(1, 60):
        made.compute(step, batch(step))
        made.apply()
        for average in reference.values():
            average.update_parameters(made.student)
    # Both begin differently, for ours warms up; 0.5 has forgotten that by now.
    name = "heads.0.linear.weight"
    ours, theirs = (dict(e.module.named_parameters())[name] for e in (made.emas[0], reference[0.5]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert set(made.parts) >= {"ema", "ema-0.9"}
    slow = dict(made.emas[1].module.named_parameters())[name]
    assert not torch.allclose(slow, ours, rtol=1e-3)


@pytest.mark.parametrize(("schedule", "expected"), [
    ("constant", [1, 1, 1, 1]), ("constant_with_warmup", [0, 0.5, 1, 1]),
    ("linear", [0, 0.5, 1, 0.5]), ("cosine", [0, 0.5, 1, 0.5]),
])  # fmt: skip
def test_learning_rate_schedules(schedule, expected):
    warmup = 0 if schedule == "constant" else 2
    made = stage(lr_schedule=schedule, warmup_steps=warmup, max_steps=4, learning_rate=2.0)
    rates = []
    for _ in range(4):
        rates.append(made.optimizer.param_groups[0]["lr"] / 2.0)
        made.optimizer.step()
        made.skip()
    assert rates == pytest.approx(expected)


def test_own_history_is_what_sampling_sees():
    model, data = student().eval(), batch()
    own = own_history(model, data.history[:, 0], data.condition)
    rollout = torch.stack(list(model.rollout(data.history[:, 0], data.condition)), dim=1)
    assert torch.equal(own[:, 0], data.history[:, 0])
    torch.testing.assert_close(own[:, 1:], rollout[:, :-1], rtol=1e-4, atol=1e-5)


def test_rollout_fine_tuning_charges_the_rollout():
    """Both gradients are of the error of the same predictions: those of sampling."""
    model, data = student(), batch()
    rolled = torch.stack(list(copy.deepcopy(model).eval().rollout(data.history[:, 0], data.condition)), dim=1)
    expected = (rolled - data.target).square().mean(dim=(0, 2, 3, 4))
    for gradient in ("detach", "backprop"):
        measured = stage(copy.deepcopy(model), rollout_probability=1.0, rollout_gradient=gradient).compute(1, data)
        torch.testing.assert_close(measured.per_step, expected, rtol=1e-4, atol=1e-6)


def test_backpropagation_reaches_earlier_steps_and_detaching_does_not():
    """The last step's loss alone: its gradient at step 0's head is what flowed through the history."""
    weights = (0.0, 0.0, 1.0)
    detached = gradients(stage(rollout_probability=1.0, step_weights=weights))
    assert not detached["heads.0.linear.weight"].any()
    through = gradients(stage(rollout_probability=1.0, rollout_gradient="backprop", step_weights=weights))
    ours = through["heads.0.linear.bias"]
    # Against finite differences of the rollout's loss.
    model, data = student().eval().double(), batch()
    data = TrajectoryBatch(data.history.double(), data.target.double(), data.condition)
    bias = model.heads[0].linear.bias

    def loss() -> float:
        with torch.no_grad():
            *_, last = model.rollout(data.history[:, 0], data.condition, ConcatenatingCache())
        return float((last - data.target[:, -1]).square().mean())

    for i in (0, 3):
        with torch.no_grad():
            bias[i] += 1e-5
            above = loss()
            bias[i] -= 2e-5
            below = loss()
            bias[i] += 1e-5
        assert float(ours[i]) == pytest.approx((above - below) / 2e-5, rel=1e-3)


@pytest.mark.slow
def test_rollouts_are_drawn_for_their_share_of_updates():
    made = stage(rollout_probability=0.3)
    drawn = [made._rolls_out(step) for step in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(0.3, abs=0.04)
    assert drawn == [made._rolls_out(step) for step in range(2000)]
    assert not any(stage()._rolls_out(step) for step in range(50))


def test_fine_tuning_on_own_history_begins_when_it_is_told_to():
    made = stage(rollout_probability=1.0, rollout_start=3)
    assert [made._rolls_out(step) for step in range(1, 6)] == [False, False, False, True, True]


@pytest.mark.parametrize("mask", [dict(mask="causal"), dict(mask="anchor"), dict(history_layers=0)], ids=str)
def test_counted_flops_are_those_that_run(mask):
    model = student(**{"history_bias": None, **mask}).eval()
    assert student_flops(model) == flops_of_passes(model.config)
    assert stage(model).flops == update_flops(model, B) == 3 * B * flops_of_passes(model.config)


def test_peaks_of_known_devices():
    assert peak_tflops("NVIDIA H200", "bf16") == 989.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "no") == 19.5
    assert peak_tflops("NVIDIA L40S", "bf16") == 362.0
    assert peak_tflops("NVIDIA L40", "bf16") is None  # which is no L4
    assert peak_tflops("cpu", "no") is None
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_tflops("NVIDIA A100-SXM4-80GB", "no") == 156.0
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.slow
def test_compiled_student_has_the_same_gradients():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = gradients(stage(compile=True))
    assert_close(compiled, gradients(stage()), rel=1e-4)
