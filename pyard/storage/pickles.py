"""PyTorch's `.pt` files: pickles, of which plain tensors and settings are read and nothing is ever run.

`torch.load(weights_only=True)` runs no code, but it believes sizes: a file may claim a tensor that is larger than what it
holds, which reads memory beyond it, or one that takes all the memory there is. So the pickle is walked first with objects that
do nothing.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, ClassVar

import torch

from pyard.errors import InputError
from pyard.storage.reading import DAMAGE, regular_file

_UNREADABLE: tuple[type[BaseException], ...] = (
    *DAMAGE, MemoryError, RuntimeError, AssertionError, pickle.UnpicklingError,
)  # fmt: skip
_MOST_PICKLE_BYTES = 2**28  # of names and sizes; the numbers lie beside them
# Tensors may share numbers, such as a weight with two names; a file of 1 MB whose tensors are 1 TB is none of ours.
_MOST_SHARING = 16

# Bytes of a number in storages, by class.
_STORAGES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8, "UntypedStorage": 1,
}  # fmt: skip
DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
_PLAIN = {"set", "frozenset", "complex", "int", "float", "list", "dict", "tuple", "bool", "str"}
# What a pickle may name, by module.
_KNOWN = {
    "torch._utils": {
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
    },
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch.nn.parameter": {"Parameter"},
    "torch": {"Size", "device", "Tensor", *DTYPES, *_STORAGES},
    "torch.storage": {"UntypedStorage"},
    "collections": {"OrderedDict", "Counter", "defaultdict"},
    "argparse": {"Namespace"},
    "builtins": _PLAIN,
    "__builtin__": _PLAIN,
}


class ForeignObjectError(InputError):
    """A pickle that names something else than tensors and settings; `kind` is what."""

    def __init__(self, path: Path, kind: str):
        super().__init__(f"{path} holds an object of type {kind}; expected only tensors and settings")
        self.kind = kind


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU: tensors, settings, containers of them; `argparse.Namespace` is the only other class.

    Raises:
        ForeignObjectError: it names another class or a function.
        InputError: missing, damaged, or tensors that are larger than what is there.
    """
    with regular_file(path) as file:
        try:
            _check(file, path)
            # Training scripts store their arguments, a Namespace: a bag of attributes that runs no code.
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):
                content: Any = torch.load(file, map_location="cpu", weights_only=True)
        except InputError:
            raise
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            if found is not None:
                raise ForeignObjectError(path, found[1]) from None
            raise _unreadable(path, error) from None
        except _UNREADABLE as error:
            raise _unreadable(path, error) from None
        _check_tensors(content, os.fstat(file.fileno()).st_size, path)
    return content


def require_sound(path: Path) -> None:
    """Raises InputError unless a file is what `read_pickle` reads, for a library that reads it itself; loads nothing."""
    with regular_file(path) as file:
        try:
            _check(file, path)
        except _UNREADABLE as error:
            if isinstance(error, InputError):
                raise
            raise _unreadable(path, error) from None


def require_names(path: Path, known: Mapping[str, Collection[str]]) -> None:
    """Raises InputError unless a plain pickle names nothing but these, for a library that unpickles it itself.

    Args:
        path: of the pickle.
        known: by module, the names of what only keeps the values that it is given.
    """
    with regular_file(path, _MOST_PICKLE_BYTES) as file:
        try:
            walk = _Walk(file, path, lambda key: 0, known=known)
            walk.load()
            largest = max(walk.memo, default=0)  # type: ignore[attr-defined]
        except _UNREADABLE as error:
            if isinstance(error, InputError):
                raise
            raise _unreadable(path, error) from None
        # The one in C has an array for what this one has a dictionary for.
        if largest > file.tell():
            raise InputError(f"{path}: not a pickle written by Python; it is damaged")


