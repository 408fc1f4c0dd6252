from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from factories import tiny_student, tiny_teacher

from pyard.cli.command_line import COMMANDS, command_line_face, complete, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_flags(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: pyard {command}" in out
    flags = [line for line in out.splitlines() if line.startswith("  --")]
    assert len(flags) > 2


def test_overview_lists_the_commands(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    assert main(["--version"]) == 0


@pytest.mark.parametrize(("argv", "message"), [
    (["fly"], "unknown command 'fly'"),
    (["train", "--teacher", "nowhere", "--out", "{tmp}/run"], "neither a built-in teacher"),
    (["sample", "--student", "{tmp}", "--out", "{tmp}/a.png"], "no config.json"),
    (["sample", "--student", "{tmp}/run", "--out", "{tmp}/a.bmp"], ".npz or .png"),
    (["sample", "--student", "{tmp}/run", "--labels", "[0, 9]", "--out", "{tmp}/a.png"], "label 9: expected 0 to 4"),
    (["trajectories", "--teacher", "{tmp}/run/student", "--out", "{tmp}/t", "--count", "3"], "expected a NetworkTeacher"),
])  # fmt: skip
def test_wrong_input_is_one_line_and_status_2(argv, message, tmp_path: Path, capsys):
    tiny_student(2, history_layers=1).save_pretrained(tmp_path / "run" / "student")
    assert main([word.format(tmp=tmp_path) for word in argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("pyard")


def test_a_flag_of_the_wrong_type_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--teacher", "digits", "--out", "x", "--num-steps", "many"])
    assert end.value.code == 2
    assert "num_steps" in capsys.readouterr().err


def test_switches_need_no_value():
    def stage(out: str, num_steps: int = 4, quick: bool = False, progress: bool = True) -> None: ...

    face = command_line_face(stage)
    words = complete(["--out", "x", "--quick", "--progress", "false", "--num-steps=3"], face, ())
    assert words == ["--out", "x", "--quick=true", "--progress", "false", "--num_steps=3"]
    assert complete(["--out", "--num-steps", "3"], face, ("--out",)) == ["--num_steps", "3"]


def test_several_values_are_a_list_where_the_flag_takes_one():
    def stage(out: str, labels: list[int | str] | None = None, store: str | list[str] = "", steps: int = 4) -> None: ...

    face = command_line_face(stage)
    words = complete(["--labels", "3", "tench, x", "-1.5", "--store", "a", "b c", "--steps", "4"], face, ())
    assert words == ["--labels", '[3, "tench, x", -1.5]', "--store", '["a", "b c"]', "--steps", "4"]
    for single in (["--store", "a"], ["--store=a", "--steps=3"], ["--labels", "[1, 2]"], ["--out", "a", "b"]):
        assert complete(single, face, ()) == single


def test_samples_are_written_as_arrays_and_pictures(tmp_path: Path):
    import numpy as np

    tiny_student(2, history_layers=1).save_pretrained(tmp_path / "student")
    for name in ("a.npz", "a.png"):
        assert main(["sample", "--student", str(tmp_path), "--labels", "0", "3", "--out", str(tmp_path / name)]) == 0
    assert np.load(tmp_path / "a.npz")["samples"].shape == (2, 2, 8, 8)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_trajectories_then_train_then_export_from_the_command_line(tmp_path: Path):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    teacher, store, run = (str(tmp_path / name) for name in ("teacher", "store", "run"))
    assert main(["trajectories", "--teacher", teacher, "--out", store, "--count", "16", "--teacher-steps", "6"]) == 0
    flags = ["--max-steps", "3", "--batch-size", "4", "--save-every", "2"]
    assert main(["train", "--teacher", teacher, "--trajectories", store, "--out", run, *flags]) == 0
    assert main(["export", "--student", run, "--onnx", str(tmp_path / "s.onnx")]) == 0
    from pyard.runtime import OnnxStudent

    assert OnnxStudent(tmp_path / "s.onnx").sample([0, 4]).shape == (2, 2, 8, 8)


def test_import_is_light():
    code = "import sys, pyard, pyard.diffusion.noise, pyard.errors; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_public_name():
    import pyard

    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        _ = pyard.fly
    assert {"train", "sample", "TimeGrid"} <= set(dir(pyard))
    assert pyard.TimeGrid.__name__ == "TimeGrid"
