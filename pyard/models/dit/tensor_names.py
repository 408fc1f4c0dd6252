"""Translates DiT's tensor names to pyard's, and derives the sizes of a network from its tensors.

DiT, SiT and the ARD authors' students share these names, so they cannot be told apart by their tensors alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyard.errors import InputError
from pyard.models.dit.checkpoint_file import Tensors
from pyard.models.dit.config import DiTConfig
from pyard.storage.files import new_file

# Heads of the published S, B, L and XL models by width; the tensors hold no trace of them.
KNOWN_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}

# What training scripts call the share of labels that they drop.
_LABEL_DROPOUT = ("class_dropout_prob", "cfg_prob", "label_dropout_prob", "class_dropout")

_TRUNK = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embed.fc1",
    "t_embedder.mlp.2": "time_embed.fc2",
    "y_embedder.embedding_table": "label_embed",
}
_BLOCK = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "adaLN_modulation.1": "modulation",
}
_HEAD = {"linear": "linear", "adaLN_modulation.1": "modulation"}


def read_config(
    tensors: Tensors, *, num_heads: int | None = None, num_classes: int | None = None, args: Mapping[str, Any] | None = None
) -> DiTConfig:
    """Derive the sizes of a network from its tensors.

    Args:
        tensors: with DiT's names.
        num_heads: H; None: that of the published model of this width.
        num_classes: the number of rows of the label table, or one fewer if one row means "no class"; None: as `args` says,
            else one fewer.
        args: settings of the training script.

    Raises:
        InputError: the tensors are not a DiT's, the width is unknown and num_heads is missing, or num_classes does not fit the
            table.
    """
    try:
        patch = tensors["x_embedder.proj.weight"]  # [D, C, P, P]
        position = tensors["pos_embed"]  # [1, T, D]
        head = tensors["final_layer.linear.weight"]  # [P*P*C_out, D]
        table = tensors["y_embedder.embedding_table.weight"]
        mlp = tensors["blocks.0.mlp.fc1.weight"]
        frequencies = tensors["t_embedder.mlp.0.weight"]
    except KeyError as error:
        found = ", ".join(list(tensors)[:4])
        raise InputError(f"not a DiT checkpoint: there is no tensor {error}; found {len(tensors)} tensors: {found} …") from None
    if patch.ndim != 4 or patch.shape[2] != patch.shape[3] or 0 in patch.shape:
        raise InputError(f"not a DiT checkpoint: x_embedder.proj.weight is {list(patch.shape)}; expected [D, C, P, P]")
    for name, tensor in (("final_layer.linear", head), ("y_embedder.embedding_table", table), ("blocks.0.mlp.fc1", mlp),
                         ("t_embedder.mlp.0", frequencies)):  # fmt: skip
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise InputError(f"not a DiT checkpoint: {name}.weight is {list(tensor.shape)}; expected a matrix")
    hidden, channels, patch_size, _ = patch.shape
    tokens = position.shape[-2] if position.ndim > 1 else 0
    if math.isqrt(tokens) ** 2 != tokens or not tokens:
        raise InputError(f"not a DiT checkpoint: pos_embed is {list(position.shape)}; expected [1, T, D] of a square picture")
    if head.shape[0] % patch_size**2:
        raise InputError(
            f"not a DiT checkpoint: final_layer.linear.weight has {head.shape[0]} rows, not a multiple of {patch_size}² pixels"
        )
    if num_heads is None:
        num_heads = KNOWN_HEADS.get(hidden)
    if num_heads is None:
        raise InputError(
            f"a width of {hidden} belongs to none of the published DiTs ({', '.join(map(str, KNOWN_HEADS))}), and the number "
            "of attention heads cannot be read off the tensors; give num_heads=N"
        )
    num_classes = classes_of(table.shape[0], num_classes, args or {})
    return DiTConfig(
        input_size=math.isqrt(tokens) * patch_size,
        in_channels=channels,
        out_channels=head.shape[0] // patch_size**2,
        patch_size=patch_size,
        hidden_size=hidden,
        depth=block_count(tensors),
        num_heads=num_heads,
        num_classes=num_classes,
        has_null_label=table.shape[0] > num_classes,
        mlp_ratio=mlp.shape[0] / hidden,
        frequency_size=frequencies.shape[1],
    )


def classes_of(rows: int, given: int | None, args: Mapping[str, Any]) -> int:
    """The number of classes of a label table; the caller's value overrides the training script's.

    Args:
        rows: number of rows of the table.
        given: number of classes that the caller gave.
        args: settings of the training script: its number of classes, or a label dropout of 0, so that no row is "no class".

    Raises:
        InputError: the number is neither `rows` nor `rows` - 1.
    """
    in_args = args.get("num_classes")
    if in_args is None and any(args.get(name) == 0 for name in _LABEL_DROPOUT):
        in_args = rows
    where = "num_classes" if given is not None else "num_classes of the checkpoint's args"
    wanted = given if given is not None else in_args
    if wanted is None:
        return max(rows - 1, 1)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or rows - wanted not in (0, 1) or wanted < 1:
        raise InputError(
            f"the label table has {rows} rows; expected num_classes or one more, but {where} is {wanted!r}; give "
            f'num_classes={rows} if every row is a class, num_classes={rows - 1} if the last is "no class"'
        )
    return wanted


def block_count(tensors: Tensors) -> int:
    """L; an InputError unless the blocks' tensors are numbered 0 to L - 1."""
    found = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    if not found or max(found) != len(found) - 1:
        raise InputError(f"not a DiT checkpoint: {len(found)} blocks, numbered up to {max(found, default=0)}; some are missing")
    return len(found)


