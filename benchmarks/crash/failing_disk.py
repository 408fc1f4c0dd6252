"""A disk on which one block of one file cannot be read.

It is a btrfs image in which a byte was changed: btrfs finds that the block has another checksum, and answers every read of it
with EIO, and a process that has mapped the file with SIGBUS, as it does for a disk that fails.
"""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path

from benchmarks.crash.places import Image

_BLOCK = 4096


class FailingDisk(Image):
    """A disk with a copy of the inputs and an empty folder to work in.

    Args:
        inputs: to copy.
        folder: for the image and where it is mounted.
    """

    def __init__(self, inputs: Path, folder: Path):
        super().__init__("btrfs", folder)
        self.inputs, self.work = self.place / "inputs", self.place / "work"
        shutil.copytree(inputs, self.inputs)
        self.work.mkdir()
        self._spoilt: dict[int, bytes] = {}

    def files(self) -> dict[str, int]:
        """The files on it that are not empty, and when each was last read, in nanoseconds."""
        paths = [path for path in self.place.rglob("*") if path.is_file() and path.stat().st_size]
        return {path.relative_to(self.place).as_posix(): path.stat().st_atime_ns for path in sorted(paths)}

    def spoil(self, name: str, block: int) -> None:
        """Make a block of a file unreadable; `block` counts around."""
        content = (self.place / name).read_bytes()
        begin = block % -(-len(content) // _BLOCK) * _BLOCK
        wanted = content[begin : begin + _BLOCK].ljust(_BLOCK, b"\0")
        self.unmount()
        with self.file.open("r+b") as file, mmap.mmap(file.fileno(), 0) as image:
            at = image.find(wanted)
            while at >= 0:
                if at % _BLOCK == 0:  # another file may have the same block
                    image[at] ^= 1
                    self._spoilt[at] = image[at : at + _BLOCK]
                at = image.find(wanted, at + 1)
        if not self._spoilt:
            raise RuntimeError(f"{name}: block {begin} is not in the image")
        self.place = self._mount(self.file, "mounted")

    def mend(self) -> None:
        """Make everything readable again, but what was written over since."""
        self.unmount()
        with self.file.open("r+b") as file, mmap.mmap(file.fileno(), 0) as image:
            for at, block in self._spoilt.items():
                if image[at : at + _BLOCK] == block:
                    image[at] ^= 1
        self.place = self._mount(self.file, "mounted")
