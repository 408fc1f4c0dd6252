"""numpy's files, `.npz` and `.npy`: what a header claims is compared with the bytes there before anything is allocated."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pyard.errors import InputError
from pyard.storage.reading import reading, regular_file

# An archive that says it holds so many times its own size is a bomb; pictures and features shrink to a third at best.
_MOST_EXPANSION = 100
_ALWAYS_ALLOWED = 2**26
_MOST_ARRAYS = 10**4
_CHUNK = 2**22


@dataclass(frozen=True)
class ArrayHeader:
    """What a file says of an array, checked against the bytes that follow.

    Args:
        shape: of the array.
        dtype: of numbers, or of text; never of objects, which would be unpickled.
        fortran: whether the first index is the fastest.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ArrayArchive:
    """The arrays of an open `.npz`; `open_npz` makes it."""

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        self._archive, self._path = archive, path
        self.names = [name.removesuffix(".npy") for name in archive.namelist()]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @contextmanager
    def stream(self, name: str) -> Iterator[tuple[ArrayHeader, IO[bytes]]]:
        """An array's header and the stream of its bytes, for arrays that are larger than memory.

        Raises:
            InputError: no such array, or one whose header contradicts its bytes.
        """
        if name not in self.names:
            raise InputError(f"{self._path}: it has {', '.join(sorted(self.names)[:8]) or 'no arrays'}; expected {name}")
        info = self._archive.getinfo(f"{name}.npy" if f"{name}.npy" in self._archive.namelist() else name)
        with reading(f"{self._path}: {name}", "", RuntimeError), self._archive.open(info) as stream:
            yield _header(stream, info.file_size, f"{self._path}: {name}"), stream

    def read(self, name: str) -> NDArray[Any]:
        """An array; errors as of `stream`."""
        with self.stream(name) as (header, stream):
            return _read(stream, header, f"{self._path}: {name}")


@contextmanager
def open_npz(path: Path) -> Iterator[ArrayArchive]:
    """The arrays of an `.npz` file.

    Raises:
        InputError: no zip archive, one that is cut off, or one that unpacks to far more than its own size.
    """
    expected = "expected an .npz file as np.savez writes it"
    with regular_file(path) as file, reading(path, expected, RuntimeError), zipfile.ZipFile(file) as archive:
        infos, size = archive.infolist(), os.fstat(file.fileno()).st_size
        total = sum(info.file_size for info in infos)
        if len(infos) > _MOST_ARRAYS or total > _MOST_EXPANSION * size + _ALWAYS_ALLOWED:
            raise InputError(
                f"{path}: {size} bytes that unpack to {total} in {len(infos)} arrays; pyard does not read such a file"
            )
        if len({info.filename for info in infos}) < len(infos):
            raise InputError(f"{path}: two arrays with the same name; it is damaged")
        yield ArrayArchive(archive, path)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an `.npz` file by name; errors as of `open_npz`."""
    with open_npz(path) as archive:
        return {name: archive.read(name) for name in archive.names}


def read_npy(path: Path) -> NDArray[Any]:
    """The array of an `.npy` file; an InputError if it is none."""
    with regular_file(path) as file, reading(path, "expected an .npy file as np.save writes it"):
        return _read(file, _header(file, os.fstat(file.fileno()).st_size, str(path)), str(path))


def _header(stream: IO[bytes], size: int, where: str) -> ArrayHeader:
    """The header at the beginning of a stream of so many bytes, which is then at the array's first one."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise InputError(f"{where}: format {version} of numpy's files; expected 1.0 or 2.0, which hold numbers")
    try:
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (MemoryError, SyntaxError, TokenError):  # of Python's parser, which numpy reads headers with
        raise InputError(f"{where}: no array header") from None
    header = ArrayHeader(tuple(int(length) for length in shape), dtype, bool(fortran))
    if dtype.hasobject or dtype.kind not in "biufcSU":
        raise InputError(f"{where}: holds {dtype}; expected numbers. Objects would be unpickled, which runs code")
    there = size - stream.tell()
    if min(shape, default=0) < 0 or header.num_bytes != there:
        raise InputError(f"{where}: declares {dtype} {list(header.shape)}, {header.num_bytes} bytes, but has {there} bytes")
    return header


def _read(stream: IO[bytes], header: ArrayHeader, where: str) -> NDArray[Any]:
    content = bytearray(header.num_bytes)
    view, filled = memoryview(content), 0
    while filled < len(content):
        piece = stream.read(min(_CHUNK, len(content) - filled))
        if not piece:
            raise InputError(f"{where}: cut off after {filled} of {len(content)} bytes; copy it again")
        view[filled : filled + len(piece)] = piece
        filled += len(piece)
    flat = np.frombuffer(content, header.dtype, count=math.prod(header.shape)) if content else np.empty(0, header.dtype)
    return flat.reshape(header.shape, order="F" if header.fortran else "C")
