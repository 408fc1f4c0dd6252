"""Opening ONNX files in onnxruntime: the choice of providers, and clear errors for files that do not open."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from pyard.errors import InputError
from pyard.storage.reading import require_regular

_MOST_THREADS = 1024  # onnxruntime starts them all, however long that takes

Provider = str | tuple[str, Mapping[str, Any]]


def choose_providers(providers: Sequence[Provider] | None) -> list[tuple[str, dict[str, Any]]]:
    """Execution providers by name, with their options; None chooses CUDA if it works, then the CPU.

    Raises:
        InputError: this onnxruntime does not have a provider.
    """
    available = onnxruntime.get_available_providers()
    if providers is None:
        cuda = "CUDAExecutionProvider" in available and _cuda_driver_works()
        return [(name, {}) for name in (["CUDAExecutionProvider"] if cuda else []) + ["CPUExecutionProvider"]]
    if isinstance(providers, Mapping):  # its options would be passed over
        raise InputError(
            f"providers: found a dictionary, {dict(providers)!r:.100}; expected a list of names, or (name, options)"
        )
    chosen: list[tuple[str, dict[str, Any]]] = []
    for item in [providers] if isinstance(providers, str) else providers:
        pair: Any = (item, {}) if isinstance(item, str) else item
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], Mapping)):
            raise InputError(f"providers: found {item!r}; expected a name, or (name, dictionary of options)")
        chosen.append((str(pair[0]), dict(pair[1])))
    unknown = [name for name, _ in chosen if name not in available]
    if unknown or not chosen:
        found = ", ".join(unknown) if unknown else "an empty list"
        raise InputError(f"providers: found {found}; this onnxruntime has {', '.join(available)}")
    return chosen


@functools.cache
def _cuda_driver_works() -> bool:
    # onnxruntime-gpu lists CUDA on every machine and prints errors where there is none, so the driver is asked first.
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def open_session(
    path: Path, providers: list[tuple[str, dict[str, Any]]], threads: int | None, cuda_graphs: bool
) -> onnxruntime.InferenceSession:
    """Open a session of an ONNX file.

    Raises:
        InputError: the file does not exist, is damaged or is too new for this onnxruntime; or its weights are missing.
    """
    if not path.exists() or path.is_dir():
        raise InputError(f"{path}: no such file; expected a student.onnx written by python -m pyard.export")
    require_regular(path)
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise InputError(
            f"threads is {threads}; expected 1 to {_MOST_THREADS}, or None for OMP_NUM_THREADS or onnxruntime's choice"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own graph optimisations
    if threads := threads or _threads_of_environment():
        options.intra_op_num_threads = threads
    graphs = {"CUDAExecutionProvider": {"enable_cuda_graph": "1"}} if cuda_graphs else {}
    chosen = [(name, {**own, **graphs.get(name, {})}) for name, own in providers]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=chosen)
    # onnxruntime's own exceptions share no base class but Exception.
    except Exception as error:
        size = path.stat().st_size
        reason = str(error).strip().splitlines()[0]
        data = _external_data(path)
        missing = [file for file in data if not file.exists()]
        if data and (missing or "xternal" in reason or any(file.name in reason for file in data)):
            state = f"{missing[0]} is missing" if missing else f"{data[0]} ({data[0].stat().st_size} bytes) is cut off"
            raise InputError(
                f"{state}: {path.name} keeps its weights there. Copy both files again. onnxruntime says: {reason}"
            ) from None
        if any(word in reason.replace(str(path), "") for word in ("IR version", "opset", "NOT_IMPLEMENTED")):
            raise InputError(
                f"{path} needs a newer onnxruntime than {onnxruntime.__version__}: upgrade it, or export the student again "
                f"with --opset 20, which 1.21 reads. onnxruntime says: {reason}"
            ) from None
        raise InputError(
            f"{path} ({size} bytes) cannot be opened as an ONNX model: it is cut off, or not an ONNX file. Export or copy "
            f"it again. onnxruntime says: {reason}"
        ) from None


def _threads_of_environment() -> int | None:
    # As PyTorch: one variable limits all that runs on a shared machine.
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


def _external_data(path: Path) -> list[Path]:
    """The files that a model names as external data for its weights, even if the model was renamed since."""
    # In a protobuf message: key (field 1) "location", then value (field 2), whose length is one byte for short names.
    found = re.findall(rb"\x0a\x08location\x12([\x01-\x7f])([^\x00]{1,127})", path.read_bytes())
    names = {name[: length[0]] for length, name in found}
    return sorted(path.parent / name.decode(errors="replace") for name in names)
