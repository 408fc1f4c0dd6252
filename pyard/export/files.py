"""The files of an export: the model, its external data and configuration. They appear complete and checked, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from pyard.errors import InputError
from pyard.models.student import Student
from pyard.runtime.onnx_student import FORMAT_VERSION, METADATA_KEY
from pyard.storage.files import file_sha256, sync_directory, write_text
from pyard.storage.folders import building_folder
from pyard.storage.reading import read_object
from pyard.version import __version__

# Version of the file format that newer operators need; 10 suffices for opset 22, and onnxruntime reads it since 1.18.
IR_VERSION = {20: 10, 21: 10, 22: 10, 23: 11}
# A protobuf message holds less than 2 GiB; the rest of the graph needs some of it.
LARGEST_SINGLE_FILE = 2**31 - 2**26


def weight_bytes(model: ir.Model) -> int:
    """The size of all constants of a model, in bytes."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def save_model(model: ir.Model, path: Path, *, external_data: bool) -> None:
    """Write a model, its weights in `<name>.data` beside it (`new_files` puts a hash into that name) if `external_data`."""
    ir.save(model, path, external_data=f"{path.name}.data" if external_data else None)


def write_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Write pyard's metadata entry into a model file; external data are not changed."""
    model = onnx.load(path, load_external_data=False)
    # Intermediate shapes are left out, because onnxruntime's quantiser transposes weights, which would contradict them.
    del model.graph.value_info[:]
    model.producer_name, model.producer_version = "pyard", __version__
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(metadata)})
    path.write_bytes(model.SerializeToString())


def kept_in_float32(path: Path) -> list[str]:
    """The layers that stay in float32 in a student's half-precision file."""
    properties = {item.key: item.value for item in onnx.load(path, load_external_data=False).metadata_props}
    layers: list[str] = json.loads(properties[METADATA_KEY]).get("kept_in_float32", [])
    return layers


def describe(student: Student, **facts: Any) -> dict[str, Any]:
    """pyard's metadata for a student: grid, classes or number of conditions, sizes, hashes, version, and further `facts`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(student.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return {
        "format_version": FORMAT_VERSION,
        "pyard_version": __version__,
        "num_steps": student.num_steps,
        "history_layers": student.config.history_layers,
        "num_classes": student.num_classes,
        "num_conditions": None if student.conditions is None else student.conditions.count,
        "sample_shape": list(student.sample_shape),
        "config": student.config.to_json(),
        "weights_sha256": digest.hexdigest(),
        **facts,
    }


def config_path(path: Path) -> Path:
    """The path of an exported file's configuration: `student.onnx.json` beside `student.onnx`."""
    return path.with_name(f"{path.name}.json")


def config_text(student: Student) -> str:
    """The text that `Student.save_pretrained` writes to `config.json`."""
    return json.dumps({"_class_name": "Student", **student.config.to_json()}, indent=2) + "\n"


def check_target(path: Path) -> None:
    """Refuse a path that is a folder or a link, or if another program's file at the path or beside it would be overwritten."""
    for place in (path, config_path(path)):
        if place.is_symlink():
            raise InputError(f"{place} is a link; expected a file or a new path. Remove it, or choose another name")
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected the name of a file, such as {path / 'student.onnx'}")
    if path.is_file() and path.stat().st_size and not _is_model(path):
        raise InputError(f"{path} is not an ONNX model and would be overwritten; export to another name")
    config = config_path(path)
    if not config.exists():
        return
    try:
        found = read_object(config).get("_class_name")
    except InputError:
        found = None
    if found != "Student":
        raise InputError(f"{config} belongs to something else and would be overwritten; export to another name")


def _is_model(path: Path) -> bool:
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, ValueError, DecodeError):
        return False
    return model.ir_version > 0 and bool(model.graph.node)


@contextmanager
def new_files(path: Path, size: int | None = None) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder; if the block succeeds, all files there are moved beside `path`.

    External data are named `<name>.<hash>.data`, and the model itself is moved last, so after a kill there is either the former
    model with the former data, or the new one with its own. Finally the former model's data are removed.

    Args:
        path: the file.
        size: number of bytes that will be written, if known; for the error message if the disk is full.
    """
    with building_folder(path, size) as folder:
        building = folder / path.name
        yield building
        named = _name_data(building)
        former = _data_to_remove(path) - named
        others = [file for file in folder.iterdir() if file.is_file() and file != building]
        for file in (*others, building):
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        notes = _notes(path)
        if former | named:  # so that the next export removes what is not its own, should this one be killed before it ends
            write_text(notes, json.dumps(sorted(former | named)))
        for file in others:
            file.replace(path.parent / file.name)
        sync_directory(path.parent)
        building.replace(path)
        sync_directory(path.parent)
        for name in former:
            (path.parent / name).unlink(missing_ok=True)
        if former | named:
            notes.unlink(missing_ok=True)
            sync_directory(path.parent)


def data_files(path: Path) -> list[Path]:
    """The files beside an exported file that contain its weights."""
    return sorted(path.parent / name for name in external_data(path))


def external_data(path: Path) -> set[str]:
    """The files that a model names for its weights, if an export could have given them their names.

    Such names are `<name>.data` and `<name>.<hash>.data`. Empty if the file is not a model.
    """
    ours = _data_name(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, ValueError, DecodeError):
        return set()
    return {entry.value for entry in _locations(model) if ours.fullmatch(entry.value)}


def _notes(path: Path) -> Path:
    return path.with_name(f".{path.name}.former")


def _data_to_remove(path: Path) -> set[str]:
    """The data of the existing model, and those left by an export that was killed."""
    named = external_data(path) if path.exists() else set()
    try:
        left = json.loads(_notes(path).read_text(encoding="utf-8"))
        return named | {name for name in left if _data_name(path).fullmatch(name)}
    except (OSError, ValueError, TypeError):
        return named


def _data_name(path: Path) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(path.name)}(\.[0-9a-f]{{16}})?\.data")


def _locations(model: onnx.ModelProto) -> list[onnx.StringStringEntryProto]:
    tensors = onnx.external_data_helper._get_all_tensors(model)
    return [entry for tensor in tensors for entry in tensor.external_data if entry.key == "location"]


def _name_data(path: Path) -> set[str]:
    """Name a model's data files by their contents, write these names into the model, and return them."""
    written = external_data(path)
    if not written:
        return written
    names = {name: f"{path.name}.{file_sha256(path.with_name(name))[:16]}.data" for name in written}
    model = onnx.load(path, load_external_data=False)
    for entry in _locations(model):
        entry.value = names[entry.value]
    for name, new in names.items():
        path.with_name(name).rename(path.with_name(new))
    path.write_bytes(model.SerializeToString())
    return set(names.values())
