"""Translates LightningDiT's tensor names to pyard's, and derives its sizes and settings from its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from pyard.errors import InputError
from pyard.models.dit.checkpoint_file import Tensors
from pyard.models.dit.tensor_names import read_config
from pyard.models.lightning_dit.config import LightningDiTConfig, QKNorm
from pyard.models.lightning_dit.network import rotation

_PARTS = (
    (r"x_embedder\.proj\.", "patch_embed."),
    (r"t_embedder\.mlp\.0\.", "time_embed.fc1."),
    (r"t_embedder\.mlp\.2\.", "time_embed.fc2."),
    (r"y_embedder\.embedding_table\.", "label_embed."),
    (r"(blocks\.\d+\.)attn\.", r"\1"),
    (r"(blocks\.\d+\.)mlp\.(?:w12|fc1)\.", r"\1fc1."),
    (r"(blocks\.\d+\.)mlp\.(?:w3|fc2)\.", r"\1fc2."),
    (r"(blocks\.\d+\.)adaLN_modulation\.1\.", r"\1modulation."),
    (r"final_layer\.adaLN_modulation\.1\.", "final_layer.modulation."),
    (r"final_layer\.norm_final\.", "final_layer.norm."),
)
_HEAD = "final_layer."
_ROTARY = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")


def read_lightning_config(
    tensors: Tensors, *, num_heads: int | None, num_classes: int | None, args: Mapping[str, Any]
) -> LightningDiTConfig:
    """Derive sizes and settings of a network from its tensors.

    Args:
        tensors: with LightningDiT's names.
        num_heads: H; None: derived from the rotary embedding or the QK norm, which show the size of a head, else that of the
            published model of this width.
        num_classes: as for DiT.
        args: settings of the training script.

    Raises:
        InputError: the tensors are not a LightningDiT's.
    """
    first = "blocks.0."
    try:
        width = tensors["x_embedder.proj.weight"].shape[0]
        modulation = tensors[f"{first}adaLN_modulation.1.weight"].shape[0]
        mlp_size = tensors[f"{first}mlp.w3.weight" if f"{first}mlp.w3.weight" in tensors else f"{first}mlp.fc2.weight"].shape[1]
    except (KeyError, IndexError) as error:
        raise InputError(f"not a LightningDiT checkpoint: there is no tensor {error}") from None
    if modulation not in (4 * width, 6 * width):
        raise InputError(
            f"not a LightningDiT checkpoint: {first}adaLN_modulation.1.weight has {modulation} rows; expected 4 or "
            f"6 times {width}"
        )
    rotary = _ROTARY[0] in tensors
    q_norm = tensors.get(f"{first}attn.q_norm.weight")
    head_dim = tensors[_ROTARY[0]].shape[-1] if rotary else None if q_norm is None else q_norm.shape[-1]
    if head_dim and not width % head_dim:
        found = width // head_dim
        if num_heads not in (None, found):
            raise InputError(
                f"heads of {head_dim} numbers in a width of {width} are {found}, but num_heads is {num_heads}; leave it out"
            )
        num_heads = found
    qk_norm: QKNorm = "none" if q_norm is None else "layer" if f"{first}attn.q_norm.bias" in tensors else "rms"
    # DiT's sizes have DiT's names, but for the MLP's.
    sizes = read_config(
        {**tensors, f"{first}mlp.fc1.weight": torch.empty(mlp_size, width, device="meta")},
        num_heads=num_heads,
        num_classes=num_classes,
        args=args,
    )
    config = LightningDiTConfig(
        **sizes.to_json(),
        norm="rms" if f"{first}norm1.weight" in tensors else "layer",
        qk_norm=qk_norm,
        mlp="swiglu" if f"{first}mlp.w12.weight" in tensors else "gelu",
        rotary=rotary,
        shift=modulation == 6 * width,
    )
    if rotary:
        _check_rotation(tensors, config)
    return config


def _check_rotation(tensors: Tensors, config: LightningDiTConfig) -> None:
    """Raises InputError unless the stored cosines and sines are those that the network computes."""
    angle = rotation(config.input_size // config.patch_size, config.head_dim, torch.device("cpu")).repeat_interleave(2, dim=-1)
    for name, expected in zip(_ROTARY, (angle.cos(), angle.sin()), strict=True):
        found = tensors.get(name)
        if found is None or found.shape != expected.shape or not torch.allclose(found.double(), expected, atol=1e-2):
            raise InputError(
                f"not a LightningDiT checkpoint: {name} is not the rotation by row and column of "
                f"{len(expected)} tokens in a square"
            )


def split_lightning(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """LightningDiT's tensors under pyard's names: those of the backbone, and those of the head."""
    trunk: Tensors = {}
    head: Tensors = {}
    for name, tensor in tensors.items():
        if name in _ROTARY:
            continue
        ours = name
        for pattern, replacement in _PARTS:
            ours, count = re.subn(f"^{pattern}", replacement, ours)
            if count:
                break
        if ours.startswith(_HEAD):
            head[ours.removeprefix(_HEAD)] = tensor
        else:
            trunk[ours] = tensor
    trunk["patch_embed.weight"] = trunk["patch_embed.weight"].flatten(1)  # [D, C, P, P] -> [D, C*P*P]
    trunk["pos_embed"] = trunk["pos_embed"].flatten(0, -2)  # [1, T, D] -> [T, D]
    return trunk, head
