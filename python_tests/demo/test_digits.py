"""The demo from end to end, in its quick form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pyard.demo.digits import demo
from pyard.demo.figures import smooth


@pytest.mark.slow
def test_quick_demo_goes_all_the_way_and_a_second_run_does_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    evaluation = demo(tmp_path, quick=True, adversarial=True, progress=False)
    out = tmp_path / "quick"
    assert "ARD in onnxruntime" in capsys.readouterr().out
    content = json.loads((out / "quality.json").read_text())
    assert {row["name"]: row["network_passes"] for row in content["rows"]} == {
        "teacher": 50, "step distillation": 4, "ARD": 4, "ARD, defaults": 4, "ARD + GAN": 4, "ARD in onnxruntime": 4,
    }  # fmt: skip
    assert content["settings"]["max_difference_onnxruntime_pytorch"] < 1e-4
    teacher, baseline, ard, jumping, judged, onnx = evaluation.rows
    assert teacher.label_accuracy > 0.5  # a blurred teacher, but one of digits
    assert onnx.endpoint_mse == pytest.approx(ard.endpoint_mse, rel=1e-3)
    assert ard.endpoint_mse < 2 * baseline.endpoint_mse
    assert jumping.endpoint_mse < ard.endpoint_mse  # it starts as a sampler, and this is a short run
    assert judged.frechet_to_data < ard.frechet_to_data  # which it went on from; neither has learned much in so few updates
    assert (out / "ard-gan" / "student" / "model.safetensors").exists()
    picture = np.asarray(Image.open(out / "samples.png").convert("L"))
    assert picture.shape[0] > 300
    assert picture.std() > 20
    assert (out / "training.png").stat().st_size > 10_000

    def not_again(*args: object, **kwargs: object) -> None:
        raise AssertionError("this was done already")

    written = {path: path.stat().st_mtime_ns for path in (out / "trajectories").rglob("*.safetensors")}
    monkeypatch.setattr("pyard.teachers.digits._train", not_again)
    monkeypatch.setattr("pyard.demo.digits.export_onnx", not_again)
    monkeypatch.setattr("pyard.demo.digits.measure", not_again)
    assert demo(tmp_path, quick=True, adversarial=True, progress=False) == evaluation
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_fresh_removes_the_demo_s_results_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyard.demo.digits import _remove_results

    for name in ("ard/student", "trajectories"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("ard/student/model.safetensors", "quality.json", "notes.txt", "samples.png"):
        (tmp_path / name).write_text("x")
    _remove_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_students_train_side_by_side(tmp_path: Path) -> None:
    """In processes of their own, one that follows another after it, to the same weights as in this process."""
    from dataclasses import replace

    from factories import tiny_teacher
    from safetensors.torch import load_file

    from pyard.demo.students import ADVERSARIAL, ARD, DIGITS_DISCRIMINATORS, QUICK, run_of, train_side_by_side
    from pyard.diffusion.noise_schedule import NoiseSchedule
    from pyard.training import train
    from pyard.trajectories import generate_trajectories

    teacher = tiny_teacher(NoiseSchedule(kind="flow", prediction="velocity"), in_channels=1, num_classes=10)
    teacher.save_pretrained(tmp_path / "teacher")
    store = generate_trajectories(teacher, tmp_path / "store", 40, teacher_steps=6, progress=False)
    budget = replace(QUICK, student_steps=3, adversarial_steps=2, student_batch_size=8)
    runs = {name: run_of(name, budget, tmp_path / "side", 3, 0) for name in (ADVERSARIAL, ARD)}
    train_side_by_side(str(tmp_path / "teacher"), store.path, runs, progress=False, follows={ADVERSARIAL: ARD})
    assert runs[ADVERSARIAL]["adversarial"] == {**DIGITS_DISCRIMINATORS, "warmup_steps": 0}
    for name in (ARD, ADVERSARIAL):
        run = run_of(name, budget, tmp_path / "alone", 3, 0)
        train(teacher, store, **run, progress=False)
        ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (run["out"], runs[name]["out"]))
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)


def test_smoothing_keeps_a_slope_and_drops_a_spike() -> None:
    slope = np.linspace(3, 1, 41)
    np.testing.assert_allclose(smooth(slope)[7:-7], slope[7:-7])
    spiked = slope.copy()
    spiked[20] = 100
    assert smooth(spiked).max() <= 3
    np.testing.assert_allclose(smooth(np.array([2.0])), [2.0])
