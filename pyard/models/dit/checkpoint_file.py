"""Reads `.pt` and `.safetensors` files of training scripts: weights, under any known key or prefix, and settings."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pyard.errors import InputError
from pyard.storage.files import stand_in
from pyard.storage.pickles import ForeignObjectError, read_pickle
from pyard.storage.reading import DAMAGE, parse_json, read_object, regular_file
from pyard.storage.tensor_files import read_with_metadata, require_finite

Tensors = dict[str, torch.Tensor]
Weights = Literal["ema", "model"]

# The tensor that every network of DiT's naming has: what stands in front of it stands in front of all of them.
_ANCHOR = "x_embedder.proj.weight"
# Modules that wrap others: DDP and torch.optim's averages, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(_WRAPPERS)})\.")
_ANCHORS = re.compile(r"(?:(?<=\.)|^)" + _ANCHOR.replace(".", rf"\.(?:(?:{'|'.join(_WRAPPERS)})\.)*") + "$")
_AVERAGED = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)
# Where training scripts keep their settings in a checkpoint.
_SETTINGS = ("args", "config", "hyper_parameters", "cfg")
_DEPTH = 3
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"7z\xbc\xaf": "7-Zip"}

_HOW_TO_CONVERT = """{path} holds more than tensors ({reason}), and pyard only reads pickles with weights_only=True, because \
anything else would run whatever code they name. If you trust the file's source, convert it to safetensors once: \
python -c "import json, torch; from safetensors.torch import save_file; c = torch.load('{path}', map_location='cpu', \
weights_only=False); a = c.get('args') or {{}}; a = a if isinstance(a, dict) else vars(a); \
a = {{k: v for k, v in a.items() if isinstance(v, (str, int, float))}}; w = c.get('ema', c.get('model', \
c.get('state_dict', c))); save_file({{k: v.contiguous().clone() \
for k, v in w.items() if isinstance(v, torch.Tensor)}}, '{target}', \
{{'args': json.dumps(a)}})" """


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file.

    Args:
        tensors: DiT's names to tensors, on the CPU, floating-point ones in float32.
        args: settings of the training script by name, if the file or an `args.json` beside it has them.
    """

    tensors: Tensors
    args: dict[str, Any] = field(default_factory=dict)


class _Found(NamedTuple):
    """One set of weights in a file: its place, and its tensors without their common prefix."""

    label: str  # such as "ema" or "state_dict.model."
    tensors: dict[str, Any]

    @property
    def weights(self) -> Weights:
        return "ema" if _AVERAGED.search(self.label) else "model"


def read_checkpoint(path: Path, *, weights: Weights | None = None) -> Checkpoint:
    """Read a PyTorch or safetensors file; the name's ending does not matter.

    The file may contain plain tensors, or a training checkpoint with weights under a key ("ema", "model", "state_dict" …).
    Tensor names may have a prefix ("ema_model.", "model.", "net." …) or parts added by wrappers (DDP, torch.compile, FSDP,
    activation checkpointing).

    Args:
        path: the file.
        weights: which weights of a file with several: `ema` or `model`; None: the averaged ones if there are any.

    Raises:
        InputError: the file does not exist, is damaged, is no PyTorch or safetensors file, needs more than
            weights_only=True, or lacks these weights.
    """
    if weights not in (None, "ema", "model"):
        raise InputError(f"weights is {weights!r}; expected 'ema' or 'model'")
    if not path.exists():
        raise InputError(f"{path}: no such file; expected a .pt or .safetensors checkpoint")
    content, args = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    found = list(_weights_in(content, "", _DEPTH))
    if not found:
        return Checkpoint(_clean(content, path), _settings_of(content, args, path))
    kinds = sorted({one.weights for one in found})
    if weights is not None and weights not in kinds:
        raise InputError(f"{path} has the weights {_listed(found)}; there is no {weights!r} among them")
    if weights is None and kinds == ["model"] and _has_unnamed_average(content, found[0]):
        raise InputError(
            f"{path} has averaged weights whose names do not say what they are of; give weights='model' to read those that "
            "were not averaged, or save the average under the network's names"
        )
    chosen = [one for one in found if one.weights == (weights or kinds[0])]  # "ema" before "model"
    if len(chosen) > 1:
        raise InputError(
            f"{path} has several networks ({_listed(chosen)}), and it is unclear which is the teacher; save only "
            "the tensors of that one"
        )
    return Checkpoint(_clean(chosen[0].tensors, path), _settings_of(content, args, path))


def _weights_in(content: Mapping[Any, Any], label: str, depth: int) -> Iterator[_Found]:
    names = [name for name in content if isinstance(name, str)]
    prefixes = [name[: match.start()] for name in names if (match := _ANCHORS.search(name)) is not None]
    for prefix in prefixes:
        yield _Found(label + prefix, {name[len(prefix) :]: content[name] for name in names if name.startswith(prefix)})
    for name in names:
        if depth and isinstance(content[name], Mapping):
            yield from _weights_in(content[name], f"{label}{name}.", depth - 1)


def _has_unnamed_average(content: Mapping[Any, Any], found: _Found) -> bool:
    """Whether the file has averaged tensors without usable names (a list, or names without dots), as many as the model."""
    count = 0
    waiting: list[tuple[Any, bool, int]] = [(content, False, _DEPTH)]
    while waiting:
        value, is_averaged, depth = waiting.pop()
        pairs = value.items() if isinstance(value, Mapping) else (("", item) for item in value)
        for name, inner in pairs:
            averaged = is_averaged or _AVERAGED.search(str(name)) is not None
            if isinstance(inner, Mapping | list | tuple) and depth:
                waiting.append((inner, averaged, depth - 1))
            elif averaged and isinstance(inner, torch.Tensor) and inner.ndim:
                count += 1
    return count > len(found.tensors) // 2


def _listed(found: list[_Found]) -> str:
    return ", ".join(one.label.strip(".") or "without a name" for one in found)


def _clean(content: Mapping[Any, Any], path: Path) -> Tensors:
    tensors = {_WRAPPED.sub("", str(key)): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    require_finite(tensors, path)
    # Copies are aligned; in the file's own buffer they are not, and BLAS rounds by alignment.
    return {key: value.to(torch.float32, copy=True) if value.is_floating_point() else value for key, value in tensors.items()}


def _settings_of(content: Mapping[Any, Any], args: dict[str, Any], path: Path) -> dict[str, Any]:
    for name in _SETTINGS:
        value = content.get(name)
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(value, Mapping):
            return {str(key): entry for key, entry in value.items()}
    if args:
        return args
    # REPA's and REPA-E's scripts write it into the run's folder, whose checkpoints are in a folder below.
    folders = [path.parent, path.parent.parent] if path.parent.name == "checkpoints" else [path.parent]
    for folder in folders:
        if (folder / "args.json").exists():  # a pipe of that name is refused, not passed over
            return read_object(folder / "args.json", "the settings of a training script")
    return {}


def _is_safetensors(path: Path) -> bool:
    """Whether it is a safetensors file, by its first bytes (length of the JSON header, then the header) or by its name."""
    with regular_file(path) as file:
        start = file.read(512)
    if len(start) > 8 and start[8:9] == b"{" and 0 < int.from_bytes(start[:8], "little") < path.stat().st_size:
        return True
    return path.suffix == ".safetensors" and _what_else(path, start) is None


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    content, metadata = read_with_metadata(path)
    try:
        args = parse_json(metadata.get("args", "{}"), path)
    except InputError:
        args = {}
    return dict(content), args if isinstance(args, dict) else {}


def _read_pickle(path: Path) -> tuple[Mapping[Any, Any], dict[str, Any]]:
    with regular_file(path) as file:
        start = file.read(512)
    what = _what_else(path, start)
    if what is not None:
        raise InputError(f"{path} is not a PyTorch checkpoint: {what}")
    try:
        content = read_pickle(path)
    except ForeignObjectError as error:
        text = _HOW_TO_CONVERT.format(
            path=path, reason=f"an object of type {error.kind}", target=path.with_suffix(".safetensors")
        )
        raise InputError(text.strip()) from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors")
    return content, {}


def _what_else(path: Path, start: bytes) -> str | None:
    """What kind of file this is, if it is neither a PyTorch checkpoint nor a safetensors file; None: it may be one of them."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    instead = stand_in(path)
    if instead is not None:
        return instead
    packed = next((how for magic, how in _PACKED.items() if start.startswith(magic)), None)
    if packed is not None:
        return f"it is compressed by {packed}; unpack it first"
    if text.startswith((b"{", b"[")):
        return "it is a JSON file; for a model in several files, give one file with all tensors, or the folder"
    if path.suffix == ".safetensors":
        return "it is a pickle; name it .pt" if start.startswith((b"\x80", b"PK")) else None
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except DAMAGE:
            return f"it is a zip archive without its end, cut off at {path.stat().st_size} bytes; copy it again"
        if any(name.endswith("constants.pkl") for name in names):
            return "it is a TorchScript program, which pyard does not run; save its state_dict()"
        if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
            return (
                f"it is a zip archive of something else ({', '.join(names[:3]) or 'empty'}); unpack it and give the checkpoint"
            )
        return None
    if not start.startswith(b"\x80") and b"ustar" not in start[:300]:
        return f"it begins with {bytes(start[:8])!r}, which neither torch.save nor safetensors writes"
    return None
