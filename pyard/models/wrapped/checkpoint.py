"""Reading a diffusers transformer: from a pipeline's folder, or a fine-tuned replacement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pyard.errors import InputError
from pyard.models.pretrained import read_pretrained, usable_variant
from pyard.models.wrapped.single_file import read_single_file
from pyard.storage.reading import read_object

_NAME = "diffusion_pytorch_model"
# Published folders name the class that diffusers had before it split it: PixArt's do, and so do DiT's.
_CLASS_SINCE = {("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel"}


def read_transformer(
    kind: type[Any],
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    replacement: Path | None = None,
) -> Any:
    """Read a transformer in the dtype in which it will compute.

    Args:
        kind: name of its diffusers class.
        folder: folder of the pipeline's own transformer, with `config.json`; its weights may be sharded.
        dtype: dtype of the weights.
        variant: variant of the weights, such as `fp16`; None, or one that the folder lacks: the files without a variant, or
            else the only variant there is.
        replacement: a fine-tuned transformer to read instead: a folder, or a single `.safetensors` with diffusers' tensor names
            or, if diffusers can convert them, the original ones.

    Raises:
        InputError: files are missing or damaged, or belong to another class or size.
    """
    if replacement is not None and not replacement.exists():
        raise InputError(f"transformer {replacement}: no such file or folder")
    if replacement is not None and replacement.is_file():
        return read_single_file(kind, replacement, folder, _config(folder), dtype)
    folder = folder if replacement is None else transformer_folder(replacement)
    config = _config(folder)
    found = config.get("_class_name")
    if kind.__name__ not in (found, _CLASS_SINCE.get((str(found), str(config.get("norm_type"))))):
        raise InputError(f"{folder} holds a {found!s:.60}; expected a {kind.__name__}")
    variant = usable_variant(folder, _NAME, variant)
    return read_pretrained(kind, folder, whole=True, torch_dtype=dtype, variant=variant).eval()


def transformer_folder(folder: Path) -> Path:
    """The folder itself, or if it is a pipeline, the folder of its transformer."""
    return folder / "transformer" if (folder / "model_index.json").is_file() else folder


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: expected the folder of a diffusers transformer; there is no config.json")
    return read_object(folder / "config.json", "the configuration of a diffusers transformer")
