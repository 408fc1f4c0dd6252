"""A model on disk: `config.json` and `model.safetensors` in a folder that appears complete or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyard.conditions import table
from pyard.errors import InputError
from pyard.models import codec
from pyard.storage.folders import new_folder

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def save_folder(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    *,
    kind: str,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a model folder; `kind` is the class that reads it, kept as diffusers' `_class_name`; `beside` adds files.

    In a folder that is there, the files of a model are replaced and all others stay; see `new_folder`.
    """
    # Here, since a machine that only computes with models may have no safetensors.
    from safetensors.torch import save_file

    with new_folder(path, owned=(CONFIG_NAME, WEIGHTS_NAME, codec.FOLDER, table.FOLDER)) as folder:
        (folder / CONFIG_NAME).write_text(json.dumps({"_class_name": kind, **config}, indent=2) + "\n", encoding="utf-8")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)
        if beside is not None:
            beside(folder)


def load_config(path: Path, *, kind: str | tuple[str, ...]) -> dict[str, Any]:
    """The configuration of a model folder of this kind."""
    file = path / CONFIG_NAME
    if not file.is_file():
        raise InputError(f"{path}: expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}; there is no {CONFIG_NAME}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    found = config.pop("_class_name", None)
    kinds = (kind,) if isinstance(kind, str) else kind
    if found not in kinds:
        raise InputError(f"{path} holds a {found}; expected a {kinds[0]}")
    return config


def load_folder(path: Path, *, kind: str | tuple[str, ...]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a model folder: its configuration and its tensors, on the CPU.

    Raises:
        InputError: no such folder, another kind of model, or a damaged file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = load_config(path, kind=kind)
    try:
        # Copies are aligned; in the file's own buffer they are not, and BLAS rounds by alignment.
        return config, {name: tensor.clone() for name, tensor in load_file(path / WEIGHTS_NAME).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path / WEIGHTS_NAME} cannot be read ({error}); it is missing, cut off or not safetensors") from None
