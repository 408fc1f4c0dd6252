"""Text-to-image students trained on several processes, stopped and resumed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline
from training_runs import assert_same_run, signal_at, start, train_in, wait

from pyard.models.backbone import Denoiser
from pyard.storage.log import read_log
from pyard.training.regression import Regression
from pyard.trajectories import generate_trajectories

SETTINGS: dict[str, Any] = dict(
    num_steps=2, history_layers=2, max_steps=8, batch_size=4, learning_rate=1e-3, save_every=2, log_every=1, heads="shared",
    trackers="none", progress=False, history_bias=-1.0,
)  # fmt: skip


@pytest.fixture(scope="module", params=["sd3", pytest.param("z_image", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    tiny_pipeline(request.param, place / "teacher")
    prompts = ["a red circle", "two small blue squares above a cross", "a dog"]
    generate_trajectories(
        place / "teacher", place / "store", 8, num_steps=2, teacher_steps=4, height=32, width=32, prompts=prompts,
        batch_size=4, keep="state", progress=False,
    )  # fmt: skip
    return place


@pytest.mark.slow
def test_two_processes_in_shards_train_what_one_trains(folder: Path) -> None:
    train_in(folder, "one", **SETTINGS)
    shards = {**SETTINGS, "parallel": "fsdp", "activation_checkpointing": True}
    assert set(wait(start(folder, "two", 2, None, **shards))) == {0}
    logs = [read_log(folder / name / "log.jsonl") for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == SETTINGS["max_steps"]
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    ours, theirs = (load_file(folder / name / "student" / "model.safetensors") for name in ("one", "two"))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 2e-3


@pytest.mark.slow
def test_layers_that_nothing_reads_are_not_waited_for(tmp_path: Path) -> None:
    """The last block of Qwen-Image computes text tokens that no output depends on."""
    tiny_pipeline("qwen_image", tmp_path / "teacher")
    generate_trajectories(
        tmp_path / "teacher", tmp_path / "store", 8, num_steps=2, teacher_steps=4, height=32, width=32, prompts=["a dog"],
        batch_size=4, keep="state", progress=False,
    )  # fmt: skip
    settings = {**SETTINGS, "max_steps": 3}
    train_in(tmp_path, "one", **settings)
    ours = load_file(tmp_path / "one" / "student" / "model.safetensors")
    for parallel in ("ddp", "fsdp"):
        assert set(wait(start(tmp_path, parallel, 2, None, **{**settings, "parallel": parallel}))) == {0}
        theirs = load_file(tmp_path / parallel / "student" / "model.safetensors")
        assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 2e-3


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(folder: Path) -> None:
    train_in(folder, "whole", **SETTINGS)
    processes = start(folder, "killed", 1, None, **SETTINGS)
    assert signal_at(processes, folder / "killed" / "log.jsonl", 3) >= 3
    wait(processes)
    assert not (folder / "killed" / "student").exists()
    train_in(folder, "killed", **SETTINGS)
    assert_same_run(folder / "whole", folder / "killed")


@pytest.mark.parametrize("lora_rank", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_the_teacher_leaves_memory_before_the_first_update(folder: Path, lora_rank: int | None, monkeypatch) -> None:
    def networks() -> int:
        gc.collect()
        return sum(isinstance(one, Denoiser) for one in gc.get_objects())

    found, before, usual = [], networks(), Regression.apply
    monkeypatch.setattr(Regression, "apply", lambda self: found.append(networks()) or usual(self))
    train_in(folder, f"alone-{lora_rank}", **{**SETTINGS, "max_steps": 1, "lora_rank": lora_rank})
    assert found == [before]
