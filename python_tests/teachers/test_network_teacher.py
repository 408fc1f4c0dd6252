"""A teacher's own words: what it prints, and the names of its classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from factories import tiny_teacher
from own_backbones import TextBackbone, TextConfig
from tiny_pipelines import tiny_pipeline

from pyard.cli.command_line import main
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.models.backbone import Denoiser
from pyard.models.student import Student
from pyard.storage.units import format_count
from pyard.teachers import load_teacher
from pyard.teachers.network_teacher import NetworkTeacher


def test_it_says_what_it_is_in_one_line(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    assert repr(teacher) == "NetworkTeacher(dit, 61.7 k parameters, samples of shape (2, 8, 8), 5 classes)"
    teacher.save_pretrained(tmp_path / "teacher")
    assert repr(load_teacher(tmp_path / "teacher")) == repr(teacher)
    pipeline = repr(load_teacher(tiny_pipeline("sd3", tmp_path / "pipeline")))
    assert pipeline.startswith("PipelineTeacher(sd3, ")
    assert pipeline.endswith(", prompts)")


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999, "999"), (61_700, "61.7 k"), (675_129_632, "675 M"), (8e9, "8 B")])
def test_counts(number: int, text: str) -> None:
    assert format_count(int(number)) == text


def test_a_network_without_classes_needs_a_table() -> None:
    with pytest.raises(InputError, match=r"TextBackbone has no classes.*conditions=….*conditions/ in a teacher's folder"):
        NetworkTeacher(Denoiser(TextBackbone(TextConfig())), NoiseSchedule())


@pytest.mark.parametrize("where", ["teacher", "run/student"])
def test_class_names_may_be_written_into_a_folder(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As docs/checkpoints.md says, into the teacher's folder before its students are made, or into a student's."""
    tiny_teacher().save_pretrained(tmp_path / "teacher")

    def make_student() -> None:
        teacher = load_teacher(tmp_path / "teacher")
        student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 2), history_layers=1)
        student.save_pretrained(tmp_path / "run/student")

    make_student()
    draw = ["sample", "--student", str(tmp_path / "run"), "--labels", "apple", "--out", str(tmp_path / "apple.npz")]
    assert main(draw) == 2
    assert "no class names; give numbers from 0 to 4, or write class_names into its config.json" in capsys.readouterr().err
    file = tmp_path / where / "config.json"
    names = ["pear", "apple, Malus", "plum", "fig", "quince"]
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "class_names": names}), encoding="utf-8")
    if where == "teacher":
        make_student()
    assert main(draw) == 0
    assert Student.from_pretrained(tmp_path / "run/student").config.class_names == tuple(names)
