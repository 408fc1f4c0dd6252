"""Checkpoints with DiT's tensor names as teachers: DiT's, SiT's, REPA's, LightningDiT's; DiT's and SiT's in both directions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

import torch

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.backbone import Denoiser
from pyard.models.dit.checkpoint_file import Tensors, Weights, read_checkpoint
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import DiT, dit_trunk
from pyard.models.dit.tensor_names import (
    join_checkpoint,
    load_tensors,
    read_config,
    split_checkpoint,
    with_zero_variance,
    write_checkpoint,
)
from pyard.models.lightning_dit.network import LightningDiT
from pyard.models.lightning_dit.tensor_names import read_lightning_config, split_lightning
from pyard.teachers import Family
from pyard.teachers.checkpoint_family import (
    family_of,
    has_qk_norm,
    refuse_other_networks,
    schedule_in,
    without_sections,
    without_training_parts,
)
from pyard.teachers.latent_statistics import LatentStatistics
from pyard.teachers.network_teacher import NetworkTeacher

_Config = TypeVar("_Config", bound=DiTConfig)

# Families whose time runs from 0, noise, to 1, data.
_NOISE_FIRST = ("sit", "lightningdit")

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
    weights: Weights | None = None,
) -> NetworkTeacher:
    """Read the `.pt` or `.safetensors` of DiT, SiT, REPA, REPA-E or LightningDiT.

    SiT's time runs from 0, noise, to 1, data, and its velocity points there. pyard's flows run from 1, noise, to 0, data: the
    network is told 1 - t, and the sign of a velocity is turned in the last layer's weights. REPA (Yu et al. 2025) has SiT's
    network and pyard's time and sign; its projectors, which only its training uses, are dropped. LightningDiT (Yao et al. 2025)
    has SiT's time and sign.

    Args:
        path: plain tensors, or a training checkpoint; `pyard.models.dit.checkpoint_file` says which are known.
        family: `dit`, `sit`, `repa` (REPA-E as well) or `lightningdit`, whose tensors have the same names; none: from the file.
        num_heads: H; needed for widths other than the published ones.
        num_classes: needed if the label table has no row for "no class" and the file's settings do not say so.
        schedule: how it was trained; none: as the file's settings say, else as its family's code does by default.
        weights: `ema` or `model`, of a file that has both; none: `ema`.

    Returns:
        The teacher; REPA-E's has `latent_statistics`, and so has LightningDiT's if its `latents_stats.pt` lies beside it.

    Raises:
        InputError: a file that cannot be read, another network, or one whose family or number of heads is not known.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path, weights=weights)
    tensors, args = checkpoint.tensors, checkpoint.args
    refuse_other_networks(tensors, path)
    family = family_of(tensors, args, path, family)
    tensors, statistics = without_training_parts(tensors, path)
    if family == "lightningdit":
        args = without_sections(args)
    trained = schedule_in(args, family, path)
    network: Denoiser
    if family == "lightningdit" or has_qk_norm(tensors):
        sizes = _timed(read_lightning_config(tensors, num_heads=num_heads, num_classes=num_classes, args=args), family)
        trunk, head = split_lightning(tensors)
        if family == "lightningdit":
            statistics = LatentStatistics.beside(path, sizes.in_channels)
        with torch.device("meta"):
            network = Denoiser(LightningDiT(sizes))
    else:
        config = _timed(read_config(tensors, num_heads=num_heads, num_classes=num_classes, args=args), family)
        trunk, heads = split_checkpoint(tensors, config)
        if len(heads) != 1:
            raise InputError(f"{path} has {len(heads)} output heads: it is an ARD student; read it with pyard.load_ard_student")
        head = heads[0]
        with torch.device("meta"):
            network = DiT(config)
    if family in _NOISE_FIRST and trained.prediction == "velocity":
        head = _negated(head)
    load_tensors(network.trunk, trunk, path, assign=True)
    load_tensors(network.head, head, path, assign=True)
    return NetworkTeacher(network, schedule or trained, latent_statistics=statistics)


def _timed(config: _Config, family: Family) -> _Config:
    """Sizes of a network whose time runs as its family's."""
    return dataclasses.replace(config, time_scale=-1.0, time_offset=1.0) if family in _NOISE_FIRST else config


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
        head, expected = _negated(head), (-1.0, 1.0)
    fixed = {
        "freq_shift": (config.freq_shift, 0.0),
        "norm_eps": (config.norm_eps, 1e-6),
        "mlp_norm_eps": (config.mlp_norm_eps, 1e-6),
        "(time_scale, time_offset)": (times, expected),
        "mlp_ratio": (config.mlp_ratio, 4.0),
        "frequency_size": (config.frequency_size, 256),
        "has_null_label": (config.has_null_label, True),
        "path": (schedule.path, "linear"),
        "prediction": (schedule.prediction, SCHEDULES[family].prediction),
    }
    other = [f"{name} is {found} instead of {theirs}" for name, (found, theirs) in fixed.items() if found != theirs]
    if other:
        raise InputError(f"this teacher cannot be written as a {family} checkpoint, whose code fixes: {'; '.join(other)}")
    write_checkpoint(Path(path), join_checkpoint(dict(trunk.state_dict()), [head], config))


def _negated(head: Tensors) -> Tensors:
    return {name: -tensor if name.startswith("linear.") else tensor for name, tensor in head.items()}
