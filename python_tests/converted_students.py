"""Students of tiny pipelines, and what they draw: with pyard, and with the lines of Python in a converted student's card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pixel_unshuffle

from pyard import load_teacher
from pyard.cli.command_line import main
from pyard.models.codec import LatentCodec
from pyard.models.lora import add_lora, merge_lora
from pyard.models.student import Student
from pyard.models.student_config import TextSource
from pyard.sampling.prompts import condition_of_prompts

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


def train_lora(student: Student, rank: int = 2) -> Student:
    """Move every matrix of the blocks by a matrix of this rank."""
    add_random_lora(student, rank)
    merge_lora(student)
    return student


def add_random_lora(student: Student, rank: int, heads: Any = "whole") -> Student:
    """Low-rank additions that are not zero, as they are after training."""
    add_lora(student, rank, heads)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
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
    is_flux2 = "Flux2" in code
    packs = ("Flux" in code or "Qwen" in code) and not is_flux2
    start = pixel_unshuffle(noise(), 2).flatten(2).transpose(1, 2) if packs else noise()
    start = pixel_unshuffle(start, 2) if is_flux2 else start
    code = code.replace(").images[0]", ', latents=start, output_type="latent").images')
    names: dict[str, Any] = {"start": start}
    exec(code, names)
    latents: torch.Tensor = names["image"]
    if packs:
        latents = nn.functional.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (SHAPE[1] // 2, SHAPE[2] // 2)), 2)
    if is_flux2:  # its latents are those of the VAE
        latents = LatentCodec(names["pipe"].vae).scaling().from_vae(latents)
    return latents


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())
