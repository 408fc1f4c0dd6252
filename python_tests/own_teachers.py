"""Random teachers of the backbones in `own_backbones`, their folders and stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from factories import randomise
from own_backbones import TextBackbone, TextConfig, VideoBackbone, VideoConfig

from pyard.conditions import EmbeddingTable
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.models.backbone import Denoiser
from pyard.models.student import Student
from pyard.teachers.network_teacher import NetworkTeacher

TEXT, VIDEO = "own_backbones:TextBackbone", "own_backbones:VideoBackbone"
FLOW = NoiseSchedule(kind="flow", prediction="velocity")
WIDE, TALL = (3, 4, 8), (3, 6, 4)


def prompts() -> EmbeddingTable:
    """Five prompts of 1 to 5 tokens, and the null row of two."""
    generator = torch.Generator().manual_seed(7)
    return EmbeddingTable([torch.randn(n, TextConfig().text_size, generator=generator) for n in (3, 5, 1, 4, 2, 2)])


def text_teacher(seed: int = 0, **changes: Any) -> NetworkTeacher:
    network = Denoiser(TextBackbone(TextConfig(**changes)))
    randomise(network, seed, std=0.3)
    return NetworkTeacher(network, FLOW, conditions=prompts())


def video_teacher(seed: int = 0) -> NetworkTeacher:
    network = Denoiser(VideoBackbone(VideoConfig()))
    randomise(network, seed, std=0.3)
    return NetworkTeacher(network, FLOW)


def student_of(teacher: NetworkTeacher, num_steps: int = 4, seed: int = 1, **settings: Any) -> Student:
    """A student whose parameters were drawn again, heads of different steps differently."""
    grid = TimeGrid.build(teacher.schedule, num_steps, 4)
    student = Student.from_teacher(teacher, grid, **{"history_layers": 2, **settings})
    randomise(student, seed, std=0.3)
    return student.eval()


def save(teacher: NetworkTeacher, folder: Path) -> str:
    teacher.save_pretrained(folder)
    return str(folder)
