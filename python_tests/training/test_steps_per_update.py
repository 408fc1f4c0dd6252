"""Updates on some of the steps: the same on several processes, in shards and after a kill, and said in the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline
from training_runs import assert_same_run, signal_at, start, train_in, wait

from pyard.errors import InputError
from pyard.storage.log import read_log
from pyard.trajectories import generate_trajectories

SETTINGS: dict[str, Any] = dict(
    num_steps=3, steps_per_update=2, history_layers=2, max_steps=6, batch_size=4, learning_rate=1e-3, save_every=2, log_every=1,
    trackers="none", progress=False, history_bias=-1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flux pipeline, whose blocks are of two kinds, its trajectories and a run."""
    place = tmp_path_factory.mktemp("steps")
    tiny_pipeline("flux", place / "teacher")
    generate_trajectories(
        place / "teacher", place / "store", 8, num_steps=3, teacher_steps=6, height=32, width=32,
        prompts=["a red circle", "two small blue squares above a cross"], batch_size=4, keep="state", progress=False,
    )  # fmt: skip
    train_in(place, "one", **SETTINGS)
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [dict(gradient_accumulation=2), dict(parallel="fsdp", activation_checkpointing=True)], ids=str
)
def test_two_processes_train_what_one_trains(folder: Path, changes: dict[str, Any]) -> None:
    name = "-".join(changes)
    assert set(wait(start(folder, name, 2, None, **{**SETTINGS, **changes}))) == {0}
    logs = [read_log(folder / run / "log.jsonl") for run in ("one", name)]
    assert len(logs[0]) == len(logs[1]) == SETTINGS["max_steps"]
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
        assert [loss is None for loss in one["loss_per_step"]] == [loss is None for loss in two["loss_per_step"]]
        assert one["loss_per_step"].count(None) == 1
    assert len({line["loss_per_step"].index(None) for line in logs[0]}) > 1, "not always the same step is left out"
    ours, theirs = (load_file(folder / run / "student" / "model.safetensors") for run in ("one", name))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 2e-3


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(folder: Path) -> None:
    processes = start(folder, "killed", 1, None, **SETTINGS)
    assert signal_at(processes, folder / "killed" / "log.jsonl", 3) >= 3
    wait(processes)
    assert not (folder / "killed" / "student").exists()
    with pytest.raises(InputError, match="steps_per_update: was 2, now 1"):
        train_in(folder, "killed", **{**SETTINGS, "steps_per_update": 1})
    train_in(folder, "killed", **SETTINGS)
    assert_same_run(folder / "one", folder / "killed")
    for line in (folder / "killed" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
