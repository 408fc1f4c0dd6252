"""The exported graph equals PyTorch, stores its weights once, and appears whole or not at all."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from covering import covering
from factories import tiny_student, tiny_teacher

import pyard
from pyard import export
from pyard.cli.command_line import main
from pyard.errors import InputError
from pyard.export.files import config_path
from pyard.models.student import Student
from pyard.runtime import OnnxStudent
from pyard.storage.files import file_sha256

# Each of N, target with output, heads and mask occurs.
COVERING: list[dict[str, Any]] = [
    {"num_steps": 2, "history_layers": 0, "target": "denoised", "output": "direct", "heads": "per_step"},
    {"num_steps": 3, "history_layers": 2, "target": "state", "output": "jump", "heads": "shared", "opset": 20},
    {"num_steps": 3, "history_layers": 2, "target": "denoised", "mask": "anchor", "history_bias": 0.7, "form": "step"},
    {"num_steps": 4, "history_layers": 1, "target": "state", "mask": "window", "window": 2, "history_bias": 0.7, "opset": 20},
    {"num_steps": 3, "history_layers": 1, "target": "state", "mask": "diagonal", "output": "jump", "form": "step"},
]
PRODUCT: list[dict[str, Any]] = [
    {
        "num_steps": 4,
        "history_layers": N,
        "target": target,
        "output": output,
        "heads": heads,
        "opset": opset,
        **mask,
        "form": form,
    }
    for N, (target, output), heads, opset, mask, form in itertools.product(
        (0, 2),
        (("denoised", "direct"), ("state", "direct"), ("state", "jump")),
        ("per_step", "shared"),
        (20, 23),
        (
            {"mask": "causal"},
            {"mask": "causal", "history_bias": 0.7},
            {"mask": "window", "window": 2, "history_bias": 0.7},
            {"mask": "window", "window": 1},
            {"mask": "anchor"},
        ),
        ("sampler", "step"),
    )
]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check_equal_to_pytorch(path: Path, settings: dict[str, Any]) -> tuple[Student, OnnxStudent]:
    of_file = {name: settings[name] for name in ("opset", "form") if name in settings}
    student = tiny_student(**{name: value for name, value in settings.items() if name not in of_file})
    parity = export.export_onnx(student, path, **of_file)
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
    assert all(relative_error(a, b) > 1e-3 for a, b in itertools.combinations(of_labels, 2))
    assert relative_error(expected[2], expected[3]) > 1e-3
    return student, exported


@pytest.mark.parametrize(
    "settings",
    [*COVERING[:2], *(pytest.param(settings, marks=pytest.mark.slow) for settings in COVERING[2:])],
    ids=lambda s: f"N{s['history_layers']}-{s['target']}",
)
def test_export_equals_pytorch(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    student, exported = check_equal_to_pytorch(path, settings)

    info = exported.info
    assert (info.num_steps, info.history_layers) == (settings["num_steps"], settings["history_layers"])
    assert info.times == student.config.grid.times
    assert info.sample_shape == student.sample_shape
    assert info.num_classes == student.num_classes
    assert info.teacher_fingerprint == student.config.teacher_fingerprint

    assert info.form == settings.get("form", "sampler")

    model = onnx.load(path)
    stored = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    held = sum(tensor.numel() for tensor in [*student.parameters(), *student.buffers()])
    assert stored < held + 500, "weights are stored more than once"
    operators = [node.op_type for node in model.graph.node]
    assert not {"ScatterND", "ScatterElements", "Cos", "Sin", "ReduceMean", "Softmax"} & set(operators)
    passes = settings["num_steps"] if info.form == "sampler" else 1
    depth = student.config.network.depth
    assert operators.count("LayerNormalization") == passes * (2 * depth + 1)
    attention = "Attention" if settings.get("opset", 23) >= 23 else "MultiHeadAttention"
    assert operators.count(attention) == passes * depth
    assert operators.count("Sigmoid") == 1, "the conditioning of all steps is computed at once"
    assert Student.from_pretrained(_folder_of_config(path, student)).config == student.config
    assert str(Path(export.__file__).parent).encode() not in path.read_bytes(), "a path of this machine is in the file"


def _folder_of_config(path: Path, student: Student) -> Path:
    folder = path.parent / "again"
    student.save_pretrained(folder)
    path.with_name(f"{path.name}.json").replace(folder / "config.json")
    return folder


def test_each_norm_of_a_block_has_its_own_epsilon(tmp_path: Path) -> None:
    teacher = tiny_teacher(norm_eps=0.1, mlp_norm_eps=0.9)
    student = Student.from_teacher(teacher, pyard.TimeGrid.build(teacher.schedule, 2), history_layers=1)
    export.export_onnx(student, tmp_path / "student.onnx")
    expected = pyard.sample(student, [3], seed=2).numpy()
    assert relative_error(OnnxStudent(tmp_path / "student.onnx").sample([3], seed=2), expected) < 1e-4


def test_every_prediction_of_the_step_form_equals_pytorch(tmp_path: Path) -> None:
    student = tiny_student(4, history_layers=2)
    export.export_onnx(student, tmp_path / "student.onnx", form="step")
    streamed = list(OnnxStudent(tmp_path / "student.onnx").stream([3, 0, 4], seed=7))
    expected = pyard.sample(student, [3, 0, 4], seed=7, return_trajectory=True).numpy()
    assert len(streamed) == 4
    for step, prediction in enumerate(streamed):
        assert relative_error(prediction, expected[:, step]) < 1e-5
    assert all(relative_error(a, b) > 1e-2 for a, b in itertools.pairwise(streamed))


@pytest.mark.slow
def test_present_keys_are_only_those_that_the_mask_still_shows(tmp_path: Path) -> None:
    for mask, tokens in (({"mask": "causal"}, 48), ({"mask": "anchor"}, 16), ({"mask": "window", "window": 2}, 16)):
        student = tiny_student(4, history_layers=1, **mask)
        export.export_onnx(student, tmp_path / "student.onnx", form="step")
        session = OnnxStudent(tmp_path / "student.onnx")._session
        past = {f"past_key_values.0.{kind}": np.zeros((1, 2, 0, 16), dtype=np.float32) for kind in ("key", "value")}
        for step in range(3):
            latent, label = np.ones((1, 2, 8, 8), dtype=np.float32), np.zeros(1, dtype=np.int64)
            _, *present = session.run(None, {"latent": latent, "label": label, "step": np.array(step), **past})
            past = dict(zip(past, present, strict=True))
        assert {array.shape for array in present} == {(1, 2, tokens, 16)}


@pytest.mark.slow
def test_external_data_lie_beside_the_model_until_an_export_without_them(tmp_path: Path) -> None:
    path, student = tmp_path / "student.onnx", tiny_student(2, history_layers=1)
    export.export_onnx(student, path, external_data=True)
    (data,) = tmp_path.glob("*.data")
    assert data.name == f"student.onnx.{file_sha256(data)[:16]}.data"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["student.onnx", data.name, "student.onnx.json"]
    assert path.stat().st_size < data.stat().st_size
    expected = pyard.sample(student, [1, 2], seed=3).numpy()
    assert relative_error(OnnxStudent(path).sample([1, 2], seed=3), expected) < 1e-4
    export.export_onnx(student, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["student.onnx", "student.onnx.json"]


@pytest.mark.slow
def test_a_model_and_its_data_change_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before any rename, an export leaves the former model with the former data, or the new one with its own."""
    path, noise = tmp_path / "student.onnx", np.ones((1, 2, 8, 8), dtype=np.float32)
    export.export_onnx(tiny_student(2, history_layers=1), path, external_data=True)
    before = OnnxStudent(path).sample([1], noise=noise)
    (tmp_path / "other.data").write_bytes(b"precious")
    other = tiny_student(2, history_layers=1, seed=5)
    replace, renames = Path.replace, []

    def killed(self: Path, target: Path) -> Path:
        if len(renames) == stop:
            raise KeyboardInterrupt
        renames.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    for last in range(4):  # the list of what is to go, configuration, data, model
        stop = last
        renames.clear()
        with pytest.raises(KeyboardInterrupt):
            export.export_onnx(other, path, external_data=True)
        assert np.array_equal(OnnxStudent(path).sample([1], noise=noise), before)
    stop = 100
    export.export_onnx(tiny_student(1, history_layers=0), path)
    assert [file.name for file in tmp_path.glob("*.data")] == ["other.data"]  # those of the killed exports are gone
    renames.clear()
    export.export_onnx(other, path, external_data=True)
    assert renames[-1] == "student.onnx"
    assert not np.array_equal(OnnxStudent(path).sample([1], noise=noise), before)
    assert len(list(tmp_path.glob("*.data"))) == 2
    assert (tmp_path / "other.data").read_bytes() == b"precious"
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_is_no_model_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    path.write_text("precious notes", encoding="utf-8")
    with pytest.raises(InputError, match=r"student\.onnx is not an ONNX model"):
        export.export_onnx(tiny_student(1, history_layers=0), path)
    assert path.read_text(encoding="utf-8") == "precious notes"


