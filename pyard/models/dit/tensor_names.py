"""Checkpoints with DiT's own tensor names: reading them safely, their sizes, and their names next to ours.

DiT, SiT and the ARD authors' students share these names, so tensors alone do not tell them apart.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyard.errors import InputError
from pyard.models.dit.network import DiTConfig
from pyard.storage.files import new_file

Tensors = dict[str, torch.Tensor]

# Heads of the published S, B, L and XL models by width; the tensors hold no trace of them.
KNOWN_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}

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

_HOW_TO_CONVERT = """{path} holds more than tensors ({reason}), and pyard reads pickles with weights_only=True alone, because \
anything else would run whatever code they name. If you trust where the file comes from, turn it into safetensors once: \
python -c "import torch; from safetensors.torch import save_file; c = torch.load('{path}', map_location='cpu', \
weights_only=False); c = c.get('ema', c.get('model', c)); save_file({{k: v.contiguous().clone() for k, v in c.items()}}, \
'{target}')" """


@dataclass(frozen=True)
class Checkpoint:
    """What a file held.

    Args:
        tensors: DiT's names to tensors, on the CPU in float32.
        model_name: what the training script called the model ("DiT-XL/2"), if the file says so.
    """

    tensors: Tensors
    model_name: str | None = None


def read_checkpoint(path: Path, *, weights: str = "ema") -> Checkpoint:
    """Read a `.pt` or `.safetensors` file: plain tensors, or a training checkpoint {"model", "ema", "opt", "args"}.

    Args:
        path: the file.
        weights: which weights of a training checkpoint: `ema` or `model`.

    Raises:
        InputError: no such file, a damaged one, one that needs more than weights_only=True, or one without these weights.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a .pt or .safetensors checkpoint")
    if path.suffix == ".safetensors":
        # Here, since a machine that only computes with models may have no safetensors.
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return Checkpoint(_clean(load_file(path)))
        except SafetensorError as error:
            raise InputError(f"{path} cannot be read ({error}); it is cut off or no safetensors file") from None
    try:
        # DiT's and SiT's training scripts store their arguments, a Namespace: a bag of attributes that runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"an object of type {found[1]}" if found else "objects of Python classes"
        text = _HOW_TO_CONVERT.format(path=path, reason=reason, target=path.with_suffix(".safetensors"))
        raise InputError(text.strip()) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path} cannot be read as a PyTorch checkpoint: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors")
    nested = [name for name in ("ema", "model") if isinstance(content.get(name), dict)]
    if nested and weights not in nested:
        raise InputError(f"{path} has the weights {', '.join(nested)}; there is no {weights!r}")
    name = getattr(content.get("args"), "model", None)
    return Checkpoint(_clean(content[weights] if nested else content), str(name) if name else None)


def _clean(content: dict[str, Any]) -> Tensors:
    # Wrappers of the training script (DDP, torch.compile) leave their names in front.
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in content.items()}
    # Copies are aligned; in the file's own buffer they are not, and BLAS rounds by alignment.
    return {key: value.to(torch.float32, copy=True) for key, value in tensors.items() if isinstance(value, torch.Tensor)}


def read_config(tensors: Tensors, *, num_heads: int | None = None, num_classes: int | None = None) -> DiTConfig:
    """The sizes of a network, read off its tensors.

    Args:
        tensors: with DiT's names.
        num_heads: H; none: that of the published model of this width.
        num_classes: none: the label table's rows less one, the row for "no class"; as many as rows: there is no such row.

    Raises:
        InputError: tensors that are not a DiT's, or an unknown width without num_heads.
    """
    try:
        patch = tensors["x_embedder.proj.weight"]  # [D, C, P, P]
        tokens = tensors["pos_embed"].shape[-2]
        head_rows = tensors["final_layer.linear.weight"].shape[0]
        rows = tensors["y_embedder.embedding_table.weight"].shape[0]
        mlp_size = tensors["blocks.0.mlp.fc1.weight"].shape[0]
        frequency_size = tensors["t_embedder.mlp.0.weight"].shape[1]
    except KeyError as error:
        found = ", ".join(list(tensors)[:4])
        raise InputError(
            f"no checkpoint of a DiT: there is no tensor {error}; found {len(tensors)} tensors: {found} …"
        ) from None
    hidden, channels, patch_size, _ = patch.shape
    if num_heads is None:
        num_heads = KNOWN_HEADS.get(hidden)
    if num_heads is None:
        raise InputError(
            f"a width of {hidden} belongs to none of the published DiTs ({', '.join(map(str, KNOWN_HEADS))}), and the number "
            "of attention heads cannot be read off the tensors; give num_heads"
        )
    if num_classes is None:
        num_classes = rows - 1
    if rows - num_classes not in (0, 1):
        raise InputError(f"the label table has {rows} rows; expected num_classes ({num_classes}) or one more")
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    return DiTConfig(
        input_size=math.isqrt(tokens) * patch_size,
        in_channels=channels,
        out_channels=head_rows // patch_size**2,
        patch_size=patch_size,
        hidden_size=hidden,
        depth=depth,
        num_heads=num_heads,
        num_classes=num_classes,
        has_null_label=rows > num_classes,
        mlp_ratio=mlp_size / hidden,
        frequency_size=frequency_size,
    )


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
            f"no checkpoint of a DiT: {len(missing)} tensors are missing ({', '.join(missing[:3])}), {len(unknown)} are "
            f"unknown ({', '.join(unknown[:3])})"
        )
    trunk["patch_embed.weight"] = trunk["patch_embed.weight"].flatten(1)  # [D, C, P, P] -> [D, C*P*P]
    trunk["pos_embed"] = trunk["pos_embed"].flatten(0, -2)  # [1, T, D] -> [T, D]
    return trunk, heads


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
    """Write tensors as `.safetensors`, or as `.pt`, there as {"model", "ema", **extra} if there is anything extra."""
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
    """DiT's name to ours, for every tensor below the head."""
    layers = dict(_TRUNK)
    for i in range(config.depth):
        layers |= {f"blocks.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in _BLOCK.items()}
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in layers.items() for kind in ("weight", "bias")}
    del names["y_embedder.embedding_table.bias"]
    return names | {"pos_embed": "pos_embed"}


def head_names(prefix: str) -> dict[str, str]:
    """DiT's name to ours, for one head."""
    return {f"{prefix}.{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in _HEAD.items() for kind in ("weight", "bias")}


def head_prefix(index: int) -> str:
    """`final_layer`, `final_layer2`, `final_layer3` …: the authors' names of the heads of steps 1, 2, 3 …"""
    return f"final_layer{index + 1}" if index else "final_layer"


def with_zero_variance(head: Tensors, config: DiTConfig) -> Tensors:
    """A head of C output channels with C more that are always zero, where DiT predicts a variance."""
    wider = dict(head)
    for name in ("linear.weight", "linear.bias"):
        rows = head[name].unflatten(0, (config.patch_size**2, -1))
        wider[name] = torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)
    return wider
