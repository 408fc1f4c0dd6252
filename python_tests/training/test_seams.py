"""Students of somebody else's backbones in training: both stages, LoRA, recomputation, shards, kills."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import with_products
from own_teachers import TEXT, VIDEO, save, text_teacher, video_teacher
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_runs import assert_same_run, kill_and_resume, start, train_in, wait

from pyard.cli.command_line import main
from pyard.models.student import Student
from pyard.storage.log import read_log
from pyard.training.regression import Regression
from pyard.trajectories import generate_trajectories

KINDS = {"text": (TEXT, text_teacher), "video": (VIDEO, video_teacher)}
EVERYTHING = dict(ema_decay=[0.9, 0.99], gradient_accumulation=2, rollout_probability=0.5, history_bias=-1.0)


PAIRS = [(kind, stage) for kind in KINDS for stage in ("regression", "adversarial")]


def one_fast_of_four(*fast: str) -> pytest.MarkDecorator:
    """Backbones times stages; all but one are slow."""
    marked = [pytest.param(*pair, marks=[] if pair == fast else [pytest.mark.slow]) for pair in PAIRS]
    return pytest.mark.parametrize(("shared", "stage"), marked, indirect=["shared"])


def made(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """`teacher/`, `store/` and `real.safetensors` in a folder, and the settings that every run has."""
    network, teacher = KINDS[kind][0], KINDS[kind][1]()
    save(teacher, folder / "teacher")
    generate_trajectories(teacher, folder / "store", 40, num_steps=3, teacher_steps=6, batch_size=20, progress=False)
    images = torch.randn(30, *teacher.sample_shape, generator=torch.Generator().manual_seed(3))
    save_file({"images": images, "labels": torch.arange(30) % teacher.conditions.count}, folder / "real.safetensors")
    return folder, dict(network=network)


@pytest.fixture(scope="module", params=KINDS)
def shared(request, tmp_path_factory):
    return made(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return made(tmp_path_factory.mktemp("text"), "text")


def adversarial(folder: Path, name: str = "first", **more: Any) -> dict[str, Any]:
    """Settings of the adversarial stage of the student in `folder`/`name`."""
    settings = dict(real=str(folder / "real.safetensors"), virtual_batch=4, width=8, kernel_size=3, warmup_steps=2, r1=0.1)
    settings |= dict(feature_matching=0.5, flips=True)
    return dict(stage="adversarial", student=str(folder / name), adversarial={**settings, **more}, ema_decay=[0.9, 0.99])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def assert_near(one: Path, two: Path, names: list[str], rel: float) -> None:
    for x, y in zip(read_log(one / "log.jsonl"), read_log(two / "log.jsonl"), strict=True):
        for name in names:
            assert x[name] == pytest.approx(y[name], rel=rel, abs=1e-5), (x["step"], name)
    a, b = weights(one), weights(two)
    assert max((a[key] - b[key]).abs().max() for key in b) < 1e-3


def test_every_parameter_learns(shared):
    folder, settings = shared
    run = train_in(folder, "learns", **settings, max_steps=30, learning_rate=1e-2, history_bias=-1.0, ema_decay=0.0)
    log = read_log(run / "log.jsonl")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    student = Student.from_pretrained(run, network=settings["network"])
    teacher = load_file(folder / "teacher" / "model.safetensors")
    tensors = {name: p for name, p in student.named_parameters() if name.startswith("trunk.")}
    assert tensors
    still = [name for name, tensor in tensors.items() if torch.equal(tensor, teacher[name])]
    assert not still
    assert (student.history_bias != -1.0).all()


def test_recomputed_activations_give_the_same_gradients(shared):
    folder, settings = shared
    settings = {**settings, "max_steps": 3, "rollout_probability": 1.0, "rollout_gradient": "backprop"}
    plain = train_in(folder, "plain", **settings)
    again = train_in(folder, "recomputed", **settings, activation_checkpointing=True)
    assert_near(plain, again, ["loss", "grad_norm"], 1e-4)


def test_lora_is_trained_and_merged(shared):
    folder, settings = shared
    run = train_in(folder, "lora", **settings, lora_rank=2, max_steps=4, save_every=2)
    student = Student.from_pretrained(run, network=settings["network"])
    teacher = load_file(folder / "teacher" / "model.safetensors")
    moved = {name for name, tensor in student.trunk.named_parameters() if not torch.equal(tensor, teacher[f"trunk.{name}"])}
    assert moved == {f"{name}.weight" for name in student.trunk.lora_targets()}
    words = ["consolidate", "--run", str(run), "--out", str(folder / "merged"), "--network", settings["network"]]
    assert main(words) == 0
    assert all(torch.equal(load_file(folder / "merged" / "model.safetensors")[key], x) for key, x in weights(run).items())


def test_adversarial_stage_goes_on_from_a_student(shared):
    folder, settings = shared
    train_in(folder, "first", **settings, max_steps=2, history_bias=-1.0)
    run = train_in(folder, "adversarial", **settings, **adversarial(folder), max_steps=6)
    log = read_log(run / "log.jsonl")
    assert len(log) == 6
    assert log[1]["generator_weight"] == 0 < log[2]["generator_weight"]
    assert all(line["discriminator"] > 0 and line["r1"] > 0 and line["feature_distance"] > 0 for line in log)
    # From here on the discriminators matter: without them the student ends elsewhere.
    alone = train_in(folder, "warm-up", **settings, **adversarial(folder, warmup_steps=1000), max_steps=6)
    assert max((weights(run)[key] - x).abs().max() for key, x in weights(alone).items()) > 1e-5
    some = train_in(folder, "some-blocks", **settings, **adversarial(folder, blocks=[1], depth=0), max_steps=2)
    assert len(read_log(some / "log.jsonl")) == 2


def test_adversarial_stage_from_the_command_line(text):
    folder, settings = text
    words = ["train", "--teacher", folder / "teacher", "--trajectories", folder / "store", "--network", settings["network"]]
    words += ["--num-steps", 3, "--batch-size", 8, "--progress", "false", "--max-steps", 2, "--log-every", 1]
    assert main([str(word) for word in [*words, "--out", folder / "begin"]]) == 0
    stage = ["--stage", "adversarial", "--student", folder / "begin", "--adversarial.real", folder / "real.safetensors"]
    stage += ["--adversarial.width", 8, "--adversarial.warmup-steps", 0, "--adversarial.kernel-size", 3]
    assert main([str(word) for word in [*words, *stage, "--out", folder / "go-on"]]) == 0
    assert all(line["generator_weight"] > 0 for line in read_log(folder / "go-on" / "log.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "stage"), PAIRS, indirect=["shared"])
def test_killed_and_resumed_is_bitwise_the_same(shared, stage):
    folder, settings = shared
    settings = {**settings, "max_steps": 16}
    if stage == "adversarial":
        train_in(folder, "begin", network=settings["network"], max_steps=2, history_bias=-1.0)
    settings |= adversarial(folder, "begin") if stage == "adversarial" else EVERYTHING
    whole = folder / f"whole-{stage}"
    assert set(wait(start(folder, whole.name, **settings))) == {0}
    killed = folder / "killed"
    if killed.exists():
        killed.rename(folder / "killed-before")
    assert len(kill_and_resume(folder, 1, 2, int.from_bytes(os.urandom(4), "little"), {**settings, "save_every": 3})) == 2
    assert_same_run(whole, killed)


def assert_in_shards() -> None:
    """In each process: what is trained and averaged are DTensors, of which this process holds a part."""
    apply = Regression.apply

    def checked(self: Regression) -> None:
        for module in (self.student, *self.averages):
            assert isinstance(module, FSDPModule)
            for name, parameter in module.named_parameters():
                assert isinstance(parameter, DTensor), name
        assert all(isinstance(p.grad, DTensor) for p in self.student.parameters())
        apply(self)

    Regression.apply = checked  # type: ignore[method-assign]


@pytest.mark.slow
@one_fast_of_four("text", "regression")
def test_in_shards_on_two_processes_it_is_equal_to_ddp(shared, stage):
    folder, settings = shared
    settings = {**settings, "max_steps": 4, "save_every": 2, "evaluate_every": 2, "evaluation_trajectories": 4}
    names = ["loss", "grad_norm"]
    if stage == "adversarial":
        train_in(folder, "begin", network=settings["network"], max_steps=2, history_bias=-1.0)
        settings |= adversarial(folder, "begin")
        names += ["generator", "generator_weight", "discriminator", "r1"]
    else:
        settings |= {**EVERYTHING, "rollout_gradient": "backprop", "activation_checkpointing": True}
    ddp, fsdp = folder / f"ddp-{stage}", folder / f"fsdp-{stage}"
    assert set(wait(start(folder, ddp.name, 2, **settings))) == {0}
    assert set(wait(start(folder, fsdp.name, 2, assert_in_shards, **settings, parallel="fsdp"))) == {0}
    assert_near(ddp, fsdp, names, 5e-3)
    words = ["consolidate", "--run", str(fsdp), "--out", str(folder / f"whole-{stage}"), "--network", settings["network"]]
    assert main(words) == 0
    consolidated = load_file(folder / f"whole-{stage}" / "model.safetensors")
    assert all(torch.equal(consolidated[key], tensor) for key, tensor in weights(fsdp).items())


@pytest.mark.slow
def test_killed_in_shards_and_resumed_is_the_same(text):
    folder, settings = text
    settings = {**settings, **EVERYTHING, "parallel": "fsdp", "max_steps": 16}
    assert set(wait(start(folder, "whole", 2, **settings))) == {0}
    assert kill_and_resume(folder, 2, 2, 5, {**settings, "save_every": 3})
    assert_same_run(folder / "whole", folder / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["text", pytest.param("video", marks=with_products)], indirect=True)
def test_compiled_it_learns_the_same(shared):
    folder, settings = shared
    plain = train_in(folder, "eager", **settings, max_steps=4, history_bias=-1.0)
    fast = train_in(folder, "compiled", **settings, max_steps=4, history_bias=-1.0, compile=True)
    assert_near(plain, fast, ["loss", "grad_norm"], 1e-3)
