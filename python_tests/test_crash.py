"""A short version of `make crash`, and that the trial finds a fault that is planted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trajectories.native import require_native

from benchmarks.crash import trial
from benchmarks.crash.commands import COMMANDS, write_inputs
from benchmarks.crash.digest import difference, digest
from benchmarks.crash.places import can_mount
from benchmarks.crash.process import Running
from benchmarks.crash.table import table
from benchmarks.crash.trial import WAYS, run_trial, undisturbed
from pyard.storage import tensor_files

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
    text = table(rows, {}, ["abc"], {"train": {"read error": "it reads nothing"}, "demo": {"SIGINT": "of a command not tried"}})
    assert text.splitlines()[4].split("|")[WAYS.index("read error") + 2] == " – [1] "
    assert "[1] Does not apply: it reads nothing.\n" in text
    assert "not tried" not in text


def test_the_page_shows_the_table_of_the_results() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    shown = page.split("<!-- benchmarks/results/crash.md -->\n")[1].split("<!-- end -->")[0]
    assert shown == (ROOT / "benchmarks" / "results" / "crash.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands read."""
    inputs = tmp_path_factory.mktemp("crash") / "inputs"

    def run(line: str) -> None:
        running = Running([line.split()], inputs, ranks=False)
        assert running.wait(300)
        assert running.status == 0, running.said()

    write_inputs(inputs, run)
    return inputs


SAMPLE = next(command for command in COMMANDS if command.name == "sample")


@pytest.mark.slow
def test_samples_that_were_not_flushed_are_lost(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := can_mount("ext4")) is not None:
        pytest.skip(f"power cuts: {reason}")
    wanted = undisturbed(SAMPLE, inputs, tmp_path / "work")
    late = dataclasses.replace(wanted, seconds=1000.0)  # the power is cut when the command has ended
    outcomes = [run_trial(SAMPLE, "power cut, ext4", 0, late, inputs, tmp_path / "work")]
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    outcomes.append(run_trial(SAMPLE, "power cut, ext4", 0, late, inputs, tmp_path / "work"))
    assert [outcome for outcome, _ in outcomes] == ["recovered", "lost"]


@pytest.mark.slow
def test_weights_that_are_mapped_unseen_kill_the_command(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := can_mount("btrfs")) is not None:
        pytest.skip(f"read errors: {reason}")
    module = require_native()
    wanted = undisturbed(SAMPLE, inputs, tmp_path / "work")
    weights = "inputs/first/student/model.safetensors"
    monkeypatch.setattr(trial, "_files_read", lambda *arguments: [weights])
    found = []
    for seen in (True, False):
        if not seen:
            monkeypatch.setattr(tensor_files, "require_readable", lambda path: None)
            monkeypatch.setattr(module, "exit_on_bus_errors", lambda program: None)
        found.append(run_trial(SAMPLE, "read error", 1, wanted, inputs, tmp_path / "work"))
    assert [outcome for outcome, _ in found] == ["recovered", "wrong"]
    assert "no line of error, status -7" in found[1][1]


@pytest.mark.slow
def test_some_trials_of_each_way(inputs: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.crash", "--trials", "20", "--work", inputs.parent, "--results", tmp_path]
    done = subprocess.run([*words, "--commands", "2 writers", "train, LoRA"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "crash.json").read_text())
    assert sum(row["trials"] for row in record["rows"]) == 20
    assert record["failures"] == []
