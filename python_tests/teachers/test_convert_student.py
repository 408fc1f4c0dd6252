"""Students as what diffusers loads: the stock pipeline, set up by the model card's own lines, draws what pyard draws."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline
from torch import nn
from torch.nn.functional import pixel_unshuffle

from pyard import load_teacher
from pyard.cli.command_line import main
from pyard.models.lora import add_lora, merge_lora
from pyard.models.student import Student
from pyard.models.student_config import TextSource
from pyard.sampling.prompts import condition_of_prompts

NAMES = ("pixart_alpha", "pixart_sigma", "sd3", "flux", "qwen_image", "z_image")
PROMPT = "a red circle above a blue square"
SHAPE = (4, 8, 12)
LORA = "pytorch_lora_weights.safetensors"


def convert(*words: str | Path | int) -> int:
    return main(["convert", *map(str, words)])


def student_of(folder: Path, steps: int, teacher_steps: int | None = None, **settings: Any) -> Student:
    """An untrained student of a pipeline for 32 x 48 pixels."""
    teacher: Any = load_teacher(folder)
    grid = teacher.grid(steps, teacher_steps, SHAPE)
    text = TextSource(teacher.family.pipeline, str(folder), None, teacher.constants(None))
    settings = {"history_layers": 0, "output": "jump", "heads": "shared", "target": "state", **settings}
    return Student.from_teacher(teacher, grid, sample_shapes=[SHAPE], text=text, **settings).eval()


def train_in_full(student: Student) -> Student:
    """Move every weight."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return student


def train_lora(student: Student, rank: int = 2) -> Student:
    """Move every matrix of the blocks by a matrix of this rank."""
    add_lora(student, rank)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    merge_lora(student)
    return student


def noise() -> torch.Tensor:
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def drawn_by_pyard(student: Student) -> torch.Tensor:
    *_, last = student.rollout(noise(), condition_of_prompts(student, [PROMPT]))
    return last


def code_of(folder: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


@torch.no_grad()
def drawn_by_the_card(folder: Path) -> torch.Tensor:
    """What the card's lines draw from `noise`, unpacked: the same lines, told to start there and to stop before the VAE."""
    code = code_of(folder)
    assert code.count(").images[0]") == 1
    packs = "Flux" in code or "Qwen" in code
    start = pixel_unshuffle(noise(), 2).flatten(2).transpose(1, 2) if packs else noise()
    code = code.replace(").images[0]", ', latents=start, output_type="latent").images')
    names: dict[str, Any] = {"start": start}
    exec(code, names)
    latents: torch.Tensor = names["image"]
    if packs:
        latents = nn.functional.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (SHAPE[1] // 2, SHAPE[2] // 2)), 2)
    return latents


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


class Records(logging.Handler):
    """Warnings of diffusers and PEFT, which do not reach the root logger."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())

    def __enter__(self) -> Records:
        for name in ("diffusers", "peft"):
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(self, *args: object) -> None:
        for name in ("diffusers", "peft"):
            logging.getLogger(name).removeHandler(self)


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_stock_pipeline_draws_with_the_transformer(name: str, steps: int, tmp_path: Path) -> None:
    folder = tiny_pipeline(name, tmp_path / "pipeline")
    untrained = student_of(folder, steps)
    before = drawn_by_pyard(untrained)
    student = train_in_full(untrained)
    student.save_pretrained(tmp_path / "run" / "student")
    assert convert(tmp_path / "run", "--to", "transformer", "--out", tmp_path / "out") == 0
    expected = drawn_by_pyard(student)
    assert relative(expected, before) > 1e-2
    assert relative(drawn_by_the_card(tmp_path / "out"), expected) <= 1e-4


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_stock_pipeline_draws_with_the_lora(name: str, steps: int, tmp_path: Path) -> None:
    folder = tiny_pipeline(name, tmp_path / "pipeline")
    before = drawn_by_pyard(student_of(folder, steps))
    student = train_lora(student_of(folder, steps))
    student.save_pretrained(tmp_path / "student")
    assert convert(tmp_path / "student", "--to", "lora", "--out", tmp_path / "out") == 0
    expected = drawn_by_pyard(student)
    assert relative(expected, before) > 1e-2
    with Records() as records:
        found = drawn_by_the_card(tmp_path / "out")
    assert records.found == []
    assert relative(found, expected) <= 1e-4
    if name.startswith("pixart"):
        assert not (tmp_path / "out" / LORA).exists()
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    else:
        tensors = load_file(tmp_path / "out" / LORA)
        assert all(re.fullmatch(r"transformer\..+\.lora_[AB]\.weight", key) for key in tensors)
    assert {min(tensor.shape) for tensor in tensors.values()} == {2}
