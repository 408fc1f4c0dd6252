"""`--network`: every command reads the backbones of others, which a user names; a folder never causes an import."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest
from own_teachers import TEXT, save, student_of, text_teacher

import pyard
from pyard.cli.command_line import COMMANDS, main
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.teachers.network_teacher import NetworkTeacher

# Commands whose teachers and students are pyard's own, or that read neither.
OWN_ALONE = {"demo", "teach", "teach scenes-text", "trajectories verify", "trajectories stats", "trajectories merge",
             "bench onnx", "bench quality", "doctor"}  # fmt: skip
EVIL = """
from pathlib import Path
from pyard.models.backbone import Backbone
Path({marker!r}).touch()
class Class(Backbone):
    pass
"""


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - OWN_ALONE))
def test_every_command_that_reads_students_or_teachers_takes_it(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert "--network NETWORK" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(OWN_ALONE))
def test_other_commands_read_no_folder_of_a_student_or_teacher(command):
    import importlib

    entry = COMMANDS[command]
    parameters = inspect.signature(getattr(importlib.import_module(entry.module), entry.function)).parameters
    reads = {"teacher", "student", "students", "run", "network"}
    if command == "trajectories stats":
        reads.remove("teacher")  # whose VAE alone it reads
    assert not reads & set(parameters)


READERS = [Student.from_pretrained, NetworkTeacher.from_pretrained, pyard.ARDPipeline.from_pretrained, pyard.load_teacher,
           pyard.sample, pyard.evaluate, pyard.describe, pyard.generate_trajectories]  # fmt: skip


@pytest.mark.parametrize("function", READERS)
def test_every_function_that_reads_students_or_teachers_takes_it(function):
    assert "network" in inspect.signature(function).parameters


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student's, a teacher's, a run's and a pipeline's folder that all name an importable class of the module `evil`."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "imported")))
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.chdir(tmp_path / "path")
    teacher, student = text_teacher(), student_of(text_teacher())
    save(teacher, tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    pyard.ARDPipeline(student).save_pretrained(tmp_path / "pipe")
    run = tmp_path / "run"
    pyard.train(teacher, out=run, num_steps=2, num_trajectories=8, batch_size=4, max_steps=1, teacher_steps=2, progress=False)
    for file in (tmp_path / "teacher", tmp_path / "student", tmp_path / "pipe" / "student", run / "student"):
        plant(file / "config.json", family="evil:Class")
    (state,) = (run / "checkpoints").glob("step-*/state.json")
    about = {name: value for name, value in json.loads(state.read_text()).items() if name not in ("files", "sha256")}
    state.write_text(json.dumps(about))  # as a pyard that kept no hashes wrote it
    plant(state, student={**about["student"], "family": "evil:Class"})
    yield tmp_path
    sys.modules.pop("evil", None)


def plant(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_folder_never_causes_an_import(planted, capsys):
    student, teacher, out = planted / "student", planted / "teacher", planted / "out"
    for words in (
        ["trajectories", "--teacher", teacher, "--out", out, "--count", 4],
        ["train", "--teacher", teacher, "--out", out],
        ["sample", "--student", student, "--out", planted / "a.npz"],
        ["sample", "--student", planted / "run", "--out", planted / "a.npz"],
        ["describe", student],
        ["evaluate", "--students", student, "--teacher", teacher],
        ["export", "--student", student, "--onnx", planted / "a.onnx"],
        ["consolidate", "--run", planted / "run", "--out", out],
        ["convert", "--source", teacher, "--out", out],
    ):
        assert main([str(word) for word in words]) == 2, words
        assert "uses the network evil:Class, which is not one of pyard's" in capsys.readouterr().err, words
    recipe = planted / "recipe.yaml"
    recipe.write_text(f"teacher: {teacher}\n")
    assert main(["estimate", str(recipe)]) == 2
    assert "uses the network evil:Class" in capsys.readouterr().err
    for folder in (student, planted / "run", planted / "pipe"):
        with pytest.raises(InputError, match="uses the network evil:Class"):
            pyard.ARDPipeline.from_pretrained(folder)
    plant(planted / "pipe" / "model_index.json", student=["evil", "Class"])
    with pytest.raises(InputError, match=r"student is \['evil', 'Class'\]; expected"):
        pyard.ARDPipeline.from_pretrained(planted / "pipe", network=TEXT)
    assert "evil" not in sys.modules
    assert not (planted / "imported").exists()
    # The plant works: named by the user, it is imported.
    with pytest.raises((InputError, TypeError, AttributeError)):
        Student.from_pretrained(student, network="evil:Class")
    assert (planted / "imported").exists()


def test_what_is_no_backbone_is_refused(tmp_path: Path, capsys):
    student_of(text_teacher()).save_pretrained(tmp_path / "student")
    for network, message in (
        ("nowhere:Class", "cannot be imported: No module named 'nowhere'"),
        ("own_backbones:Nobody", "has no attribute 'Nobody'"),
        ("own_backbones:TextConfig", "inherits from pyard.models.backbone.Backbone"),
        ("own_backbones", "expected package.module:Class"),
        ("own_backbones:VideoBackbone", "not valid in this version of pyard"),
    ):
        assert main(["describe", str(tmp_path / "student"), "--network", network]) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1


def test_convert_and_consolidate_keep_somebody_else_s_teacher(tmp_path: Path, capsys):
    save(text_teacher(), tmp_path / "teacher")
    words = ["convert", "--source", str(tmp_path / "teacher"), "--network", TEXT]
    assert main([*words, "--out", str(tmp_path / "copy")]) == 0
    assert "3 layers of width 32, 4 heads, 8 tokens, samples of (3, 4, 8), 5 conditions" in capsys.readouterr().out
    read = [NetworkTeacher.from_pretrained(tmp_path / name, network=TEXT) for name in ("teacher", "copy")]
    assert read[0].fingerprint == read[1].fingerprint
    for kind in ("dit", "diffusers"):
        assert main([*words, "--out", str(tmp_path / f"{kind}.pt"), "--to", kind]) == 2
        assert f"expected a DiT, found a network of the family {TEXT}" in capsys.readouterr().err
