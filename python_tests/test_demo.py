"""The demo from end to end, in its quick form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pyard.demo import demo
from pyard.demo_figures import smooth


def test_quick_demo_goes_all_the_way_and_a_second_run_does_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    evaluation = demo(tmp_path, quick=True, progress=False)
    out = tmp_path / "quick"
    assert "ARD in onnxruntime" in capsys.readouterr().out
    content = json.loads((out / "quality.json").read_text())
    assert [row["network_passes"] for row in content["rows"]] == [50, 4, 4, 4]
    assert content["settings"]["max_difference_onnxruntime_pytorch"] < 1e-4
    teacher, baseline, ard, onnx = evaluation.rows
    assert teacher.label_accuracy > 0.5  # a blurred teacher, but one of digits
    assert onnx.endpoint_mse == pytest.approx(ard.endpoint_mse, rel=1e-3)
    assert ard.endpoint_mse < 2 * baseline.endpoint_mse
    picture = np.asarray(Image.open(out / "samples.png").convert("L"))
    assert picture.shape[0] > 300
    assert picture.std() > 20
    assert (out / "training.png").stat().st_size > 10_000

    def not_again(*args: object, **kwargs: object) -> None:
        raise AssertionError("this was done already")

    written = {path: path.stat().st_mtime_ns for path in (out / "trajectories").rglob("*.safetensors")}
    monkeypatch.setattr("pyard.teachers.digits._train", not_again)
    monkeypatch.setattr("pyard.demo.export_onnx", not_again)
    monkeypatch.setattr("pyard.demo.measure", not_again)
    assert demo(tmp_path, quick=True, progress=False) == evaluation
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_fresh_removes_the_demo_s_results_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyard.demo import _remove_results

    for name in ("ard/student", "trajectories"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("ard/student/model.safetensors", "quality.json", "notes.txt", "samples.png"):
        (tmp_path / name).write_text("x")
    _remove_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_smoothing_keeps_a_slope_and_drops_a_spike() -> None:
    slope = np.linspace(3, 1, 41)
    np.testing.assert_allclose(smooth(slope)[7:-7], slope[7:-7])
    spiked = slope.copy()
    spiked[20] = 100
    assert smooth(spiked).max() <= 3
    np.testing.assert_allclose(smooth(np.array([2.0])), [2.0])
