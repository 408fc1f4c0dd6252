"""Loads the compiled operators."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyard.errors import InputError
from pyard.ops import derivatives, prebuilt

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = PACKAGE / ("libpyard_ops.dylib" if sys.platform == "darwin" else "libpyard_ops.so")
BUILD_RECORD = PACKAGE / "_build.json"


@dataclass(frozen=True)
class NativeLibrary:
    """The loaded library, as it describes itself."""

    path: Path
    built_with_torch: str
    compiler: str
    instruction_sets: tuple[str, ...]  # that it was compiled for
    active_instruction_set: str  # that this processor gets
    cuda_architectures: tuple[str, ...]  # empty: no CUDA kernels were compiled
    cuda_note: str  # `built`, or why there are none
    cuda_failed: bool  # the installation tried to build CUDA kernels and could not


def load() -> tuple[NativeLibrary | None, str]:
    """Loads the library; returns it and "", or None and the reason why it is missing.

    Warns if it cannot be loaded, unless it was left out on purpose. Everything works without it, only slower.

    Raises:
        InputError: If PYARD_PREBUILT names a library that does not fit.
    """
    named = os.environ.get("PYARD_PREBUILT")
    if named:
        return _load_prebuilt(Path(named).absolute()), ""
    record = json.loads(BUILD_RECORD.read_text(encoding="utf-8")) if BUILD_RECORD.exists() else {}
    if not LIBRARY.exists():
        reason = str(record.get("reason", f"{LIBRARY.name} was not built; install pyard with `pip install -e .`"))
        if "PYARD_NATIVE=0" not in reason:
            _warn(reason)
        return None, reason
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        reason = f"{LIBRARY.name} does not load with torch {torch.__version__}: {error}"
        _warn(reason)
        return None, reason
    try:
        derivatives.register()
    except RuntimeError as error:  # sources that were updated after the library was built
        reason = f"{LIBRARY.name} is older than pyard's sources, run `pip install -e .` again: {error}"
        _warn(reason)
        return None, reason
    note = str(record.get("cuda", "the build did not record why"))
    return _describe(LIBRARY, note, bool(record.get("cuda_failed", False))), ""


def _load_prebuilt(path: Path) -> NativeLibrary:
    if not path.is_file():
        raise InputError(f"PYARD_PREBUILT={path}: there is no such file; build it, or unset PYARD_PREBUILT")
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise InputError(
            f"PYARD_PREBUILT={path} does not load with torch {torch.__version__}: {str(error).splitlines()[0]}"
        ) from None
    if not hasattr(handle, "pyard_sources"):
        raise InputError(f"PYARD_PREBUILT={path} is not a library of this version of pyard: it does not name its sources")
    prebuilt.check_sources(path, _text(handle, "pyard_sources"), PACKAGE.parent / "csrc")
    torch.ops.load_library(path)
    try:
        derivatives.register()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"PYARD_PREBUILT={path} lacks operators of this version of pyard: {reason}") from None
    library = _describe(path, "built elsewhere (PYARD_PREBUILT)", False)
    prebuilt.check_kernels(path, library.cuda_architectures, torch.version.cuda)
    return library


def _warn(reason: str) -> None:
    first_line = reason.splitlines()[0]
    warnings.warn(
        f"pyard runs without its native operators ({first_line}); `python -m pyard doctor` says what to do.",
        stacklevel=4,
    )


def _text(handle: ctypes.CDLL, function: str) -> str:
    ask: Any = getattr(handle, function)
    ask.restype = ctypes.c_char_p
    return str(ask().decode())


def _describe(path: Path, cuda_note: str, cuda_failed: bool) -> NativeLibrary:
    handle = ctypes.CDLL(str(path))
    instruction_sets = tuple(_text(handle, "pyard_built_instruction_sets").split())
    wish = os.environ.get("PYARD_CPU_ISA", instruction_sets[0])
    if wish not in instruction_sets:
        raise InputError(f"PYARD_CPU_ISA is {wish!r}, expected one of {', '.join(instruction_sets)}")
    return NativeLibrary(
        path=path,
        built_with_torch=_text(handle, "pyard_built_with_torch"),
        compiler=_text(handle, "pyard_compiler"),
        instruction_sets=instruction_sets,
        active_instruction_set=_text(handle, "pyard_active_instruction_set"),
        cuda_architectures=tuple(_text(handle, "pyard_built_cuda_architectures").split()),
        cuda_note=cuda_note,
        cuda_failed=cuda_failed,
    )
