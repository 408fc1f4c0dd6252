"""A traced graph equals PyTorch at other sizes than it was traced at, and pyard's assembled graph of a DiT."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from covering import with_products
from factories import randomise, tiny_student
from traced_backbones import BesselBackbone, MyBackbone, MyConfig, SpecialisingBackbone, VideoBackbone, VideoConfig

import pyard
from pyard.cli.command_line import main
from pyard.conditions import Condition, EmbeddingTable
from pyard.errors import InputError
from pyard.export import export_onnx
from pyard.export.condition_inputs import ConditionInputs
from pyard.models.backbone import Backbone, Denoiser
from pyard.models.student import Student
from pyard.runtime import OnnxStudent
from pyard.teachers.network_teacher import NetworkTeacher

FLOW = pyard.NoiseSchedule(kind="flow", prediction="velocity")
COVERING: list[dict[str, Any]] = [
    {"mask": "causal", "history_bias": 0.7, "heads": "per_step", "target": "state", "output": "jump", "form": "step"},
    {"mask": "window", "window": 2, "heads": "shared", "target": "state", "output": "direct", "form": "sampler", "opset": 20},
    {"mask": "anchor", "history_bias": 0.7, "heads": "per_step", "output": "direct", "form": "step", "opset": 20},
    {"mask": "diagonal", "heads": "shared", "target": "state", "output": "jump", "form": "sampler"},
]
PRODUCT = [
    {**mask, **bias, "heads": heads, "target": "state", "output": output, "form": form}
    for mask, bias, heads, output, form in itertools.product(
        ({"mask": "causal"}, {"mask": "window", "window": 2}, {"mask": "anchor"}, {"mask": "diagonal"}),
        ({}, {"history_bias": 0.7}),
        ("per_step", "shared"),
        ("jump", "direct"),
        ("sampler", "step"),
    )
]


def prompts() -> EmbeddingTable:
    generator = torch.Generator().manual_seed(3)
    return EmbeddingTable([torch.randn(n, 8, generator=generator) for n in (3, 5, 2, 4, 1)])


def student_of(backbone: Backbone, **settings: Any) -> Student:
    conditions = None if backbone.num_classes is not None else prompts()
    teacher = NetworkTeacher(Denoiser(backbone), FLOW, conditions=conditions)
    settings = {"history_layers": 2, "heads": "per_step", **settings}
    student = Student.from_teacher(teacher, pyard.TimeGrid.build(FLOW, 3, 3), **settings)
    randomise(student, 1, std=0.3)
    return student.eval()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@torch.inference_mode()
def pytorch(student: Student, noise: np.ndarray, condition: Condition) -> list[np.ndarray]:
    return [prediction.numpy() for prediction in student.rollout(torch.from_numpy(noise), condition)]


def compare_with_assembled(settings: dict[str, Any], folder: Path) -> None:
    of_file = {name: settings[name] for name in ("form", "opset") if name in settings}
    student = tiny_student(3, history_layers=2, **{k: v for k, v in settings.items() if k not in of_file})
    exported = []
    for method in ("assembled", "traced"):
        export_onnx(student, folder / method / "student.onnx", method=method, **of_file)  # type: ignore[arg-type]
        exported.append(OnnxStudent(folder / method / "student.onnx", providers=["CPUExecutionProvider"]))
    assembled, traced = exported
    assert [(i.name, i.type) for i in assembled._session.get_inputs()] == [
        (i.name, i.type) for i in traced._session.get_inputs()
    ]
    assert [(o.name, o.shape[1:]) for o in assembled._session.get_outputs()] == [
        (o.name, o.shape[1:]) for o in traced._session.get_outputs()
    ]
    assert relative_error(traced.sample([0, 4, 2, 2], seed=9), assembled.sample([0, 4, 2, 2], seed=9)) < 1e-4
    if settings["form"] == "step":
        pairs = zip(traced.stream([1, 3], seed=2), assembled.stream([1, 3], seed=2), strict=True)
        assert all(relative_error(a, b) < 1e-4 for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("settings", COVERING, ids=lambda s: f"{s['mask']}-{s['form']}")
def test_the_assembled_graph_of_a_dit_equals_the_traced_one(settings: dict[str, Any], tmp_path: Path) -> None:
    compare_with_assembled(settings, tmp_path)


@pytest.mark.slow
@with_products
@pytest.mark.parametrize("settings", PRODUCT, ids=str)
def test_every_assembled_graph_equals_the_traced_one(settings: dict[str, Any], tmp_path: Path) -> None:
    compare_with_assembled(settings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sampler", "step"])
def test_a_backbone_that_is_not_ours(form: Any, tmp_path: Path) -> None:
    student = student_of(
        MyBackbone(MyConfig()), mask="causal" if form == "step" else "window", window=None if form == "step" else 2
    )
    path = tmp_path / "student.onnx"
    parity = export_onnx(student, path, form=form)
    assert all(0 < error < 1e-4 for error in parity.values())
    exported = OnnxStudent(path, providers=["CPUExecutionProvider"])
    assert (exported.info.num_classes, exported.info.num_conditions) == (None, 4)
    assert [str(t) for t in exported.info.conditions] == [
        "tokens float32 [batch, num_tokens, 8]",
        "mask bool [batch, num_tokens]",
    ]
    metadata = json.loads(exported._session.get_modelmeta().custom_metadata_map["pyard"])
    assert metadata["conditions"][0] == {"name": "tokens", "dtype": "float32", "shape": [None, None, 8]}
    stored = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)
    assert stored < sum(p.numel() for p in student.parameters()) + 500, "weights are stored more than once"
    assert str(Path(pyard.__file__).parent).encode() not in path.read_bytes(), "a path of this machine is in the file"

    traced = ConditionInputs(student).traced_sizes["num_tokens"]
    generator = np.random.default_rng(0)
    for batch, length in ((1, 1), (2, traced + 9), (7, 4)):
        tokens = generator.standard_normal((batch, length, 8), dtype=np.float32)
        mask = np.arange(length) <= np.arange(batch)[:, None]
        noise = generator.standard_normal((batch, 1, 8, 4), dtype=np.float32)
        condition = {"tokens": tokens, "mask": mask}
        expected = pytorch(student, noise, Condition({name: torch.from_numpy(array) for name, array in condition.items()}))
        found = exported.sample(condition=condition, noise=noise, batch_size=2)
        assert relative_error(found, expected[-1]) < 1e-4
        if form == "step":
            for prediction, theirs in zip(exported.stream(condition=condition, noise=noise), expected, strict=True):
                assert relative_error(prediction, theirs) < 1e-4
        assert (
            batch == 1
            or relative_error(exported.sample(condition={**condition, "mask": mask | True}, noise=noise), found) > 1e-2
        )


@pytest.mark.slow
@pytest.mark.parametrize(("form", "settings"), [("step", {"history_bias": 0.7}), ("sampler", {"mask": "anchor"})])
def test_a_video(form: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    student = student_of(VideoBackbone(VideoConfig()), **settings)
    export_onnx(student, tmp_path / "student.onnx", form=form)
    exported = OnnxStudent(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    found = exported.sample([0, 3, 1, 1], seed=4)
    assert found.shape == (4, 2, 2, 2, 4)
    assert relative_error(found, pyard.sample(student, [0, 3, 1, 1], seed=4).numpy()) < 1e-4
    assert relative_error(found[2], found[3]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-static"])
def test_precisions(precision: Any, tmp_path: Path) -> None:
    student = student_of(MyBackbone(MyConfig()))
    path = tmp_path / "student.onnx"
    parity = export_onnx(student, path, form="step", precision=precision, calibration=9)
    assert all(1e-6 < error < (2e-2 if precision == "fp16" else 0.25) for error in parity.values())
    operators = [node.op_type for node in onnx.load(path).graph.node]
    quantised = sum(op in ("MatMulInteger", "DynamicQuantizeMatMul", "QuantizeLinear") for op in operators)
    assert (quantised > 0) == (precision != "fp16")


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    with pytest.raises(InputError, match="makes the size 'num_tokens' a constant"):
        export_onnx(student_of(SpecialisingBackbone(MyConfig())), path, form="step")
    with pytest.raises(InputError, match=r"BesselBackbone cannot be traced for ONNX: .*bessel_j0"):
        export_onnx(student_of(BesselBackbone(MyConfig())), path, form="step")
    with pytest.raises(InputError, match="VideoBackbone mixes float32 with half precision"):
        export_onnx(student_of(VideoBackbone(VideoConfig())), path, form="step", precision="fp16")
    with pytest.raises(InputError, match="is that of a DiT"):
        export_onnx(student_of(MyBackbone(MyConfig())), path, method="assembled")
    with pytest.raises(InputError, match="method is 'fast'; expected one of auto, assembled, traced"):
        export_onnx(student_of(MyBackbone(MyConfig())), path, method="fast")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_student_without_a_table_is_traced_with_examples(tmp_path: Path) -> None:
    student = student_of(MyBackbone(MyConfig()))
    examples = [prompts().take([0, 2]), prompts().take([1])]
    student.conditions = None
    with pytest.raises(InputError, match="in Python, give export_onnx examples="):
        export_onnx(student, tmp_path / "student.onnx")
    export_onnx(student, tmp_path / "student.onnx", form="step", examples=examples)
    exported = OnnxStudent(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    assert exported.info.num_conditions is None
    assert [tensor.shape for tensor in exported.info.conditions] == [("batch", "size_0", 8), ("batch", "size_0")]


def test_wrong_conditions_are_refused_in_one_line(tmp_path: Path) -> None:
    export_onnx(student_of(MyBackbone(MyConfig())), tmp_path / "student.onnx", form="step")
    exported = OnnxStudent(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    tokens, mask = np.zeros((2, 3, 8), dtype=np.float32), np.ones((2, 3), dtype=bool)
    for condition, message in (
        ({"tokens": tokens}, "condition: found tokens; expected a dictionary of tokens float32"),
        ({"tokens": tokens.astype(np.float64), "mask": mask}, r"found float64 \[2, 3, 8\]; expected tokens float32"),
        ({"tokens": tokens[:, :, :7], "mask": mask}, r"\['tokens'\]: found float32 \[2, 3, 7\]"),
        ({"tokens": tokens, "mask": mask[:, :2]}, r"\['mask'\]: found bool \[2, 2\]; .* where batch is 2, num_tokens is 3"),
        ({"tokens": tokens, "mask": mask[:1]}, r"\['mask'\]: found bool \[1, 3\]"),
        ({"tokens": tokens.tolist(), "mask": mask}, "found list; expected a numpy array"),
    ):
        with pytest.raises(InputError, match=message):
            exported.sample(condition=condition)
    with pytest.raises(InputError, match=r"not on classes; give condition=… with tokens"):
        exported.sample([1, 2])
    with pytest.raises(InputError, match="found neither labels and condition"):
        exported.sample()
    with pytest.raises(InputError, match="noise: found float32"):
        exported.sample(condition={"tokens": tokens, "mask": mask}, noise=np.zeros((2, 1, 4, 8), dtype=np.float32))


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student_of(MyBackbone(MyConfig())).save_pretrained(tmp_path / "student")
    command = ["export", "--student", str(tmp_path / "student"), "--form", "step"]
    assert main(command) == 2
    assert "--network" in capsys.readouterr().err
    assert main([*command, "--network", "traced_backbones:MyBackbone", "--onnx", str(tmp_path / "out" / "s.onnx")]) == 0
    assert OnnxStudent(tmp_path / "out" / "s.onnx").info.form == "step"
