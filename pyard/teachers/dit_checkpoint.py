"""DiT's and SiT's own checkpoints as teachers, in both directions."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Literal, get_args

import torch

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.dit.network import DiT, dit_trunk
from pyard.models.dit.tensor_names import (
    Tensors,
    join_checkpoint,
    read_checkpoint,
    read_config,
    split_checkpoint,
    with_zero_variance,
    write_checkpoint,
)
from pyard.teachers import Family
from pyard.teachers.network_teacher import NetworkTeacher

# What the two papers' code trains with. DiT (Peebles & Xie 2023): eps, 1000 linear betas, respaced with both ends. SiT
# (Ma et al. 2024), its default: the velocity of a linear path.
SCHEDULES: dict[str, NoiseSchedule] = {"dit": NoiseSchedule(), "sit": NoiseSchedule(kind="flow", prediction="velocity")}


def load_checkpoint(
    path: str | Path,
    *,
    family: Family | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    schedule: NoiseSchedule | None = None,
    weights: Literal["ema", "model"] = "ema",
) -> NetworkTeacher:
    """Read a DiT's or SiT's `.pt` or `.safetensors`.

    SiT's time runs from 0, noise, to 1, data, and its velocity points there. pyard's flows run from 1, noise, to 0, data: the
    network is told 1 - t, and the sign of its output is turned in the last layer's weights.

    Args:
        path: plain tensors, or a training checkpoint {"model", "ema", "opt", "args"}.
        family: `dit` or `sit`, whose tensors have the same names; none: from the file's name or its "args".
        num_heads: H; needed for widths other than the published ones.
        num_classes: needed if the label table has no row for "no class".
        schedule: how it was trained; none: as its family's code does by default.
        weights: which of a training checkpoint's weights: `ema` or `model`.

    Raises:
        InputError: a file that cannot be read, or whose family or number of heads is not known.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path, weights=weights)
    family = family or _family_in(checkpoint.model_name or "") or _family_in(path.stem)
    if family is None or family not in get_args(Family):
        raise InputError(
            f"{path}: DiT and SiT checkpoints have the same tensors, and neither the file's name nor its contents say which "
            f"this is; give family='dit' or family='sit' (found {family!r})"
        )
    config = read_config(checkpoint.tensors, num_heads=num_heads, num_classes=num_classes)
    trunk, heads = split_checkpoint(checkpoint.tensors, config)
    if len(heads) != 1:
        raise InputError(f"{path} has {len(heads)} output heads: it is an ARD student; read it with pyard.load_ard_student")
    head = heads[0]
    if family == "sit":
        config = dataclasses.replace(config, time_scale=-1.0, time_offset=1.0)
        head = _turned(head)
    with torch.device("meta"):
        network = DiT(config)
    network.trunk.load_state_dict(trunk, assign=True)
    network.head.load_state_dict(head, assign=True)
    return NetworkTeacher(network, schedule or SCHEDULES[family])


def save_checkpoint(teacher: NetworkTeacher, path: str | Path) -> None:
    """Write a teacher with DiT's own names, as `.pt` or `.safetensors`; a flow is written with SiT's time and sign.

    A teacher of C output channels gets C more that are zero, since DiT's and SiT's code expects a variance there.

    Raises:
        InputError: the network has settings that DiT's code fixes otherwise.
    """
    trunk, schedule = dit_trunk(teacher.network, f"{path}, a checkpoint with DiT's names"), teacher.schedule
    config = trunk.config
    family = "sit" if schedule.kind == "flow" else "dit"
    head = dict(teacher.network.head.state_dict())
    if config.out_channels == config.in_channels:
        head = with_zero_variance(head, config)
    times = (config.time_scale, config.time_offset)
    expected = (1.0, 0.0)
    if family == "sit":
        head, expected = _turned(head), (-1.0, 1.0)
    fixed = {
        "freq_shift": (config.freq_shift, 0.0),
        "norm_eps": (config.norm_eps, 1e-6),
        "mlp_norm_eps": (config.mlp_norm_eps, 1e-6),
        "(time_scale, time_offset)": (times, expected),
        "mlp_ratio": (config.mlp_ratio, 4.0),
        "frequency_size": (config.frequency_size, 256),
        "has_null_label": (config.has_null_label, True),
        "prediction": (schedule.prediction, SCHEDULES[family].prediction),
    }
    other = [f"{name} is {found}, theirs {theirs}" for name, (found, theirs) in fixed.items() if found != theirs]
    if other:
        raise InputError(f"this teacher cannot be written as a {family} checkpoint, whose code fixes: {'; '.join(other)}")
    write_checkpoint(Path(path), join_checkpoint(dict(trunk.state_dict()), [head], config))


def _turned(head: Tensors) -> Tensors:
    return {name: -tensor if name.startswith("linear.") else tensor for name, tensor in head.items()}


def _family_in(name: str) -> Family | None:
    found = re.search(r"(?<![a-z])(dit|sit)(?![a-z])", name.lower())
    return None if found is None else ("dit" if found[1] == "dit" else "sit")
