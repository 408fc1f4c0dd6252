"""The adversarial stage against plain autograd, which needs no trick."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from training_runs import start, student_and_real_data, teacher_and_store, train_in, wait

from pyard.data.real_data import RealData, RealReader
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.ops import use_backend
from pyard.storage.log import read_log
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.training import AdversarialConfig, TrainConfig
from pyard.training.adversarial import Adversarial
from pyard.training.processes import Processes
from pyard.training.regression import Regression
from pyard.trajectories import TrajectoryBatch

S, B = 3, 8
SMALL = dict(virtual_batch=4, width=8, warmup_steps=0, flips=True)


def teacher(kind: str = "flow") -> NetworkTeacher:
    return factories.tiny_teacher(NoiseSchedule(kind="flow", prediction="velocity") if kind == "flow" else NoiseSchedule())


def stage(kind: str = "flow", student: dict | None = None, training: dict | None = None, **settings) -> Adversarial:
    made = teacher(kind)
    grid = TimeGrid.build(made.schedule, S, 6)
    model = Student.from_teacher(made, grid, **{"history_layers": 2, "target": "state", **(student or {})})
    factories.randomise(model, 1)
    config = TrainConfig(
        teacher="", out=Path(), num_steps=S, batch_size=B, grad_clip=1e9, stage="adversarial", student="x",
        adversarial=AdversarialConfig(**{**SMALL, **settings}), **(training or {}),
    )  # fmt: skip
    images = torch.randn(20, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    data = RealData(({"images": images, "labels": torch.arange(20) % 5},))
    return Adversarial(config, model, Processes(), made, RealReader(data, B, seed=5, flips=True))


def batch() -> TrajectoryBatch:
    history, target = torch.randn(2, B, S, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return TrajectoryBatch(history, target, torch.arange(B) % 5)


def losses(made: Adversarial, data: TrajectoryBatch) -> dict[str, torch.Tensor]:
    """Everything an update minimises, as one plain graph, with the draws of update 1."""
    prediction = made.student(data.history, data.condition)
    sides = made._draw(1, data.target[:, -1])
    real, labels = next(made.real)
    fake_seen, fake_condition = made.features(prediction[:, -1], sides.fake_noise, sides.times, data.condition)
    real_seen, real_condition = made.features(real, sides.real_noise, sides.times, labels)
    fake_logits, fake_hidden = made.discriminator(fake_seen, fake_condition)
    real_seen = [x.detach().requires_grad_() for x in real_seen]
    real_logits, real_hidden = made.discriminator(real_seen, real_condition)
    slopes = torch.autograd.grad(real_logits.sum(), real_seen, create_graph=True)
    groups = [torch.stack([g.mean(dim=(0, 2)) for g in h.split(4)]) for h in (*fake_hidden, *real_hidden)]
    K = len(fake_hidden)
    detached, _ = made.discriminator([x.detach() for x in fake_seen], fake_condition.detach())
    return {
        "mse": (prediction - data.target).square().mean(),
        "gan": -fake_logits.mean(),
        "match": torch.stack([(groups[k] - groups[K + k].detach()).square().mean() for k in range(K)]).mean(),
        "hinge": (1 - real_logits).clamp(min=0).mean() + (1 + detached).clamp(min=0).mean(),
        "r1": torch.stack([(s**2).sum(dim=(1, 2)).mean() for s in slopes]).mean(),
    }


@pytest.mark.parametrize("student", [
    dict(), dict(heads="shared"), dict(output="jump"), dict(output="jump", heads="shared"), dict(history_layers=0),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_gradients_are_those_of_the_plain_losses(kind, student):
    made = stage(kind, student, r1=0.3, feature_matching=0.7, weight=2.0, max_ratio=1e9)
    made.discriminator.eval()  # the power iteration stands still, so that both see the same weights
    plain = copy.deepcopy(made)
    measured = made.compute(1, batch())

    of = losses(plain, batch())
    last = plain.student.heads[-1].linear.weight
    gan = of["gan"] + 0.7 * of["match"]
    norms = [
        torch.autograd.grad(of[name] if name == "mse" else gan, last, retain_graph=True)[0].norm() for name in ("mse", "gan")
    ]
    weight = 2.0 * norms[0] / (norms[1] + 1e-4)
    torch.testing.assert_close(measured.more["generator_weight"], weight.detach(), rtol=1e-3, atol=0)
    parameters = dict(plain.student.named_parameters())
    expected = torch.autograd.grad(of["mse"] + weight.detach() * gan, list(parameters.values()), retain_graph=True)
    for (name, _), gradient in zip(parameters.items(), expected, strict=True):
        ours = made.student.get_parameter(name).grad
        torch.testing.assert_close(ours, gradient, rtol=2e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)
    heads = dict(plain.discriminator.named_parameters())
    expected = torch.autograd.grad(of["hinge"] + 0.3 * of["r1"], list(heads.values()))
    for (name, _), gradient in zip(heads.items(), expected, strict=True):
        ours = made.discriminator.get_parameter(name).grad
        torch.testing.assert_close(ours, gradient, rtol=1e-3, atol=1e-5, msg=name)
    for name, key in (("generator", "gan"), ("discriminator", "hinge"), ("r1", "r1"), ("feature_distance", "match")):
        torch.testing.assert_close(measured.more[name], of[key].detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(measured.loss, of["mse"].detach(), rtol=1e-5, atol=0)


class CountFlops(TorchDispatchMode):
    """As torch's FlopCounterMode, whose record of modules does not bear `autograd.grad`."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("settings", [
    dict(), dict(blocks=(1,)), dict(r1=0.3), dict(feature_matching=0.5, depth=2), dict(r1=0.3, depth=0, width=24),
], ids=str)  # fmt: skip
def test_counted_flops_are_those_that_run(settings):
    made = stage(**{"width": 48, **settings})
    with use_backend("reference"), sdpa_kernel(SDPBackend.MATH), CountFlops() as counter:
        made.compute(1, batch())
    assert made.flops == pytest.approx(counter.flops, rel=0.06)


