"""The exported graph equals PyTorch, stores its weights once, and appears whole or not at all."""

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from factories import tiny_student

import pyard
from pyard import export
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.runtime import OnnxStudent

# Each of N, target with output, heads and mask occurs; the whole product runs under -m slow.
COVERING: list[dict[str, Any]] = [
    {"num_steps": 2, "history_layers": 0, "target": "denoised", "output": "direct", "heads": "per_step"},
    {"num_steps": 3, "history_layers": 2, "target": "state", "output": "jump", "heads": "shared", "opset": 20},
    {"num_steps": 3, "history_layers": 2, "target": "denoised", "mask": "anchor", "history_bias": 0.7},
]
PRODUCT: list[dict[str, Any]] = [
    {"num_steps": 4, "history_layers": N, "target": target, "output": output, "heads": heads, "opset": opset, **mask}
    for N, (target, output), heads, opset, mask in itertools.product(
        (0, 2),
        (("denoised", "direct"), ("state", "direct"), ("state", "jump")),
        ("per_step", "shared"),
        (20, 23),
        ({"mask": "causal"}, {"mask": "window", "window": 2}),
    )
]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check_equal_to_pytorch(path: Path, settings: dict[str, Any]) -> tuple[Student, OnnxStudent]:
    opset = settings.get("opset", 23)
    student = tiny_student(**{name: value for name, value in settings.items() if name != "opset"})
    parity = export.export_onnx(student, path, opset=opset)
    assert set(parity) == {1, 3}
    assert all(0 < error < 1e-4 for error in parity.values())
    exported = OnnxStudent(path, providers=["CPUExecutionProvider"])
    labels = [0, 4, 2, 2, 1]
    expected = pyard.sample(student, labels, seed=9).numpy()
    for batch_size in (1, 5):
        assert relative_error(exported.sample(labels, seed=9, batch_size=batch_size), expected) < 1e-4
    # Otherwise the comparison could not see a label or a sample's noise that is not used.
    noise = np.repeat(exported.sample([0], seed=9) * 0 + 1, 5, axis=0)
    of_labels = exported.sample(range(5), noise=noise)
    assert all(relative_error(a, b) > 1e-2 for a, b in itertools.combinations(of_labels, 2))
    assert relative_error(expected[2], expected[3]) > 1e-2
    return student, exported


@pytest.mark.parametrize("settings", COVERING, ids=lambda s: f"N{s['history_layers']}-{s['target']}")
def test_export_equals_pytorch(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    student, exported = check_equal_to_pytorch(path, settings)

    info = exported.info
    assert (info.num_steps, info.history_layers) == (settings["num_steps"], settings["history_layers"])
    assert info.times == student.config.grid.times
    assert info.sample_shape == student.sample_shape
    assert info.num_classes == student.num_classes
    assert info.teacher_fingerprint == student.config.teacher_fingerprint

    model = onnx.load(path)
    stored = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    held = sum(tensor.numel() for tensor in [*student.parameters(), *student.buffers()])
    assert stored < held + 500, "weights are stored more than once"
    operators = [node.op_type for node in model.graph.node]
    assert not {"ScatterND", "ScatterElements", "Cos", "Sin", "ReduceMean"} & set(operators)
    passes = settings["num_steps"]
    assert operators.count("LayerNormalization") == passes * (2 * student.config.network.depth + 1)
    if "opset" not in settings:
        assert operators.count("Attention") == passes * student.config.network.depth
        assert "Softmax" not in operators
    assert str(Path(export.__file__).parent).encode() not in path.read_bytes(), "a path of this machine is in the file"


@pytest.mark.slow
@pytest.mark.parametrize("settings", PRODUCT, ids=lambda s: "-".join(map(str, s.values())))
def test_every_kind_of_student_equals_pytorch(settings: dict[str, Any], tmp_path: Path) -> None:
    check_equal_to_pytorch(tmp_path / "student.onnx", settings)


def test_a_deviation_fails_the_export_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "student.onnx"
    path.write_text("the previous export")
    forward = export.Sampler.forward

    def deviating(self: export.Sampler, noise: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return forward(self, noise, label) * 1.001

    monkeypatch.setattr(export.Sampler, "forward", deviating)
    with pytest.raises(RuntimeError, match=r"1\.0e-03 of the largest value; expected at most 1e-04"):
        export.export_onnx(tiny_student(1, history_layers=0), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "the previous export"


def test_export_leaves_the_student_as_it_was(tmp_path: Path) -> None:
    student = tiny_student(1, history_layers=1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    export.export_onnx(student.train(), tmp_path / "student.onnx")
    assert student.training
    assert student.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_command_line_writes_beside_the_student(tmp_path: Path) -> None:
    student = tiny_student(1, history_layers=1)
    student.save_pretrained(tmp_path / "run" / "student")
    command = [sys.executable, "-m", "pyard.export", "--onnx", "--student", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "error against PyTorch" in done.stdout
    assert done.stderr == ""
    exported = OnnxStudent(tmp_path / "run" / "student" / "student.onnx")
    expected = pyard.sample(student, [3], seed=2).numpy()
    assert relative_error(exported.sample([3], seed=2), expected) < 1e-4


def test_command_line_reports_wrong_input_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["--onnx", str(tmp_path / "out.onnx"), "--student", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(tmp_path: Path) -> None:
    student = tiny_student(1, history_layers=0)
    with pytest.raises(InputError, match="opset is 11; expected 20 to 23"):
        export.export_onnx(student, tmp_path / "student.onnx", opset=11)
    with pytest.raises(InputError, match="is a folder"):
        export.export_onnx(student, tmp_path)