@pytest.mark.parametrize("name", ["student.onnx", "student.onnx.json"])
def test_a_link_is_neither_followed_nor_replaced(name: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious", encoding="utf-8")
    for target in (elsewhere, tmp_path / "nothing"):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(InputError, match=rf"{name} is a link; expected a file or a new path"):
            export.export_onnx(tiny_student(1, history_layers=0), tmp_path / "student.onnx")
        assert (tmp_path / name).readlink() == target
        (tmp_path / name).unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["elsewhere"]
    assert elsewhere.read_text(encoding="utf-8") == "precious"


def test_weights_that_one_file_cannot_hold_go_into_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST_SINGLE_FILE", 1000)
    export.export_onnx(tiny_student(1, history_layers=0), tmp_path / "student.onnx")
    assert len(list(tmp_path.glob("student.onnx.*.data"))) == 1


@pytest.mark.slow
def test_each_file_has_a_configuration_of_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}', encoding="utf-8")
    for steps in (1, 2):
        export.export_onnx(tiny_student(steps, history_layers=0), tmp_path / f"{steps}.onnx")
    names = ["1.onnx", "1.onnx.json", "2.onnx", "2.onnx.json", "config.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == '{"_class_name": "AutoencoderKL"}'
    for steps in (1, 2):
        config = json.loads((tmp_path / f"{steps}.onnx.json").read_text(encoding="utf-8"))
        assert len(config["grid"]["times"]) == steps + 1
    (tmp_path / "1.onnx.json").write_text('{"mine": 1}', encoding="utf-8")
    with pytest.raises(InputError, match="belongs to something else"):
        export.export_onnx(tiny_student(1, history_layers=0), tmp_path / "1.onnx")


def test_a_file_beside_the_student_leaves_its_config_alone(tmp_path: Path) -> None:
    tiny_student(1, history_layers=0).save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    export.export_onnx(tmp_path, tmp_path / "student.onnx")
    assert (tmp_path / "config.json").read_bytes() == before
    assert (tmp_path / "student.onnx.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("settings", covering(PRODUCT), ids=lambda s: "-".join(map(str, s.values())))
def test_every_kind_of_student_equals_pytorch(settings: dict[str, Any], tmp_path: Path) -> None:
    check_equal_to_pytorch(tmp_path / "student.onnx", settings)


def test_a_deviation_fails_the_export_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "student.onnx"
    student = tiny_student(1, history_layers=0)
    export.export_onnx(student, path)
    config_path(path).unlink()
    previous = path.read_bytes()
    rollout = Student.rollout
    monkeypatch.setattr(Student, "rollout", lambda *args: (prediction / 1.001 for prediction in rollout(*args)))
    with pytest.raises(InputError, match=r"0\.00(1|0999).* of the largest value; expected at most 0\.0001\. ") as refused:
        export.export_onnx(student, path)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == previous


@pytest.mark.slow
def test_a_larger_error_is_accepted_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student(1, history_layers=0)
    student.save_pretrained(tmp_path / "student")
    rollout = Student.rollout
    monkeypatch.setattr(Student, "rollout", lambda *args: (prediction / 1.001 for prediction in rollout(*args)))
    words = ["export", "--onnx", str(tmp_path / "a.onnx"), "--student", str(tmp_path / "student")]
    assert main(words) == 2
    assert not (tmp_path / "a.onnx").exists()
    assert main([*words, "--parity-bound", "0.002"]) == 0
    assert (tmp_path / "a.onnx").exists()
    with pytest.raises(InputError, match="parity_bound is 0; expected more than 0"):
        export.export_onnx(student, tmp_path / "b.onnx", parity_bound=0)


def test_the_bound_is_printed_as_it_is() -> None:
    bound = 1e-4 + 1.01 / 255
    with pytest.raises(InputError, match=r"by 0\.004062 of the largest value; expected at most 0\.00406078"):
        export.check_parity({1: 0.0, 3: 0.0040616}, bound, Path("student.onnx"))


def test_overflow_of_half_precision_is_called_by_its_name(tmp_path: Path) -> None:
    student = tiny_student(1, history_layers=0)
    with torch.no_grad():
        for module in (m for m in student.trunk.modules() if isinstance(m, torch.nn.Linear)):
            module.weight.mul_(300 / module.weight.abs().max())
    with pytest.raises(InputError, match=r"an activation exceeds 65504, the largest number of fp16\. Use --precision fp32"):
        export.export_onnx(student, tmp_path / "a.onnx", precision="fp16")
    with torch.no_grad():
        next(iter(student.parameters())).view(-1)[0] = 7e4
    with pytest.raises(InputError, match=r"of the student reaches \S+; fp16 holds at most 65504"):
        export.export_onnx(student, tmp_path / "a.onnx", precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_is_invalid_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = export.save_model

    def with_a_wrong_shape(model: Any, path: Path, **settings: Any) -> None:
        write(model, path, **settings)
        broken = onnx.load(path)
        broken.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 77
        onnx.save(broken, path)

    monkeypatch.setattr(export, "save_model", with_a_wrong_shape)
    with pytest.raises(RuntimeError, match=r"student\.onnx was not written: onnx\.checker refuses the graph"):
        export.export_onnx(tiny_student(1, history_layers=0), tmp_path / "student.onnx")
    assert list(tmp_path.iterdir()) == []


def test_export_leaves_the_student_as_it_was(tmp_path: Path) -> None:
    student = tiny_student(1, history_layers=1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    export.export_onnx(student.train(), tmp_path / "student.onnx")
    assert student.training
    assert student.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.slow
def test_command_line_writes_beside_the_student(tmp_path: Path) -> None:
    student = tiny_student(1, history_layers=1)
    student.save_pretrained(tmp_path / "run" / "student")
    command = [sys.executable, "-m", "pyard.export", "--onnx", "--external-data", "--student", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "error against PyTorch" in done.stdout
    assert done.stderr == ""
    assert len(list((tmp_path / "run" / "student").glob("student.onnx.*.data"))) == 1
    exported = OnnxStudent(tmp_path / "run" / "student" / "student.onnx")
    expected = pyard.sample(student, [3], seed=2).numpy()
    assert relative_error(exported.sample([3], seed=2), expected) < 1e-4


def test_command_line_reports_wrong_input_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--onnx", str(tmp_path / "out.onnx"), "--student", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(tmp_path: Path) -> None:
    student = tiny_student(1, history_layers=0)
    with pytest.raises(InputError, match="opset is 11; expected 20 to 23"):
        export.export_onnx(student, tmp_path / "student.onnx", opset=11)
    with pytest.raises(InputError, match="form is 'steps'; expected one of sampler, step"):
        export.export_onnx(student, tmp_path / "student.onnx", form="steps")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is a folder"):
        export.export_onnx(student, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "opset"), [("fp16", 23), ("int8", 23), ("int8-static", 23), ("int8", 20)])
def test_precisions(precision: export.Precision, opset: int, tmp_path: Path) -> None:
    student, path = tiny_student(3, history_layers=1, target="state", output="jump"), tmp_path / "student.onnx"
    exact = export.export_onnx(student, tmp_path / "exact.onnx", opset=opset)
    parity = export.export_onnx(student, path, opset=opset, precision=precision, calibration=9)
    assert all(exact[size] < error < export.PARITY_BOUND[precision] for size, error in parity.items())
    info = OnnxStudent(path).info
    assert info.precision == precision
    # A table of labels, norms and the like stay as they were in int8, and half of a tiny student are adaLN's.
    assert path.stat().st_size < 0.8 * (tmp_path / "exact.onnx").stat().st_size
    model = onnx.load(path)
    operators = [node.op_type for node in model.graph.node]
    types = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 2}
    if precision == "fp16":
        assert types == {onnx.TensorProto.FLOAT16}
        assert all(tensor.data_type == onnx.TensorProto.FLOAT for tensor in _jump_coefficients(model))
    else:
        assert onnx.TensorProto.INT8 in types
        products = 3 * student.config.network.depth * 6  # q, k, v, proj, fc1, fc2 of every pass
        of_all_steps = student.config.network.depth  # the modulations
        found = operators.count("MatMulInteger") + operators.count("DequantizeLinear") // 2
        assert found >= products + of_all_steps if precision == "int8" else found > 0


def _jump_coefficients(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    scalars = [
        constants[name] for node in model.graph.node if node.op_type == "Mul" for name in node.input if name in constants
    ]
    assert len(scalars) == 6, "two for each of three jumps"
    return scalars


@pytest.mark.slow
def test_a_deviation_of_each_precision_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for precision in ("fp16", "int8"):
        monkeypatch.setitem(export.PARITY_BOUND, precision, 1e-6)
        with pytest.raises(RuntimeError, match=r"was not written.*expected at most 1e-06"):
            export.export_onnx(tiny_student(2, history_layers=1), tmp_path / "student.onnx", precision=precision)
        assert list(tmp_path.iterdir()) == []
