"""A short version of `make crash`, and that the trial finds a fault that is planted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.crash.commands import COMMANDS, write_inputs
from benchmarks.crash.digest import difference, digest
from benchmarks.crash.places import can_mount
from benchmarks.crash.process import Running
from benchmarks.crash.table import table
from benchmarks.crash.trial import run_trial, undisturbed

ROOT = Path(__file__).resolve().parent.parent


def test_times_are_not_compared_and_all_else_is(tmp_path: Path) -> None:
    for name, seconds, loss in (("a", 1, 2), ("b", 5, 2), ("c", 1, 3)):
        (tmp_path / name / ".locks").mkdir(parents=True)
        (tmp_path / name / ".locks" / name).touch()
        (tmp_path / name / "log.jsonl").write_text(f'{{"seconds": {seconds}, "loss": {loss}}}\n')
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert difference(a, b) == ""
    assert difference(a, c) == "other bytes: log.jsonl"
    assert difference({}, a) == "missing: log.jsonl"


def test_the_table_counts() -> None:
    rows = [{"command": "train", "way": "SIGKILL", "trials": 3, "recovered": 2, "lost": 0, "wrong": 1}]
    text = table(rows, {"power cut, xfs": "there is no mkfs.xfs"}, ["abc"])
    assert "| train | 2 of 3 |" in text
    assert "3 trials: 2 recovered, 0 lost, 1 wrong." in text
    assert "Skipped: power cut, xfs, since there is no mkfs.xfs." in text


@pytest.mark.slow
def test_samples_that_were_not_flushed_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := can_mount("ext4")) is not None:
        pytest.skip(f"power cuts: {reason}")

    def run(line: str) -> None:
        running = Running([line.split()], tmp_path / "inputs", ranks=False)
        assert running.wait(300)
        assert running.status == 0, running.said()

    write_inputs(tmp_path / "inputs", run)
    command = next(command for command in COMMANDS if command.name == "sample")
    wanted = undisturbed(command, tmp_path / "inputs", tmp_path / "work")
    late = dataclasses.replace(wanted, seconds=1000.0)  # the power is cut when the command has ended
    outcomes = [run_trial(command, "power cut, ext4", 0, late, tmp_path / "inputs", tmp_path / "work")]
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    outcomes.append(run_trial(command, "power cut, ext4", 0, late, tmp_path / "inputs", tmp_path / "work"))
    assert [outcome for outcome, _ in outcomes] == ["recovered", "lost"]


@pytest.mark.slow
def test_some_trials_of_each_way(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.crash", "--trials", "27", "--work", tmp_path, "--results", tmp_path]
    done = subprocess.run([*words, "--commands", "trajectories", "train", "sample"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "crash.json").read_text())
    assert sum(row["trials"] for row in record["rows"]) == 27
    assert record["failures"] == []
