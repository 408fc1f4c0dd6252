"""Reading and writing the ARD authors' checkpoints as students."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.models.dit.checkpoint_file import Weights, read_checkpoint
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import Trunk, without_variance
from pyard.models.dit.tensor_names import (
    join_checkpoint,
    load_tensors,
    read_config,
    split_checkpoint,
    with_zero_variance,
    write_checkpoint,
)
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig


def load_ard_student(
    path: str | Path,
    *,
    history_layers: int = 6,
    teacher_steps: int = 25,
    num_heads: int | None = None,
    num_classes: int | None = None,
    weights: Weights | None = None,
) -> Student:
    """Read a checkpoint of the ARD authors' code: {"model", "ema", "opt"}, DiT's names and `final_layer2` … for later steps.

    The number of steps is the number of heads. N, the schedule (1000 linear betas) and the grid (`denoised` targets out of 25
    teacher steps, times 999 (1 - s/S)) are not in the file: N is an argument, and the others are taken from the authors' code.

    Args:
        path: the `.pt` or `.safetensors`.
        history_layers: N, the number of layers with a history in its training.
        teacher_steps: n, the number of teacher steps in the trajectories of its training.
        num_heads: H, the number of attention heads; needed for widths other than the published ones.
        num_classes: number of classes; needed if the label table has no row for "no class".
        weights: `ema` or `model`, if the file has both; None: `ema`.

    Raises:
        InputError: the file cannot be read, or is not such a checkpoint.
    """
    checkpoint = read_checkpoint(Path(path), weights=weights)
    tensors = checkpoint.tensors
    config = read_config(tensors, num_heads=num_heads, num_classes=num_classes, args=checkpoint.args)
    trunk, heads = split_checkpoint(tensors, config)
    schedule = NoiseSchedule()
    student = Student(
        StudentConfig(
            network=dataclasses.replace(config, out_channels=config.in_channels),
            grid=TimeGrid.build(schedule, len(heads), teacher_steps),
            schedule=schedule,
            history_layers=history_layers,
            target="denoised",
            output="direct",
            history_bias=None,
        )
    )
    load_tensors(student.trunk, trunk, path)
    for own, theirs in zip(student.heads, heads, strict=True):
        load_tensors(own, without_variance(theirs, config.patch_size, config.in_channels), path)
    return student.eval()


def save_ard_student(student: Student, path: str | Path) -> None:
    """Write a student as a checkpoint of the ARD authors' code.

    The authors' heads have 2C output channels, of which the last C, the teacher's variance, are unused. pyard's students do not
    have these channels, so they are written as zeros. "opt" is the state of an AdamW without moments, from which the authors'
    training starts afresh.

    Raises:
        InputError: the authors' code would compute something else with the student's weights.
    """
    config = student.config
    if not isinstance(student.trunk, Trunk) or not isinstance(config.network, DiTConfig):
        raise InputError(f"this student cannot be written as an ARD checkpoint: its network is not a DiT but {config.family}")
    network = config.network
    published = TimeGrid.build(config.schedule, student.num_steps, config.grid.teacher_steps)
    fixed = {
        "target": (config.target, "denoised"),
        "output": (config.output, "direct"),
        "mask": (config.mask, "causal"),
        "history_bias": (config.history_bias, None),
        "embed_times": (config.grid.embed_times, published.embed_times),
        "freq_shift": (network.freq_shift, 0.0),
        "norm_eps": (network.norm_eps, 1e-6),
        "mlp_norm_eps": (network.mlp_norm_eps, 1e-6),
        "(time_scale, time_offset)": ((network.time_scale, network.time_offset), (1.0, 0.0)),
    }
    other = [f"{name} is {found} instead of {theirs}" for name, (found, theirs) in fixed.items() if found != theirs]
    if other:
        raise InputError(f"this student cannot be written as an ARD checkpoint, whose code fixes: {'; '.join(other)}")
    # A shared head becomes as many equal ones as there are steps.
    heads = [student.heads[s % len(student.heads)].state_dict() for s in range(student.num_steps)]
    wide = [with_zero_variance(dict(head), network) for head in heads]
    tensors = join_checkpoint(dict(student.trunk.state_dict()), wide, network)
    parameters = [torch.nn.Parameter(tensor) for tensor in tensors.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    write_checkpoint(Path(path), tensors, opt=optimizer.state_dict())
