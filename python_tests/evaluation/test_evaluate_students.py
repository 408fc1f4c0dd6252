"""`pyard.evaluate` and `python -m pyard evaluate`, on random students of the digits' shape."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from factories import randomise, tiny_teacher

import pyard
from pyard.__main__ import main
from pyard.evaluation.evaluate_students import student_candidate, teacher_candidate
from pyard.export import export_onnx
from pyard.models.student import Student
from pyard.noise import standard_normal
from pyard.teachers.dit import DiTTeacher
from pyard.time_grid import TimeGrid

DIGITS = {"in_channels": 1, "num_classes": 10}


@pytest.fixture
def teacher() -> DiTTeacher:
    return tiny_teacher(**DIGITS)


@pytest.fixture
def student(teacher: DiTTeacher) -> Student:
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 4, 6), history_layers=2)
    randomise(student, seed=3)
    return student.eval()


def test_command_line_writes_the_same_numbers_as_the_function(
    teacher: DiTTeacher, student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    export_onnx(student, tmp_path / "student.onnx")
    sources = [str(tmp_path / "student"), str(tmp_path / "student.onnx")]
    flags = {"count": 40, "teacher_steps": 3, "batch_size": 16}
    words = [f"--{key}={value}" for key, value in flags.items()]
    words += ["--students", json.dumps(sources), "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "q.json")]
    assert main(["evaluate", *words]) == 0
    assert "Fréchet data" in capsys.readouterr().out
    content = json.loads((tmp_path / "q.json").read_text())
    assert [row["network_passes"] for row in content["rows"]] == [6, 4, 4]
    torch_row, onnx_row = content["rows"][1:]
    assert onnx_row["endpoint_mse"] == pytest.approx(torch_row["endpoint_mse"], rel=1e-4)
    assert onnx_row["frechet_to_data"] == pytest.approx(torch_row["frechet_to_data"], rel=1e-3)

    again = pyard.evaluate(student, teacher, **flags, progress=False)
    assert again.rows[1].endpoint_mse == pytest.approx(torch_row["endpoint_mse"], rel=1e-6)
    assert again.settings["teacher_fingerprint"] == teacher.fingerprint


def test_candidates_draw_what_the_samplers_draw(teacher: DiTTeacher, student: Student) -> None:
    labels = np.array([3, 1, 4])
    noise = standard_normal(7, np.arange(3), teacher.sample_shape)
    drawn = student_candidate(student, teacher).draw(noise, labels)
    np.testing.assert_allclose(drawn, pyard.sample(student, labels, seed=7).numpy(), rtol=1e-5, atol=1e-6)
    # Unguided, one pass a step; guided, two.
    assert teacher_candidate(teacher, 5, cfg_scale=1.0).network_passes == 5
    assert teacher_candidate(teacher, 5, cfg_scale=1.5).network_passes == 10


def test_wrong_input_is_named(teacher: DiTTeacher, student: Student) -> None:
    with pytest.raises(pyard.InputError, match=r"\(2, 8, 8\)"):
        pyard.evaluate(student, tiny_teacher(), progress=False)
    other = tiny_teacher(in_channels=1, num_classes=7)
    with pytest.raises(pyard.InputError, match=r"10 classes; the teacher draws .* of 7"):
        pyard.evaluate(student, other, progress=False)
