"""What a run says while it trains and at its end."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from training_runs import SETTINGS, teacher_and_store, train_in

from pyard.cli.command_line import main
from pyard.storage.log import read_log
from pyard.training import loop


def test_the_log_has_learning_rate_speed_and_wall_time(tmp_path: Path):
    teacher_and_store(tmp_path)
    run = train_in(tmp_path, "run", max_steps=4, lr_schedule="linear", warmup_steps=2, save_every=2)
    lines = read_log(run / "log.jsonl")
    # diffusers' linear schedule: update i has the rate of i - 1 steps done.
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.0, 0.0015, 0.003, 0.0015])
    assert all(line["samples_per_second"] > 0 for line in lines)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] < seconds[-1] < 600


def test_wall_time_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teacher_and_store(tmp_path)
    save, train_stage = loop.Checkpoints.save, loop.train_stage

    def stop(self, step, *args):
        save(self, step, *args)
        if step == 2:
            raise RuntimeError("stopped")

    monkeypatch.setattr(loop.Checkpoints, "save", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        train_in(tmp_path, "run", max_steps=4, save_every=2)
    monkeypatch.setattr(loop.Checkpoints, "save", save)
    assert loop.train_stage is train_stage
    log = tmp_path / "run/log.jsonl"
    log.write_text(log.read_text(encoding="utf-8").replace('"seconds": ', '"seconds": 1000'), encoding="utf-8")
    before = read_log(log)[-1]["seconds"]
    lines = read_log(train_in(tmp_path, "run", max_steps=4, save_every=2) / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert before < lines[2]["seconds"] < before + 100


def test_without_a_progress_bar_a_line_is_said_now_and_then(tmp_path: Path, capsys, monkeypatch):
    teacher_and_store(tmp_path)
    train_in(tmp_path, "seldom", max_steps=4)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in said] == ["step 1 of 4", "step 4 of 4"]
    assert "loss" in said[0]
    assert "samples/s" in said[0]
    monkeypatch.setattr(loop, "SILENCE_SECONDS", 0.0)
    train_in(tmp_path, "often", max_steps=4)
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]) == 4


def test_the_command_says_where_the_student_is_and_what_to_do_next(tmp_path: Path, capsys, monkeypatch):
    teacher_and_store(tmp_path)
    flags = {**SETTINGS, "max_steps": 1, "teacher": tmp_path / "teacher", "trajectories": tmp_path / "store"}
    words = [f"--{name}={value}" for name, value in flags.items()]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "run/student") in out
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("  pyard ")]
    assert [command[0] for command in commands] == ["sample", "evaluate", "export"]
    # A student of 2 channels needs features of its own to be evaluated with; the others run as they are printed.
    assert commands[1][-4:] == ["--features", "inception-2015-12-05.pt", "--reference", "FOLDER_OF_PICTURES"]
    assert main([*commands[0][:-1], "samples.npz"]) == 0
    assert main(commands[2]) == 0
    assert (tmp_path / "student.onnx").exists()
