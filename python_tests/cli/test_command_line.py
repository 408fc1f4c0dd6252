from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from factories import tiny_student, tiny_teacher

from pyard.cli.command_line import COMMANDS, Command, in_flags, main
from pyard.cli.flags import flags_of, read_flags
from pyard.training.config import RECIPES, TrainConfig


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_flags(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: pyard {command}" in out
    flags = [line for line in out.splitlines() if line.startswith("  --")]
    assert len(flags) > 2
    assert "usage" in out


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


def run(capsys, *argv: str) -> tuple[int, str]:
    """Exit status and standard error of a command."""
    try:
        status = main(list(argv))
    except SystemExit as end:
        status = int(end.code or 0)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--learning_rte", "3"], "unknown flag --learning_rte; did you mean --learning_rate?"),
        (["train", "--learning-rte=3"], "unknown flag --learning_rte; did you mean --learning_rate?"),
        (["sample", "--stud", "x"], "unknown flag --stud; did you mean --student?"),  # no abbreviations
        (["evaluate", "--feature_settings.resiz", "3"], "did you mean --feature_settings.resize?"),
        (["train", "--xyzzy"], "unknown flag --xyzzy; --help lists all flags"),
        (["train", "--out", "x"], "--teacher is missing"),
        (
            ["train", "--teacher", "digits", "--out", "x", "--batch_size", "many"],
            "--batch_size is 'many'; expected a whole number",
        ),
        (["train", "--teacher", "digits", "--out", "x", "--mask", "all"], "--mask is 'all'; expected one of diagonal"),
        (["train", "--teacher", "digits", "--out", "a", "b"], "--out takes one value; found 'a' 'b'"),
        (["train", "--teacher"], "--teacher needs a value"),
        (["train", "digits"], "unexpected 'digits'"),
        (["sample", "-s", "x"], "unexpected '-s'"),
        (["train", "--teacher", "digits", "--out", ""], "--out is ''; expected a path"),
        (["train", "--max-steps", "3", "--max_steps=4"], "--max_steps is given twice, as 3 and 4; give it once"),
        (["evaluate", "--students", "a", "--students", "b"], "give it once: --students a b"),
        (["describe", "a", "--student", "b"], "--student is given twice"),
        (["train", "--config", "nowhere"], "recipe nowhere: no such file; expected a YAML file, or one of digits, "),
        (["train", "--teacher", "digits", "--out", "x", "--batch_size", "0"], "--batch_size is 0; expected at least 1"),
        (["estimate", "digits", "--device", "h1000"], "--device is 'h1000'; expected one of A100"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line(argv, message, capsys):
    status, error = run(capsys, *argv)
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


def hungry(size: int = 2**60) -> None:
    """Take more memory than any machine has."""
    torch.empty(size)


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "describe", Command(__name__, "hungry", "take memory"))
    status, error = run(capsys, "describe")
    assert status == 2
    assert error.startswith("pyard describe: error: out of memory: ")
    assert error.endswith("docs/out-of-memory.md says what needs less\n")
    assert error.count("\n") == 1
    monkeypatch.setenv("PYARD_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="memory"):
        main(["describe"])


def test_messages_name_flags(capsys):
    flags = {"family", "cfg_scale", "batch_size", "count"}
    assert in_flags("not said; give family='dit', or cfg_scale=1", flags) == "not said; give --family dit, or --cfg_scale 1"
    assert in_flags("training: batch_size is 0; other is 3", flags) == "training: --batch_size is 0; other is 3"
    assert in_flags("f(count=3) of --count is", flags) == "f(count=3) of --count is"
    assert in_flags("what family= is", flags) == "what family= is"


def test_flags_beat_the_file_wherever_they_stand(tmp_path: Path, monkeypatch):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: digits\nmax_steps: 3\nlearning-rate: 5e-4\nadversarial: {width: 8}\n", encoding="utf-8")
    seen = []
    monkeypatch.setattr("pyard.training.train_command", seen.append)
    monkeypatch.setattr("pyard.cli.command_line.typable_function", lambda function: function)
    flags = ["--max-steps", "7", "--stage", "adversarial", "--student", "s", "--adversarial.depth=2"]
    assert main(["train", *flags, "--out", "o", "--config", str(recipe)]) == 0
    assert main(["train", "--config", str(recipe), *flags, "--out", "o"]) == 0
    assert seen[0] == seen[1]
    assert (seen[0].max_steps, seen[0].learning_rate, seen[0].teacher) == (7, 5e-4, "digits")
    assert (seen[0].adversarial.width, seen[0].adversarial.depth) == (8, 2)


def test_words_and_yaml_mean_what_a_reader_expects(tmp_path: Path):
    def function(
        out: Path,
        labels: list[int | str] | None = None,
        students: str | list[str] = "",
        interval: tuple[float, float] | None = None,
        size: int | None = 4,
        vae: Literal["own", "none"] | Path | None = "own",
        quick: bool = False,
        precision: Literal["no", "bf16"] = "no",
        trackers: Literal["auto", "none"] = "auto",
    ) -> None: ...

    flags = flags_of(function)

    def read(*argv: str, bare: tuple[str, ...] = ()) -> dict:
        return {name: value for name, value in read_flags(["--out", "o", *argv], flags, bare=bare).items() if name != "out"}

    for words, expected in (
        (["--labels", "3", "4"], {"labels": [3, 4]}),
        (["--labels", "3,4"], {"labels": [3, 4]}),
        (["--labels=3,4"], {"labels": [3, 4]}),
        (["--labels", "[3, 4]"], {"labels": [3, 4]}),
        (["--labels", "3"], {"labels": [3]}),
        (["--labels", "tench, x", "4"], {"labels": ["tench, x", 4]}),
        (["--labels", "tench, x"], {"labels": ["tench, x"]}),
        (["--labels", "none"], {"labels": None}),
        (["--students", "prompts.txt"], {"students": "prompts.txt"}),  # a file of texts, not a text
        (["--students", "a", "b c"], {"students": ["a", "b c"]}),
        (["--students", "[a, b]"], {"students": ["a", "b"]}),
        (["--interval", "-1", "2.5"], {"interval": (-1.0, 2.5)}),
        (["--interval", "none"], {"interval": None}),
        (["--size", "null"], {"size": None}),
        (["--size", "None"], {"size": None}),
        (["--vae", "none"], {"vae": "none"}),
        (["--vae", "some/folder"], {"vae": Path("some/folder")}),
        (["--quick"], {"quick": True}),
        (["--quick", "no"], {"quick": False}),
        (["--quick=on"], {"quick": True}),
        (["--precision", "bfloat16"], {"precision": "bf16"}),
        (["--precision", "fp32"], {"precision": "no"}),
    ):
        assert read(*words) == expected, words
    assert read_flags(["--out"], {"out": flags["size"]}, bare=("out",)) == {}
    assert read_flags(["o", "--quick"], flags, positional=("out",)) == {"out": Path("o"), "quick": True}
    file = tmp_path / "s.yaml"
    file.write_text("precision: no\nquick: on\ntrackers: null\nsize: none\nlabels: [3, cat]\nstudents: 7\n", encoding="utf-8")
    expected = {"precision": "no", "quick": True, "trackers": "none", "size": None, "labels": [3, "cat"], "students": "7"}
    assert read("--config", str(file)) == expected
    file.write_text("size: 010\nstudents: [1.10, 007, 2026-01-02]\nprecision: off\n", encoding="utf-8")
    expected = {"size": 10, "students": ["1.10", "007", "2026-01-02"], "precision": "no"}
    assert read("--config", str(file), "--size", "10", "--size=10") == expected


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch):
    def function(out: Path, teacher: str = "", store: str | list[str] = "", vae: Literal["own"] | Path = "own") -> None: ...

    monkeypatch.setenv("HOME", str(tmp_path))
    flags = flags_of(function)
    assert read_flags(["--out=~/a", "--teacher", "~/b", "--store", "~/c", "d", "--vae", "~/e"], flags) == {
        "out": tmp_path / "a",
        "teacher": f"{tmp_path}/b",
        "store": [f"{tmp_path}/c", "d"],
        "vae": tmp_path / "e",
    }
    file = tmp_path / "s.yaml"
    file.write_text("out: ~/a\nteacher: a~/b\n", encoding="utf-8")
    assert read_flags(["--config", str(file)], flags) == {"out": tmp_path / "a", "teacher": "a~/b"}


def test_one_setting_under_two_spellings_in_a_file_is_refused(tmp_path: Path, capsys):
    file = tmp_path / "s.yaml"
    for text in ("max_steps: 3\nmax-steps: 4\n", "adversarial: {width: 8}\nadversarial.width: 9\n"):
        file.write_text(text, encoding="utf-8")
        status, error = run(capsys, "train", "--teacher", "digits", "--out", "x", "--config", str(file))
        assert (status, "is given twice; give it once" in error) == (2, True)


def test_train_explains_its_flags_in_groups(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    places = [out.index(f"\n{title}:\n") for title in TrainConfig.GROUPS]
    assert places == sorted(places)
    assert places[0] < out.index("--teacher ") < places[1] < out.index("--stage ") < places[2] < out.index("--num_steps ")
    assert out.index("--adversarial.width") > out.index("--progress")


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "recipes/digits.yaml", str(RECIPES / "digits.yaml")):
        assert main(["estimate", name, "--device", "h100"]) == 0
    capsys.readouterr()
    Path("digits").write_text("teacher: digits\nmax_steps: 1\n", encoding="utf-8")
    assert TrainConfig.read("digits").max_steps == 1  # a file comes before a name


def test_printed_settings_are_read_again(tmp_path: Path, capsys):
    assert main(["train", "--config", "digits", "--out", "runs/x", "--max-steps", "9", "--print_config"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    again = TrainConfig.read(file)
    assert (again.max_steps, again.out, again.batch_size) == (9, Path("runs/x"), TrainConfig.read("digits").batch_size)


def test_settings_are_printed_without_those_that_are_still_to_be_given(capsys):
    assert main(["train", "--config", "digits", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "teacher: digits" in printed
    assert not any(line.startswith("out:") for line in printed.splitlines())


def test_columns_of_an_estimate_do_not_touch(capsys):
    assert main(["estimate", "digits", "--device", "rtx4090"]) == 0
    (heading,) = (line for line in capsys.readouterr().out.splitlines() if "checkpointing" in line)
    assert re.split(r"\s{2,}", heading.strip()) == ["one GPU", "one GPU, checkpointing"]
