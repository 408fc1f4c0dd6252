"""Tiny models with every parameter random: a fresh adaLN-Zero network outputs zeros, which would make any equality pass."""

from __future__ import annotations

from typing import Any

import torch

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import DiT
from pyard.models.dit.tensor_names import join_checkpoint
from pyard.models.student import Student
from pyard.teachers import load_teacher
from pyard.teachers.network_teacher import NetworkTeacher


def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Draw every parameter, biases, gates and heads included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
            parameter.copy_(noise.to(parameter))


def tiny_config(**changes: Any) -> DiTConfig:
    """A DiT of T = 16 tokens, D = 32, L = 3, H = 2, 5 classes."""
    sizes: dict[str, Any] = dict(
        input_size=8, in_channels=2, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=5, frequency_size=32
    )
    return DiTConfig(**{**sizes, **changes})


def tiny_teacher(schedule: NoiseSchedule | None = None, seed: int = 0, **changes: Any) -> NetworkTeacher:
    """A teacher with random weights."""
    network = DiT(tiny_config(**changes))
    randomise(network, seed)
    return NetworkTeacher(network, schedule or NoiseSchedule())


def dit_tensors(seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """The tensors of a tiny DiT under DiT's own names, a variance predicted."""
    network = DiT(tiny_config(out_channels=4, frequency_size=256, **changes))
    randomise(network, seed)
    return join_checkpoint(dict(network.trunk.state_dict()), [dict(network.head.state_dict())], network.config)


def tiny_student(num_steps: int = 4, teacher_steps: int = 12, seed: int = 1, **settings: Any) -> Student:
    """A student of `tiny_teacher` whose parameters were drawn again, heads of different steps differently."""
    teacher = tiny_teacher()
    settings = {"target": "denoised", **settings}
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, num_steps, teacher_steps), **settings)
    randomise(student, seed)
    return student.eval()


def digits_student(num_steps: int = 4, history_layers: int = 2) -> Student:
    """A student of the built-in teacher. Untrained, it draws digits already: its jumps are the teacher's own steps."""
    teacher = load_teacher("digits")
    return Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, num_steps), history_layers=history_layers).eval()


def scenes_student() -> Student:
    """A student of the built-in text-to-image teacher, untrained as in `digits_student`."""
    teacher = load_teacher("scenes-text")
    settings: dict[str, Any] = dict(history_layers=2, heads="per_step", output="jump", text=teacher.text_source())
    return Student.from_teacher(teacher, teacher.grid(3, 6, teacher.shape_of(None, None)), **settings).eval()
