"""Every family's transformer, traced, equals PyTorch at other batch sizes and prompt lengths than it was traced at."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from covering import with_products
from tiny_pipelines import tiny_pipeline

from pyard.conditions import Condition
from pyard.export import export_onnx
from pyard.models.student import Student
from pyard.runtime import OnnxStudent
from pyard.sampling.prompts import encode_prompts
from pyard.teachers.text_to_image.teacher import load_pipeline

TEXTS = ("a red circle", "a large green square above a small blue circle, and the blue circle is below the green square")


def tiny_text_student(name: str, folder: Path, **settings: Any) -> tuple[Student, list[Condition]]:
    """A student of a tiny pipeline, and a condition for each of `TEXTS`."""
    teacher = load_pipeline(tiny_pipeline(name, folder))
    shape = teacher.shape_of(32, 32)
    settings = {"history_layers": 2, "heads": "per_step", "history_bias": 0.7, "sample_shapes": (shape,), **settings}
    grid = teacher.grid(2, 4, shape)
    constants = teacher.constants(None)
    text = dataclasses.replace(teacher.text_source(), constants=constants)  # as a teacher says that was given prompts
    student = Student.from_teacher(teacher, grid, text=text, **settings)
    with torch.no_grad():
        for parameter in student.heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    conditions = [encode_prompts(teacher.text_encoder, [prompt], constants) for prompt in TEXTS]
    student.conditions = student.codec = None
    return student.eval(), conditions


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


CASES = [
    pytest.param("pixart_alpha", "step", 23, marks=pytest.mark.slow),
    pytest.param("pixart_alpha_1024", "sampler", 20, marks=pytest.mark.slow),
    pytest.param("sd3", "step", 23, marks=[pytest.mark.slow, with_products]),
    pytest.param("aura_flow", "step", 23, marks=[pytest.mark.slow, with_products]),
    pytest.param("flux", "sampler", 23, marks=pytest.mark.slow),
    pytest.param("qwen_image", "step", 20, marks=pytest.mark.slow),
    pytest.param("qwen_image", "sampler", 23, marks=[pytest.mark.slow, with_products]),
    pytest.param("z_image", "step", 23, marks=[pytest.mark.slow, with_products]),
    pytest.param("z_image", "sampler", 20, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "form", "opset"), CASES)
def test_a_traced_transformer_equals_pytorch(name: str, form: Any, opset: int, tmp_path: Path) -> None:
    student, conditions = tiny_text_student(name, tmp_path / "pipeline")
    parity = export_onnx(student, tmp_path / "student.onnx", form=form, opset=opset, examples=conditions)
    assert all(0 < error < 1e-4 for error in parity.values())
    exported = OnnxStudent(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    width = conditions[0]["tokens"].shape[2]
    for lengths in ((3,), (45, 12), (1, 31, 32, 33)):
        rows = [torch.randn(1, length, width, generator=generator) for length in lengths]
        condition = Condition.cat(
            [
                Condition({**conditions[0].index([0]), "tokens": row, "mask": torch.ones(row.shape[:2], dtype=torch.bool)})
                for row in rows
            ]
        )
        arrays = {tensor.name: condition[tensor.name].numpy() for tensor in exported.info.conditions}
        noise = torch.randn(len(lengths), *student.sample_shape, generator=generator)
        with torch.inference_mode():
            *_, expected = student.rollout(noise, condition)
        found = exported.sample(condition=arrays, noise=noise.numpy())
        assert relative_error(found, expected.numpy()) < 1e-4
        assert len(lengths) == 1 or relative_error(found[:1], found[1:2]) > 1e-2
    stored = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(tmp_path / "student.onnx").graph.initializer)
    tables = 2**20  # of positions
    assert stored < sum(weight.numel() for weight in student.parameters()) + tables, "weights are stored more than once"
