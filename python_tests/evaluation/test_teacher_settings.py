"""A student is compared with the teacher it was trained on: same weights, guidance, solver and steps."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import randomise, tiny_teacher
from training_runs import SETTINGS

import pyard
from pyard.diffusion.noise import standard_normal, uniform_labels
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.evaluation.teacher_settings import TeacherSettings
from pyard.export import export_onnx
from pyard.models.student import Student
from pyard.runtime import OnnxStudent
from pyard.teachers.guidance import endpoints
from pyard.training import train

RECORDED = {"teacher_steps": 5, "cfg_scale": 2.5, "cfg_channels": None, "cfg_interval": [0.2, 0.9], "solver": "heun"}
FLAGS = dict(count=12, batch_size=6, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher/`, `run/` on trajectories of unusual settings, and `run/student.onnx`."""
    folder = tmp_path_factory.mktemp("run")
    teacher = tiny_teacher(NoiseSchedule(kind="flow", prediction="velocity"), in_channels=1, num_classes=10)
    teacher.save_pretrained(folder / "teacher")
    store = pyard.generate_trajectories(
        teacher, folder / "store", 16, num_steps=3, teacher_steps=5, cfg_scale=2.5, cfg_interval=(0.2, 0.9), solver="heun",
        batch_size=8, progress=False,
    )  # fmt: skip
    train(teacher, store, out=folder / "run", **{**SETTINGS, "max_steps": 1})
    export_onnx(folder / "run", folder / "run/student.onnx")
    return folder


def test_what_a_student_was_trained_on_is_in_its_config_and_in_its_onnx_file(folder: Path) -> None:
    config = json.loads((folder / "run/student/config.json").read_text(encoding="utf-8"))
    assert {name: config[name] for name in RECORDED} == RECORDED
    teacher = pyard.load_teacher(folder / "teacher")
    assert config["teacher_fingerprint"] == teacher.fingerprint
    student = Student.from_pretrained(folder / "run")
    expected = {**RECORDED, "cfg_interval": (0.2, 0.9)}
    assert student.config.teacher_settings == expected
    assert OnnxStudent(folder / "run/student.onnx").info.teacher_settings == expected
    # Students that nobody trained say nothing, and their files keep their bytes.
    fresh = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 3, 5))
    assert fresh.config.teacher_settings is None
    assert not set(RECORDED) & set(fresh.config.to_json())


