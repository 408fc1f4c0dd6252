"""A model on disk: `config.json` and `model.safetensors` in a folder that appears complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyard.conditions import table
from pyard.errors import InputError
from pyard.models import codec
from pyard.storage.folders import new_folder, require_folder_or_nothing
from pyard.storage.numbers import whole_number
from pyard.storage.reading import read_object
from pyard.storage.tensor_files import owned, read_safetensors, require_finite

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def save_folder(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    *,
    kind: str,
    beside: Callable[[Path], None] | None = None,
    also_owned: Sequence[str] = (),
    former_kinds: Sequence[str] = (),
) -> None:
    """Write a model folder; `kind` is the class that reads it, kept as diffusers' `_class_name`; `beside` adds files,
    and `also_owned` names those of them that a later save replaces or removes. `former_kinds` are earlier names of the class.

    In a folder that is there, the files of a model of this kind are replaced and all others stay; see `new_folder`.

    Raises:
        InputError: the folder holds another model, or weights that pyard did not write.
    """
    is_ours = require_replaceable(path, kind, *former_kinds)
    owned = (CONFIG_NAME, WEIGHTS_NAME, codec.FOLDER, table.FOLDER, *also_owned) if is_ours else ()
    # Here, since a machine that only computes with models may have no safetensors.
    from safetensors.torch import save_file

    with new_folder(path, owned=owned) as folder:
        (folder / CONFIG_NAME).write_text(json.dumps({"_class_name": kind, **config}, indent=2) + "\n", encoding="utf-8")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)
        if beside is not None:
            beside(folder)


def load_config(path: Path, *, kind: str | tuple[str, ...]) -> dict[str, Any]:
    """The configuration of a model folder of this kind."""
    file = path / CONFIG_NAME
    if not file.exists():
        raise InputError(f"{path}: expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}; there is no {CONFIG_NAME}")
    config = read_object(file, "the configuration of a model")
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
    config = load_config(path, kind=kind)
    tensors = read_safetensors(path / WEIGHTS_NAME)
    require_finite(tensors, path / WEIGHTS_NAME)
    return config, owned(tensors)


def class_name(folder: Path, index: str = CONFIG_NAME) -> str | None:
    """The `_class_name` in a folder's `config.json`, or other `index`; None: there is no such file, or it names none."""
    try:
        found = read_object(folder / index).get("_class_name")
    except InputError:
        return None
    return found if isinstance(found, str) else None


def require_replaceable(
    path: Path, *kinds: str, names: Sequence[str] = (CONFIG_NAME, WEIGHTS_NAME), index: str = CONFIG_NAME
) -> bool:
    """Whether a folder holds a model that another one of its kind may replace, rather than none.

    Args:
        path: the folder, which need not be there.
        kinds: of which its `index` must name one as `_class_name`.
        names: of files and folders that would be replaced or removed.
        index: the file that says what the folder holds.

    Raises:
        InputError: a file or a link, or a folder that has something of one of these names, but no model of this kind.
    """
    require_folder_or_nothing(path)
    found = class_name(path, index)
    if found in kinds:
        return True
    there = next((name for name in names if os.path.lexists(path / name)), None)
    if there is not None:
        whose = f"of a {found}" if found else f"without the {index} of a {kinds[0]}"
        raise InputError(f"{path} holds a {there} {whose}, which would be lost; choose another folder, or remove it")
    return False


def require_sizes(path: Path, depth: object, tensors: Mapping[str, Any], num_steps: int = 1) -> None:
    """Raises InputError if a configuration asks for more blocks or heads than there are tensors, before any is made.

    Args:
        path: the folder, for messages.
        depth: blocks that its configuration asks for.
        tensors: in its weights.
        num_steps: of a student, each with a head.
    """
    blocks = whole_number(f"{path}: the depth of config.json", depth, 0, max(len(tensors), 1))
    if blocks + num_steps > 2 * len(tensors) + 1:
        raise InputError(
            f"{path}: config.json asks for {blocks} blocks and {num_steps} steps; there are {len(tensors)} tensors"
        )
