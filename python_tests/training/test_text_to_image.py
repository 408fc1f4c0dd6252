"""Text-to-image students trained on several processes, stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline
from training_runs import assert_same_run, signal_at, start, train_in, wait

from pyard.storage.log import read_log
from pyard.trajectories import generate_trajectories

SETTINGS: dict[str, Any] = dict(
    num_steps=2, history_layers=2, max_steps=8, batch_size=4, learning_rate=1e-3, save_every=2, log_every=1, heads="shared",
    trackers="none", progress=False, history_bias=-1.0,
)  # fmt: skip


@pytest.fixture(scope="module", params=["sd3", "z_image"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    tiny_pipeline(request.param, place / "teacher")
    prompts = ["a red circle", "two small blue squares above a cross", "a dog"]
    generate_trajectories(
        place / "teacher", place / "store", 8, num_steps=2, teacher_steps=4, height=32, width=32, prompts=prompts,
        batch_size=4, keep="state", progress=False,
    )  # fmt: skip
    return place


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


def test_a_killed_run_ends_as_one_that_was_not(folder: Path) -> None:
    train_in(folder, "whole", **SETTINGS)
    processes = start(folder, "killed", 1, None, **SETTINGS)
    assert signal_at(processes, folder / "killed" / "log.jsonl", 3) >= 3
    wait(processes)
    assert not (folder / "killed" / "student").exists()
    train_in(folder, "killed", **SETTINGS)
    assert_same_run(folder / "whole", folder / "killed")


def test_lora_leaves_the_base_in_the_teachers_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyard.models.student import Student
    from pyard.teachers import load_teacher
    from pyard.training import distill, regression
    from pyard.training.sharded import consolidate

    tiny_pipeline("sd3", tmp_path / "teacher")
    settings = dict(batch_size=4, keep="state", prompts=["a", "b c"], progress=False, height=32, width=32)
    generate_trajectories(
        tmp_path / "teacher", tmp_path / "store", 8, num_steps=2, teacher_steps=4, precision="bfloat16", **settings
    )
    before = load_teacher(tmp_path / "teacher", dtype="bfloat16")
    digest = before.fingerprint
    made: list[Any] = []
    begin = regression.Regression.__init__

    def kept(self: Any, *args: Any, **more: Any) -> None:
        begin(self, *args, **more)
        made.append(self)

    monkeypatch.setattr(regression.Regression, "__init__", kept)
    monkeypatch.setattr(distill, "load_teacher", lambda *args, **more: before)
    sizes = {}
    for rank in (1, 4):
        train_in(tmp_path, f"rank-{rank}", **SETTINGS, lora_rank=rank)
        stage = made[-1]
        if rank == 1:
            addresses = {p.data_ptr() for p in before.network.trunk.parameters()}
            frozen = [p for p in stage.student.parameters() if not p.requires_grad]
            assert frozen
            assert all(p.data_ptr() in addresses for p in frozen)
            assert {p.dtype for p in frozen} == {torch.bfloat16}
            assert {p.dtype for p in stage.parameters} == {torch.float32}
        newest = max((tmp_path / f"rank-{rank}" / "checkpoints").glob("step-*"))
        saved = load_file(newest / "model.safetensors")
        assert not any("base_layer" in name for name in saved)
        sizes[rank] = sum(tensor.numel() for name, tensor in saved.items() if "lora_" in name)
    assert sizes[4] == 4 * sizes[1] > 0
    # Merging the result changed nothing of the teacher's, and the result is not the teacher.
    del before.__dict__["fingerprint"]
    assert before.fingerprint == digest
    monkeypatch.undo()
    result = Student.from_pretrained(tmp_path / "rank-4")
    teacher = load_teacher(tmp_path / "teacher", dtype="bfloat16").network.trunk
    pairs = zip(result.trunk.named_parameters(), teacher.parameters(), strict=True)
    assert sum(not torch.equal(mine, theirs) for (_, mine), theirs in pairs) > 10
    whole = consolidate(tmp_path / "rank-4", tmp_path / "whole")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(whole.parameters(), result.parameters(), strict=True))