def split_checkpoint(tensors: Tensors, config: DiTConfig) -> tuple[Tensors, list[Tensors]]:
    """DiT's tensors under pyard's names: those of the `Trunk`, and those of each head (`final_layer`, `final_layer2` …)."""
    names = trunk_names(config)
    trunk = {ours: tensors[theirs] for theirs, ours in names.items() if theirs in tensors}
    heads: list[Tensors] = []
    while (prefix := head_prefix(len(heads))) + ".linear.weight" in tensors:
        part = {ours: tensors[theirs] for theirs, ours in head_names(prefix).items() if theirs in tensors}
        heads.append(part)
    missing = [name for name in names if name not in tensors]
    known = {*names, *(name for index in range(len(heads)) for name in head_names(head_prefix(index)))}
    unknown = [name for name in tensors if name not in known]
    if missing or unknown:
        raise InputError(
            f"not a DiT checkpoint: {len(missing)} tensors are missing ({', '.join(missing[:3])}), {len(unknown)} are "
            f"unknown ({', '.join(unknown[:3])})"
        )
    quantised = [name for name in known if name in tensors and not tensors[name].is_floating_point()]
    if quantised:
        raise InputError(
            f"{quantised[0]} holds {tensors[quantised[0]].dtype}: quantised weights are not read; give the original ones"
        )
    trunk["patch_embed.weight"] = trunk["patch_embed.weight"].flatten(1)  # [D, C, P, P] -> [D, C*P*P]
    trunk["pos_embed"] = trunk["pos_embed"].flatten(0, -2)  # [1, T, D] -> [T, D]
    return trunk, heads


def load_tensors(module: nn.Module, tensors: Tensors, path: object, *, assign: bool = False) -> None:
    """`load_state_dict`, with a one-line error about what does not fit.

    Raises:
        InputError: the tensors' names or shapes differ from the module's.
    """
    try:
        module.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()] or [str(error)]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise InputError(f"{path}: its tensors do not match each other: {lines[0]}{more}") from None


def join_checkpoint(trunk: Tensors, heads: list[Tensors], config: DiTConfig) -> Tensors:
    """The reverse of `split_checkpoint`."""
    tensors = {theirs: trunk[ours] for theirs, ours in trunk_names(config).items()}
    patch = tensors["x_embedder.proj.weight"]
    tensors["x_embedder.proj.weight"] = patch.unflatten(1, (config.in_channels, config.patch_size, config.patch_size))
    tensors["pos_embed"] = tensors["pos_embed"][None]
    for index, head in enumerate(heads):
        tensors |= {theirs: head[ours] for theirs, ours in head_names(head_prefix(index)).items()}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def write_checkpoint(path: Path, tensors: Tensors, **extra: Any) -> None:
    """Write tensors as `.safetensors` or `.pt`; a `.pt` with `extra` is {"model", "ema", **extra}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix not in (".pt", ".safetensors"):
        raise InputError(f"{path}: expected a name that ends in .pt or .safetensors")
    with new_file(path) as partial:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, partial)
        else:
            torch.save({"model": tensors, "ema": tensors, **extra} if extra else tensors, partial)


def trunk_names(config: DiTConfig) -> dict[str, str]:
    """DiT's names to pyard's, for every tensor below the head."""
    layers = dict(_TRUNK)
    for i in range(config.depth):
        layers |= {f"blocks.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in _BLOCK.items()}
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in layers.items() for kind in ("weight", "bias")}
    del names["y_embedder.embedding_table.bias"]
    return names | {"pos_embed": "pos_embed"}


def head_names(prefix: str) -> dict[str, str]:
    """DiT's names to pyard's, for one head."""
    return {f"{prefix}.{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in _HEAD.items() for kind in ("weight", "bias")}


def head_prefix(index: int) -> str:
    """`final_layer`, `final_layer2`, `final_layer3` …: the authors' names of the heads of steps 1, 2, 3 …"""
    return f"final_layer{index + 1}" if index else "final_layer"


def with_zero_variance(head: Tensors, config: DiTConfig) -> Tensors:
    """A head of C output channels, extended by C that are always zero where DiT predicts a variance."""
    wider = dict(head)
    for name in ("linear.weight", "linear.bias"):
        rows = head[name].unflatten(0, (config.patch_size**2, -1))
        wider[name] = torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)
    return wider
