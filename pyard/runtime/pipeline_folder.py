"""The folder of an exported text-to-image student: its configuration, and the tensors that its graphs take; needs only numpy.

C channels · h, w sides of a sample
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyard.errors import InputError
from pyard.storage.reading import read_object

CONFIG_NAME = "config.json"
CLASS_NAME = "OnnxPipeline"
FORMAT_VERSION = 1

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class PictureSize:
    """One size of pictures that a pipeline draws, and the graphs that draw it, by their paths in the folder.

    Args:
        height, width: size in pixels.
        sample_shape: [C, h, w] of the noise.
        sampler: all steps in one call; None: not exported.
        step: one step per call; None: not exported.
        decoder: decodes samples to pictures; None: samples are pictures, -1 to 1.
    """

    height: int
    width: int
    sample_shape: tuple[int, ...]
    sampler: str | None
    step: str | None
    decoder: str | None


def check_tensors(given: Arrays, expected: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """Check a caller's tensors and convert them to the dtypes that the graphs take.

    Args:
        given: the caller's tensors by name.
        expected: name, dtype and shape of each tensor, with None for a size that is not fixed.

    Raises:
        InputError: a tensor is missing, unknown, or has another shape.
    """
    shapes = ", ".join(f"{item['name']} {item['dtype']} {item['shape']}" for item in expected)
    unknown = set(given) - {item["name"] for item in expected}
    if unknown:
        raise InputError(f"condition: found {', '.join(sorted(unknown))}; expected {shapes}")
    arrays, sizes = {}, (len(given["tokens"]), given["tokens"].shape[1])
    for item in expected:
        array, name = given.get(item["name"]), item["name"]
        if not isinstance(array, np.ndarray):
            raise InputError(f"condition: {name} is missing; expected {shapes}")
        # Free sizes are the batch and, of tokens and mask, the number of tokens.
        wanted = [sizes[min(dim, 1)] if size is None else size for dim, size in enumerate(item["shape"])]
        kinds = {"float32": "f", "bool": "biu"}.get(item["dtype"], "iu")
        if list(array.shape) != wanted or array.dtype.kind not in kinds:
            raise InputError(f"condition[{name!r}]: found {array.dtype} {list(array.shape)}; expected {item['dtype']} {wanted}")
        arrays[name] = np.ascontiguousarray(array, dtype=item["dtype"])
    return arrays


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise InputError(
            f"{folder}: there is no {CONFIG_NAME}; expected a folder written by python -m pyard.export --onnx DIR/"
        )
    try:
        config = read_object(file, "the configuration of an exported pipeline")
    except InputError as error:
        raise InputError(f"{file}: cut off or damaged; copy the folder again ({error})") from None
    kind, version = config.get("_class_name"), config.get("format_version")
    if kind != CLASS_NAME:
        raise InputError(f"{file} describes a {kind}; expected a folder written by python -m pyard.export --onnx DIR/")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{file} has format version {version}, written by pyard {config.get('pyard_version')}; this pyard reads version "
            f"{FORMAT_VERSION}: export the student again"
        )
    try:
        for name, about in config["files"].items():
            if Path(name).is_absolute() or not {"..", ""}.isdisjoint(name.replace("\\", "/").split("/")):
                raise InputError(f"{file}: names {name!r:.80}; expected files in its own folder")
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != about["bytes"]:
                state = "missing" if size is None else f"{size} bytes"
                raise InputError(f"{folder / name}: {state}; expected {about['bytes']} bytes. Copy the folder again")
        missing = {"sizes", "num_steps", "constants", "text", "conditions", "precision"} - set(config)
    except (KeyError, TypeError, AttributeError):
        missing = {"files"}
    if missing:
        raise InputError(f"{file}: {', '.join(sorted(missing))} is missing; export the student again")
    return dict(config)