@pytest.mark.parametrize("which", ["run", "run/student.onnx"])
def test_the_teacher_s_row_is_the_teacher_that_the_student_learnt_from(which: str, folder: Path) -> None:
    teacher = pyard.load_teacher(folder / "teacher")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation = pyard.evaluate(str(folder / which), teacher, **FLAGS)
    assert {name: evaluation.settings[name] for name in RECORDED} == {**RECORDED, "cfg_interval": (0.2, 0.9)}
    noise = torch.from_numpy(standard_normal(1000, np.arange(12), teacher.sample_shape))
    labels = torch.arange(12) % 10
    guided = endpoints(teacher, noise, labels, 5, cfg_scale=2.5, cfg_interval=(0.2, 0.9), solver="heun")
    student = pyard.sample(folder / "run", labels.numpy(), seed=1000)
    expected = float((guided.clamp(-1, 1) - student.clamp(-1, 1)).square().mean())
    assert evaluation.rows[1].endpoint_mse == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cfg_scale": 1.5}, "cfg_scale is 1.5, but .* was trained on trajectories with cfg_scale 2.5"),
        ({"cfg_channels": 1}, "cfg_channels is 1, but .* with cfg_channels none"),
        ({"cfg_interval": None}, r"cfg_interval is none, but .* with cfg_interval \[0.2, 0.9\]"),
        ({"solver": "euler"}, "solver is euler, but .* with solver heun"),
        ({"teacher_steps": 25}, "teacher_steps is 25, but .* with teacher_steps 5"),
    ],
)
@pytest.mark.parametrize("which", ["run", "run/student.onnx"])
def test_a_flag_that_differs_is_refused(which: str, given: dict, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        pyard.evaluate(str(folder / which), folder / "teacher", **FLAGS, **given)


def test_equal_flags_are_taken_and_the_teacher_may_be_left_out(folder: Path) -> None:
    same = dict(teacher_steps=5, cfg_scale=2.5, cfg_channels=None, cfg_interval=[0.2, 0.9], solver="heun")
    assert len(pyard.evaluate(str(folder / "run"), folder / "teacher", **FLAGS, **same).rows) == 2
    assert len(pyard.evaluate(str(folder / "run"), folder / "teacher", **FLAGS, teacher_steps=0).rows) == 1


def test_a_student_of_another_teacher_or_of_other_settings_is_refused(folder: Path) -> None:
    teacher = pyard.load_teacher(folder / "teacher")
    randomise(teacher.network, seed=9)
    other = type(teacher)(teacher.network, teacher.schedule)
    with pytest.raises(InputError, match=f"was made from teacher .*, but this is teacher {other.fingerprint[:12]}"):
        pyard.evaluate(str(folder / "run"), other, **FLAGS)
    settings = dict(zip(RECORDED, (5, 1.0, None, None, "heun"), strict=True))
    student = Student.from_pretrained(folder / "run")
    changed = Student.from_pretrained(folder / "run")
    object.__setattr__(changed.config, "cfg_scale", 1.0)
    object.__setattr__(changed.config, "cfg_interval", None)
    assert changed.config.teacher_settings == settings
    with pytest.raises(InputError, match=r"one was trained on trajectories with cfg_scale 2\.5, two with 1\.0"):
        TeacherSettings.of([("one", student), ("two", changed)], {}, student.config.teacher_fingerprint)


def test_students_that_record_nothing_are_compared_by_the_flags_with_a_warning(folder: Path) -> None:
    student = Student.from_pretrained(folder / "run")
    object.__setattr__(student.config, "cfg_scale", None)
    with pytest.warns(UserWarning, match="does not record .* cfg_scale 3.0"):
        evaluation = pyard.evaluate(student, folder / "teacher", **FLAGS, teacher_steps=4, cfg_scale=3.0)
    assert (evaluation.settings["teacher_steps"], evaluation.settings["cfg_scale"]) == (4, 3.0)
    with pytest.warns(UserWarning, match="teacher_steps 25, cfg_scale 1.5"):
        TeacherSettings.of([("old", student)], {}, student.config.teacher_fingerprint)


def test_passes_are_those_of_the_teacher(folder: Path) -> None:
    teacher = pyard.load_teacher(folder / "teacher")
    calls = []
    teacher.network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    for settings in (TeacherSettings(5, 2.5, None, (0.2, 0.9), "heun"), TeacherSettings(4, 1.0, None, None, None)):
        calls.clear()
        noise = torch.from_numpy(standard_normal(0, [0], teacher.sample_shape))
        labels = torch.from_numpy(uniform_labels(0, [0], 10))
        endpoints(
            teacher, noise, labels, settings.teacher_steps, cfg_scale=settings.cfg_scale, cfg_interval=settings.cfg_interval,
            solver=settings.solver,
        )  # fmt: skip
        assert settings.passes(teacher.schedule) == sum(calls)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda folder: {"features": folder / "no.pt"}, "no.pt: no such file"),
        (lambda folder: {"features": folder / "pointer.pt"}, "Git LFS pointer"),
        (lambda folder: {"reference": folder / "no.npz"}, "no such file or folder"),
        (lambda folder: {"out": folder}, "out is .*, a folder"),
        (lambda folder: {"out": folder / "pointer.pt" / "q.json"}, "q.json, which cannot be written"),
        (lambda folder: {"samples_npz": folder / "samples.npy"}, "expected a name that ends in .npz"),
        (
            lambda folder: {"reference": folder / "ref.npz", "out": folder / "ref.npz"},
            "out is .* is read and would be replaced",
        ),
        (
            lambda folder: {"reference": folder / "ref.npz", "samples_npz": folder / "link.npz"},
            "samples_npz is .* is read and would be replaced",
        ),
    ],
)
def test_missing_files_and_bad_names_are_found_before_the_work(given, message: str, tmp_path: Path) -> None:
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    (tmp_path / "ref.npz").write_bytes(b"pictures")
    (tmp_path / "link.npz").symlink_to(tmp_path / "ref.npz")
    with pytest.raises(InputError, match=message):  # before the teacher, which is not there, is looked for
        pyard.evaluate("nowhere", "no-teacher", **given(tmp_path))
    assert (tmp_path / "ref.npz").read_bytes() == b"pictures"
