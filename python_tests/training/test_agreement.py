"""What is given beside a store or a student must agree with it, what is not comes from it, and settings.yaml has both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import tiny_teacher
from safetensors.torch import load_file

from pyard.cli.command_line import main
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.storage.checkpoints import Checkpoints
from pyard.storage.log import read_log
from pyard.training import TrainConfig, train
from pyard.training.agreement import agree_with_stores
from pyard.trajectories import TrajectoryStore, generate_trajectories

FLOW = NoiseSchedule(kind="flow", prediction="velocity")
OF_THE_STORE = {
    "num_steps": 3, "num_trajectories": 24, "teacher_steps": 6, "solver": "heun", "cfg_scale": 2.5, "cfg_channels": 1,
    "trajectory_dtype": "bfloat16", "trajectory_keep": "both", "trajectory_precision": "float32",
}  # fmt: skip
QUICK: dict[str, Any] = dict(max_steps=2, batch_size=8, progress=False, trackers="none")


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    """In `tmp_path`/store, of the teacher in `tmp_path`/teacher."""
    teacher = tiny_teacher(FLOW)
    teacher.save_pretrained(tmp_path / "teacher")
    return generate(tmp_path / "store")


def generate(path: Path, **changes: Any) -> TrajectoryStore:
    settings = dict(num_steps=3, teacher_steps=6, solver="heun", cfg_scale=2.5, cfg_channels=1, dtype="bfloat16", batch_size=8)
    return generate_trajectories(tiny_teacher(FLOW), path, 24, progress=False, **{**settings, **changes})


def recorded(run: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((run / "settings.yaml").read_text())
    return settings


@pytest.mark.parametrize(
    ("name", "value", "theirs"),
    [
        ("num_steps", 4, "3"), ("num_trajectories", 8, "24"), ("teacher_steps", 9, "6"), ("solver", "euler", "heun"),
        ("cfg_scale", 1.0, "2.5"), ("cfg_channels", 2, "1"), ("trajectory_dtype", "float32", "bfloat16"),
        ("trajectory_keep", "state", "both"), ("trajectory_precision", "bfloat16", "float32"),
    ],
)  # fmt: skip
def test_what_differs_from_the_store_is_refused_naming_both(store, tmp_path, capsys, name, value, theirs):
    with pytest.raises(InputError, match=rf"{name} is {value}, but {theirs} in the trajectories in .*store") as refused:
        train(tmp_path / "teacher", store, out=tmp_path / "run", **{name: value}, **QUICK)
    assert "\n" not in str(refused.value)
    words = ["--teacher", tmp_path / "teacher", "--trajectories", tmp_path / "store", "--out", tmp_path / "run"]
    assert main(["train", *map(str, words), f"--{name}", str(value)]) == 2
    assert f"--{name} is {value}, but {theirs} in" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({name: value}))
    assert main(["train", "--config", str(recipe), *map(str, words)]) == 2
    assert f"--{name} is {value}, but {theirs} in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_not_given_comes_from_the_store_and_is_recorded(store, tmp_path):
    train(tmp_path / "teacher", store, out=tmp_path / "run", **QUICK)
    settings = recorded(tmp_path / "run")
    assert {name: settings[name] for name in OF_THE_STORE} == OF_THE_STORE
    student = Student.from_pretrained(tmp_path / "run")
    assert (student.num_steps, student.config.cfg_scale, student.config.solver) == (3, 2.5, "heun")
    # The same, given: as these settings, and as the file that they were recorded in.
    train(tmp_path / "teacher", store, out=tmp_path / "again", **QUICK, **OF_THE_STORE)
    assert recorded(tmp_path / "again") == {**settings, "out": str(tmp_path / "again")}
    before = (tmp_path / "run" / "student" / "model.safetensors").read_bytes()
    assert main(["train", "--config", str(tmp_path / "run" / "settings.yaml")]) == 0
    assert (tmp_path / "run" / "student" / "model.safetensors").read_bytes() == before


def test_a_run_that_generates_records_what_it_generated(tmp_path):
    train(tiny_teacher(FLOW), out=tmp_path / "run", num_trajectories=16, solver="heun", num_steps=2, teacher_steps=4, **QUICK)
    settings = recorded(tmp_path / "run")
    assert TrajectoryStore.open(tmp_path / "run" / "trajectories").manifest.solver == "heun"
    assert (settings["solver"], settings["cfg_scale"], settings["trajectory_keep"]) == ("heun", 1.5, "both")


def test_the_target_is_the_one_that_a_store_keeps_alone(tmp_path):
    kept = generate(tmp_path / "store", keep="denoised")
    student = train(tiny_teacher(FLOW), kept, out=tmp_path / "run", **QUICK)
    assert (student.config.target, student.config.output) == ("denoised", "direct")
    with pytest.raises(InputError, match=r"target='state' needs a store that keeps it"):
        train(tiny_teacher(FLOW), kept, out=tmp_path / "other", target="state", **QUICK)


def test_stores_of_several_sizes_are_all_compared(tmp_path):
    first, second = generate(tmp_path / "a"), generate(tmp_path / "b", keep="state", dtype="float32")
    config = TrainConfig(teacher="", out=tmp_path, trajectories=["a", "b"], trajectory_keep="both", batch_size=8)
    with pytest.raises(InputError, match=r"trajectory_keep is both, but state in the trajectories in .*b;"):
        agree_with_stores(config, [first, second], [24, 24])
    agreed = agree_with_stores(dataclasses.replace(config, trajectory_keep=None), [first, second], [24, 24])
    assert (agreed.trajectory_keep, agreed.trajectory_dtype, agreed.num_trajectories) == (None, None, 48)
    assert (agreed.num_steps, agreed.solver, agreed.target) == (3, "heun", "state")


@pytest.mark.parametrize("name", ["prompts", "height", "embedded_guidance", "variant", "transformer", "lora"])
def test_what_is_for_pipelines_is_refused_for_other_teachers(store, tmp_path, name):
    value: Any = {"height": 8, "embedded_guidance": 3.0}.get(name, "x")
    for teacher in (tmp_path / "teacher", tiny_teacher(FLOW)):
        with pytest.raises(InputError, match=f"{name} is for"):
            train(teacher, store, out=tmp_path / "run", **{name: value}, **QUICK)
    assert not (tmp_path / "run").exists()


def test_too_few_trajectories_and_wrong_weights_are_found_before_the_teacher_is_read(store, tmp_path):
    with pytest.raises(InputError, match=r"batch_size is 25, more than the 24 trajectories in .*store"):
        train(tmp_path / "nowhere", store, out=tmp_path / "run", **{**QUICK, "batch_size": 25})
    with pytest.raises(InputError, match=r"step_weights is \[1.0, 2.0\]; expected 3 numbers"):
        train(tmp_path / "nowhere", store, out=tmp_path / "run", step_weights=[1.0, 2.0], **QUICK)


@pytest.mark.parametrize(
    ("name", "value", "theirs"),
    [
        ("mask", "diagonal", "causal"), ("heads", "shared", "per_step"), ("target", "denoised", "state"),
        ("output", "direct", "jump"), ("history_layers", 2, "1"), ("history_bias", -1.0, "-4.0"),
    ],
)  # fmt: skip
def test_a_student_decides_in_both_stages(store, tmp_path, name, value, theirs):
    train(tmp_path / "teacher", store, out=tmp_path / "first", **QUICK)
    for stage in ("regression", "adversarial"):
        with pytest.raises(InputError, match=rf"{name} is {value}, but {theirs} in the student .*first"):
            train(
                tmp_path / "teacher", store, out=tmp_path / "run", stage=stage, student=str(tmp_path / "first"), **QUICK,
                **{name: value},
            )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_regression_starts_from_a_student(store, tmp_path):
    settings = {**QUICK, "learning_rate": 1e-30}
    first = train(tmp_path / "teacher", store, out=tmp_path / "first", **{**QUICK, "learning_rate": 0.1})
    again = train(tmp_path / "teacher", store, out=tmp_path / "again", student=str(tmp_path / "first"), **settings)
    ours, theirs = again.state_dict(), first.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "nothing was learnt, so it is the first student"
    fresh = train(tmp_path / "teacher", store, out=tmp_path / "fresh", **settings).state_dict()
    assert any(not torch.equal(fresh[key], theirs[key]) for key in theirs)
    train(tmp_path / "teacher", store, out=tmp_path / "other", target="denoised", **QUICK)
    gone_on = train(tmp_path / "teacher", store, out=tmp_path / "on", student=str(tmp_path / "other"), **QUICK)
    assert gone_on.config.target == recorded(tmp_path / "on")["target"] == "denoised"
    train(tmp_path / "teacher", store, out=tmp_path / "third", **QUICK)
    with pytest.raises(InputError, match="student_fingerprint"):
        train(tmp_path / "teacher", store, out=tmp_path / "again", student=str(tmp_path / "third"), **settings)


@pytest.mark.parametrize("schedule", [dict(lr_schedule="constant"), dict(lr_schedule="constant_with_warmup", warmup_steps=5)])
def test_a_run_extended_has_the_bytes_of_one_long_run(store, tmp_path, schedule):
    settings = {**QUICK, **schedule, "log_every": 1, "save_every": 2, "ema_decay": [0.9, 0.99]}
    train(tmp_path / "teacher", store, out=tmp_path / "long", **{**settings, "max_steps": 7})
    for max_steps in (3, 5, 7):
        train(tmp_path / "teacher", store, out=tmp_path / "grown", **{**settings, "max_steps": max_steps})
    assert recorded(tmp_path / "grown")["max_steps"] == 7
    for file in (
        "student/model.safetensors",
        "student-ema-0.99/model.safetensors",
        "checkpoints/step-0000007/model.safetensors",
    ):
        ours, theirs = (load_file(tmp_path / run / file) for run in ("grown", "long"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), file
    losses = [[line["loss"] for line in read_log(tmp_path / run / "log.jsonl")] for run in ("grown", "long")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 7
    with pytest.raises(InputError, match=r"max_steps is 4, but the run in .*grown has done 7 updates"):
        train(tmp_path / "teacher", store, out=tmp_path / "grown", **{**settings, "max_steps": 4})
    with pytest.raises(InputError, match=r"max_steps: was 7, now 8.*seed: was 0, now 1"):
        train(tmp_path / "teacher", store, out=tmp_path / "grown", **{**settings, "max_steps": 8, "seed": 1})
    assert Checkpoints(tmp_path / "grown" / "checkpoints").steps()[-1] == 7


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_other_schedules_cannot_be_extended_and_the_message_says_how_to_go_on(store, tmp_path, name):
    settings = {**QUICK, "lr_schedule": name}
    train(tmp_path / "teacher", store, out=tmp_path / "run", **settings)
    with pytest.raises(InputError, match=rf"lr_schedule '{name}' depends on it.*--student .*run and another --out") as refused:
        train(tmp_path / "teacher", store, out=tmp_path / "run", **{**settings, "max_steps": 4})
    assert "max_steps 2, now 4" in str(refused.value)
    words = ["--teacher", tmp_path / "teacher", "--trajectories", tmp_path / "store", "--student", tmp_path / "run"]
    assert main(["train", *map(str, words), "--out", str(tmp_path / "on"), "--max-steps=2", "--batch-size=8"]) == 0