def test_who_trains_and_who_does_not():
    made = stage()
    frozen = {name: value.clone() for name, value in made.features.teacher.network.state_dict().items()}
    before = [{name: p.detach().clone() for name, p in m.named_parameters()} for m in (made.student, made.discriminator)]
    for step in (1, 2):
        made.compute(step, batch())
        made.apply()
    # Virtual batch norm takes away whatever a bias before it adds.
    idle = {"trunk.label_embed.weight"} | {n for n in before[1] if n.endswith("conv.bias")}
    for module, old in zip((made.student, made.discriminator), before, strict=True):
        still = {name for name, p in module.named_parameters() if torch.equal(p, old[name])}
        assert still <= idle, still
    assert all(torch.equal(value, frozen[name]) for name, value in made.features.teacher.network.state_dict().items())
    assert all(p.grad is None for p in made.features.teacher.network.parameters())


@pytest.mark.parametrize("training", [
    dict(activation_checkpointing=True), pytest.param(dict(compile=True), marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_savers_of_memory_and_time_do_not_change_the_gradient(training):
    ours, plain = stage(r1=0.1, training=training), stage(r1=0.1)
    measured, reference = ours.compute(1, batch()), plain.compute(1, batch())
    for name, value in reference.more.items():
        torch.testing.assert_close(measured.more[name], value, rtol=1e-3, atol=1e-5, msg=name)
    for name, parameter in plain.student.named_parameters():
        theirs = parameter.grad
        torch.testing.assert_close(
            ours.student.get_parameter(name).grad, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()), msg=name
        )


@pytest.mark.parametrize("broken", ["target", "real"])
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_what_is_not_finite_on_either_side_changes_nothing(broken, precision):
    made = stage()
    if precision == "fp16":
        made.processes._dtype = torch.float16
        made.processes.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    data = batch()
    if broken == "target":
        data.target[:] = float("nan")
    else:
        made.real.data.shards[0]["images"][:] = 1e38  # a number, so that it is read; its square is not
    before = [{name: p.detach().clone() for name, p in m.named_parameters()} for m in (made.student, made.discriminator)]
    for step in (1, 2, 3):
        assert not made.compute(step, data).finite()
        made.skip()
    for module, old in zip((made.student, made.discriminator), before, strict=True):
        assert all(torch.equal(p, old[name]) for name, p in module.named_parameters())
    assert not made.optimizer.state
    assert not made.discriminator_optimizer.state


def test_fp16_comes_near_float32_and_skips_what_overflows():
    """float16 on the CPU, which `train` refuses for its speed; the gradients of single tokens need the loss scale, too."""
    settings = dict(weight=1.0, max_ratio=1e9, noise_levels=(0.3, 0.6))
    exact, made = stage(**settings), stage(**settings)
    exact.discriminator.eval(), made.discriminator.eval()
    exact.compute(1, batch())
    made.processes._dtype = torch.float16
    made.processes.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    start = {name: p.detach().clone() for m in (made.student, made.discriminator) for name, p in m.named_parameters()}
    scales = []
    while not made.compute(1, batch()).finite():
        scales.append(made.processes.scaler.get_scale())
        made.skip()
        made.real.load_state_dict({"position": 0})  # the same real data again
        assert all(torch.equal(p, start[name]) for m in (made.student, made.discriminator) for name, p in m.named_parameters())
    assert 2 < len(scales) < 45
    assert scales == [2.0 ** (40 - i) for i in range(len(scales))]
    for name, parameter in made.student.named_parameters():
        reference = exact.student.get_parameter(name).grad
        if reference.any():
            assert float((parameter.grad - reference).norm() / reference.norm()) < 0.1, name  # as of bf16


def test_weight_is_0_while_warming_up_and_clamped_after():
    plain = Regression.compute(stage(), 1, batch())
    for step in (1, 2):
        measured = stage(warmup_steps=2).compute(step, batch())
        assert float(measured.more["generator_weight"]) == 0
        assert float(measured.grad_norm) == pytest.approx(float(plain.grad_norm), rel=1e-5)
    assert float(stage(warmup_steps=2).compute(3, batch()).more["generator_weight"]) > 0
    clamped = stage(max_ratio=1e-3, weight=10.0)
    assert float(clamped.compute(1, batch()).more["generator_weight"]) == pytest.approx(1e-2)


def test_discriminators_learn_to_tell_apart():
    made = stage(weight=0.0, learning_rate=1e-2, noise_levels=(0.0, 0.1))
    made.real.data.shards[0]["images"][:] = 2 * torch.randn(20, 2, 1, 1)  # flat images, which the student's are not
    hinges = []
    for step in range(1, 41):
        hinges.append(float(made.compute(step, batch()).more["discriminator"]))
        made.apply()
    assert hinges[0] == pytest.approx(2.0, abs=0.3)
    assert sum(hinges[-5:]) / 5 < 1.4


def test_noise_levels_and_blocks():
    made = stage("ddpm", noise_levels=(0.25, 0.5), blocks=(2, 0))
    times = made.features.draw_times(500, torch.Generator().manual_seed(0))
    assert min(times) >= 249
    assert max(times) <= 500
    assert len(set(times)) > 150
    assert all(time == int(time) for time in times)
    features, _ = made.features(torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8), times[:4], torch.arange(4))
    assert len(features) == 2
    # The last block's output, put through the teacher's head, is the teacher's own prediction.
    every = stage("ddpm").features
    clean, noise = torch.randn(2, 3, 2, 8, 8)
    seen, condition = every(clean, noise, [500.0] * 3, torch.arange(3))
    network, schedule = every.teacher.network, every.teacher.schedule
    x = schedule.alpha(500.0) * clean + schedule.sigma(500.0) * noise
    from pyard.models.dit.network import unpatchify

    ours = unpatchify(network.head(seen[-1][:, None], condition[:, None]), 2, 2)[:, 0]
    torch.testing.assert_close(ours, every.teacher.predict(x, 500.0, torch.arange(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(blocks=(3,)), "the teacher has 3, numbered from 0"), (dict(virtual_batch=3), "a multiple of virtual_batch 3"),
    (dict(noise_levels=(0.5, 0.2)), "noise_levels"), (dict(blocks=(0, 0)), "blocks"), (dict(r1=-1.0), "r1 is -1"),
    (dict(width=0), "width is 0"), (dict(learning_rate=0.0), "learning_rate"), (dict(kernel_size=4), "kernel_size is 4"),
    (dict(kernel_size=-1), "kernel_size is -1"),
    (dict(kernel_size=35), r"kernel_size 35 reaches 17 tokens .* teacher.s 16; lower .*kernel_size to at most 33"),
], ids=str)  # fmt: skip
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        stage(**settings)


@pytest.mark.parametrize("settings", [dict(kernel_size=33), dict(kernel_size=35, depth=0)], ids=str)
def test_the_longest_kernel_that_fits_computes(settings):
    assert stage(**settings).compute(1, batch()).finite()


def test_stage_and_student_go_together(tmp_path):
    config = dict(teacher="", out=tmp_path)
    with pytest.raises(InputError, match="starts from a student"):
        TrainConfig(**config, stage="adversarial")
    assert TrainConfig(**config, student="x").stage == "regression"
    for settings in (dict(gradient_accumulation=2), dict(rollout_probability=0.5)):
        with pytest.raises(InputError, match="supports neither"):
            TrainConfig(**config, stage="adversarial", student="x", **settings)


@pytest.mark.slow
def test_one_process_and_two_see_the_same_losses(tmp_path):
    teacher_and_store(tmp_path)
    settings = {**student_and_real_data(tmp_path), "max_steps": 6}
    settings["adversarial"]["warmup_steps"] = 2
    train_in(tmp_path, "one", **settings)
    assert set(wait(start(tmp_path, "two", 2, **settings))) == {0}
    one, two = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "generator", "discriminator", "r1", "feature_distance", "generator_weight", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=5e-3, abs=1e-5), (a["step"], name)
    heads = [
        load_file(tmp_path / name / "checkpoints" / "step-0000006" / "discriminator.safetensors") for name in ("one", "two")
    ]
    assert max((heads[0][key] - heads[1][key]).abs().max() for key in heads[0]) < 2e-3


def test_settings_of_the_stage_ask_for_it(tmp_path):
    config = TrainConfig.of(dict(teacher="digits", out=tmp_path, student="first", adversarial=dict(weight=2.0)))
    assert config.stage == "adversarial"
    with pytest.raises(InputError, match="stage is 'adversarial' and student is None"):
        TrainConfig.of(dict(teacher="digits", out=tmp_path, adversarial=dict(weight=2.0)))
    with pytest.raises(InputError, match="adversarial has settings, but stage is 'regression'"):
        TrainConfig.of(dict(teacher="digits", out=tmp_path, stage="regression", adversarial=dict(weight=2.0)))


def test_student_of_another_teacher_is_refused(tmp_path):
    teacher_and_store(tmp_path)
    settings = student_and_real_data(tmp_path)
    student = Student.from_pretrained(tmp_path / "first")
    student.config = dataclasses.replace(student.config, teacher_fingerprint="0" * 64)
    student.save_pretrained(tmp_path / "other" / "student")
    with pytest.raises(InputError, match="was made from teacher 0000"):
        train_in(tmp_path, "run", **{**settings, "student": str(tmp_path / "other")})
