"""Images in batches of bytes, out of a folder or of ADM's `.npz`, and samples into such a file."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from pyard.data.pictures import PICTURE_SUFFIXES, picture_files, read_picture
from pyard.errors import InputError
from pyard.storage.files import new_file

_IMAGES, _LABELS, _SETTINGS = "arr_0.npy", "arr_1.npy", "settings.npy"


def folder_images(folder: Path, size: int, channels: int, batch_size: int) -> Iterator[np.ndarray]:
    """The pictures of a folder and its subfolders, by path, each cropped by ADM's rule.

    Yields:
        uint8 [n, channels, size, size].

    Raises:
        InputError: no picture there, or one that cannot be read.
    """
    files = picture_files(folder) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder}: no pictures ({', '.join(PICTURE_SUFFIXES)}) in it or its subfolders")
    for start in range(0, len(files), batch_size):
        yield np.stack([read_picture(file, size, channels) for file in files[start : start + batch_size]]).transpose(0, 3, 1, 2)


def npz_images(path: Path, batch_size: int) -> Iterator[np.ndarray]:
    """The images of an `.npz` file's `arr_0`, a batch at a time: 50,000 of 256 pixels are 10 GB.

    Yields:
        uint8 [n, C, H, W].

    Raises:
        InputError: no `arr_0` of uint8 [n, H, W, C], or a file that is cut off.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_IMAGES) as stream:
            shape, fortran, dtype = _npy_header(stream)
            if dtype != np.uint8 or len(shape) != 4:
                raise InputError(f"{path}: arr_0 is {dtype} {shape}; expected uint8 [n, H, W, C]")
            if fortran:  # in the file, the images lie inside each other
                whole = np.load(path)["arr_0"].transpose(0, 3, 1, 2)
                yield from (np.ascontiguousarray(whole[i : i + batch_size]) for i in range(0, len(whole), batch_size))
                return
            row = int(np.prod(shape[1:]))
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                content = stream.read(count * row)
                if len(content) != count * row:
                    raise InputError(f"{path}: arr_0 is cut off after {start} of {shape[0]} images; copy it again")
                yield np.frombuffer(bytearray(content), np.uint8).reshape(count, *shape[1:]).transpose(0, 3, 1, 2)
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: no .npz file with images arr_0 in it: {error}") from None


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(stream)
    return npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)


class SampleFile:
    """ADM's sample file, written a batch at a time and complete or absent.

    An `.npz` with `arr_0`, uint8 [n, H, W, C], `arr_1`, the labels, int64 [n], and `settings`, JSON that says how they were
    drawn, which other programs do not read.

    Example:
        with SampleFile(Path("samples.npz"), labels, {"labels": "balanced"}) as file:
            file.write(images)  # uint8 [b, C, H, W], until all labels have their image

    Args:
        path: of the file; replaced if it is there.
        labels: of all samples, int64 [n].
        settings: JSON-able.
    """

    def __init__(self, path: Path, labels: np.ndarray, settings: dict[str, Any]):
        if path.suffix != ".npz":
            raise InputError(f"{path}: expected a name that ends in .npz")
        self._path, self._labels, self._settings = path, labels, settings
        self._written = 0
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> SampleFile:
        with ExitStack() as stack:
            partial = stack.enter_context(new_file(self._path))
            self._archive = zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True)
            self._images = self._archive.open(_IMAGES, "w", force_zip64=True)
            self._stack = stack.pop_all()
        return self

    def write(self, images: np.ndarray) -> None:
        """Append images, uint8 [b, C, H, W]."""
        rows = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        if not self._written:
            self._shape = rows.shape[1:]
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(self._labels), *self._shape)}
            npy.write_array_header_1_0(self._images, header)
        if rows.dtype != np.uint8 or rows.shape[1:] != self._shape:
            raise InputError(f"{self._path}: images {rows.dtype} {rows.shape[1:]}; expected uint8 {self._shape}")
        self._written += len(rows)
        self._images.write(rows.data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            try:
                if error is not None:
                    raise error
                self._images.close()
                if self._written != len(self._labels):
                    raise InputError(f"{self._path}: {self._written} images for {len(self._labels)} labels")
                for name, array in ((_LABELS, self._labels), (_SETTINGS, np.array(json.dumps(self._settings)))):
                    with self._archive.open(name, "w") as stream:
                        npy.write_array(stream, array, allow_pickle=False)
                self._archive.close()
            except BaseException:
                # An archive that is given up would write its end when it is collected.
                file, self._archive.fp = self._archive.fp, None
                if file is not None:
                    with suppress(OSError):
                        file.close()
                raise