def _check(file: IO[bytes], path: Path) -> None:
    """Walk the pickles of a file, and compare what they say of storages with what is there."""
    size = os.fstat(file.fileno()).st_size
    if zipfile.is_zipfile(file):
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: info for info in archive.infolist()}
            if len(records) < len(archive.infolist()):
                raise InputError(f"{path}: two records with the same name; it is damaged")
            if any(info.compress_type != zipfile.ZIP_STORED or info.file_size > size for info in records.values()):
                raise InputError(f"{path}: compressed records, which torch.save does not write; unpack and save it again")
            name = next((name for name in records if name.rpartition("/")[2] == "data.pkl"), None)
            if name is None or records[name].file_size > _MOST_PICKLE_BYTES:
                raise InputError(f"{path}: it has no data.pkl, as a checkpoint would")
            home = name.removesuffix("data.pkl")
            content = archive.read(name)

        def held(key: str) -> int:
            record = records.get(f"{home}data/{key}")
            return 0 if record is None else record.file_size

        _Walk(io.BytesIO(content), path, held).load()
        return
    file.seek(0)
    # The format before torch 1.6: a magic number, a version, the system, the content, the storages' keys; then the storages.
    storages: dict[str, int] = {}

    def remaining(key: str) -> int:
        return size

    for _ in range(5):
        _Walk(file, path, remaining, storages).load()
    if sum(storages.values()) > size:
        raise InputError(
            f"{path}: its tensors take {sum(storages.values())} bytes, but it has {size}. It is cut off or damaged"
        )


class _Bounded:
    """A file that is never asked for more than it has, whatever length a pickle names."""

    def __init__(self, file: IO[bytes]):
        self._file, here = file, file.tell()
        self._size = file.seek(0, io.SEEK_END)
        file.seek(here)
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._size - self._file.tell()))


class _Inert:
    """Stands for every class and function that a pickle names; does nothing."""

    def __init__(self, *args: Any, **settings: Any):
        pass

    def __call__(self, *args: Any, **settings: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


class _Storage(_Inert):
    """Stands for a class of storages of so many bytes a number."""

    def __init__(self, item_bytes: int = 1):
        self.item_bytes = item_bytes


class _Walk(pickle._Unpickler):  # type: ignore[name-defined, misc]  # pickle's own in Python: its memo is a dictionary, not an array
    """Reads a pickle with inert objects in place of all that it names."""

    def __init__(
        self,
        file: IO[bytes],
        path: Path,
        held: Callable[[str], int],
        storages: dict[str, int] | None = None,
        known: Mapping[str, Collection[str]] = MappingProxyType(_KNOWN),
    ):
        super().__init__(_Bounded(file), encoding="utf-8")
        self._path, self._held, self._storages, self._known = path, held, storages, known

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._known.get(module, ()):
            raise ForeignObjectError(self._path, f"{module}.{name}")
        return _Storage(_STORAGES[name]) if name in _STORAGES else _Inert

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _, numbers, *_ = pid
        if kind != "storage" or not isinstance(storage, _Storage) or type(numbers) is not int or numbers < 0:
            raise InputError(f"{self._path}: not a record of a tensor; it is damaged")
        claimed, there = numbers * storage.item_bytes, self._held(str(key))
        if claimed > there:
            raise InputError(
                f"{self._path}: a tensor of {claimed} bytes, but only {there} are in the file; it is cut off or damaged"
            )
        if self._storages is not None:
            self._storages[str(key)] = claimed
        return _Inert()

    # Without those that allocate before they read, and those that find their object elsewhere.
    dispatch: ClassVar[dict[int, Any]] = {
        code: step
        for code, step in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        if bytes([code]) not in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4)
    }


def _check_tensors(content: Any, size: int, path: Path) -> None:
    """Refuse tensors that are few numbers many times over, and others than plain ones."""
    total, seen, waiting = 0, set[int](), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized:
                raise InputError(f"{path}: a tensor of layout {value.layout}, or quantised; expected plain ones")
            total += math.prod(value.shape) * value.itemsize
        elif isinstance(value, Mapping | list | tuple | set | frozenset | argparse.Namespace) and id(value) not in seen:
            seen.add(id(value))
            inner = vars(value) if isinstance(value, argparse.Namespace) else value
            waiting += inner.values() if isinstance(inner, Mapping) else inner
    if total > _MOST_SHARING * size + 2**20:
        raise InputError(f"{path}: {size} bytes with tensors of {total}; it is damaged, or its tensors repeat few numbers")


def _unreadable(path: Path, error: BaseException) -> InputError:
    # torch's own advice is to unpickle what it refuses.
    text = re.split(r"\n|\. In PyTorch|Re-running|Weights only load failed", str(error).strip())[0].strip()[:300]
    return InputError(f"{path} cannot be read as a PyTorch checkpoint: {text or type(error).__name__}")
