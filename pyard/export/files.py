"""What an export leaves on disk: the model, perhaps its external data, and the configuration; whole and checked, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from pyard.errors import InputError
from pyard.models.student import Student
from pyard.runtime.onnx_student import FORMAT_VERSION, METADATA_KEY
from pyard.version import __version__

# Version of the file format that newer operators need; 10 is enough for opset 22 and read by every onnxruntime since 1.18.
IR_VERSION = {20: 10, 21: 10, 22: 10, 23: 11}
# A protobuf message holds less than 2 GiB; the rest of the graph needs some of it.
LARGEST_SINGLE_FILE = 2**31 - 2**26


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all constants of a model."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def save_model(model: ir.Model, path: Path, *, external_data: bool) -> None:
    """Write a model, its weights in `<name>.data` beside it if `external_data`."""
    ir.save(model, path, external_data=f"{path.name}.data" if external_data else None)


def write_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Put pyard's entry into a model file; external data are not touched."""
    model = onnx.load(path, load_external_data=False)
    # A file's reader infers the shapes in between; onnxruntime's quantiser transposes weights, which would contradict them.
    del model.graph.value_info[:]
    model.producer_name, model.producer_version = "pyard", __version__
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(metadata)})
    path.write_bytes(model.SerializeToString())


def kept_in_float32(path: Path) -> list[str]:
    """The layers of a student's file in half precision that stay in float32."""
    properties = {item.key: item.value for item in onnx.load(path, load_external_data=False).metadata_props}
    layers: list[str] = json.loads(properties[METADATA_KEY]).get("kept_in_float32", [])
    return layers


def describe(student: Student, **facts: Any) -> dict[str, Any]:
    """pyard's metadata of a student: grid, classes or number of conditions, sizes, hashes, version, and further `facts`."""
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
    """Where the configuration of an exported file lies: `student.onnx.json` beside `student.onnx`."""
    return path.with_name(f"{path.name}.json")


def config_text(student: Student) -> str:
    """What `Student.save_pretrained` writes into `config.json`."""
    return json.dumps({"_class_name": "Student", **student.config.to_json()}, indent=2) + "\n"


def check_target(path: Path) -> None:
    """Refuse a path that is a folder, and one beside which another program's file would be overwritten."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected the name of a file, such as {path / 'student.onnx'}")
    config = config_path(path)
    if not config.exists():
        return
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError):
        found = None
    if found != "Student":
        raise InputError(f"{config} belongs to something else and would be overwritten; export to another name")


@contextmanager
def new_files(path: Path) -> Iterator[Path]:
    """A file of the same name in a temporary folder; if the block ends well, all files there move beside `path`.

    The model itself comes last. External data that an earlier export left for a model of this name are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}.{os.getpid()}.new"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        building = folder / path.name
        yield building
        others = sorted(file for file in folder.iterdir() if file != building)
        for file in (*others, building):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            file.replace(path.parent / file.name)
        data = path.with_name(f"{path.name}.data")
        if data.name not in [file.name for file in others]:
            data.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
