"""Where a trial works: a folder, a small disk in memory, or a file system in an image whose power can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Nothing is written but what is flushed: the journal's own timer would come between.
_MOUNT = {
    "ext4": "loop,noatime,commit=300",
    "xfs": "loop,noatime,nouuid",
    "btrfs": "loop,strictatime,max_inline=0",  # every file has blocks of its own
}
_MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-J", "size=4"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q", "-d", "single", "-m", "single"],
}
_MEGABYTES = {"ext4": 96, "xfs": 320, "btrfs": 160}


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A disk of `size` bytes at `place`."""
    place.mkdir(parents=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
    try:
        yield
    finally:
        _run("umount", "-l", place)


def enlarge(place: Path) -> None:
    """Give a `small_disk` room for everything."""
    _run("mount", "-o", "remount,size=512m", place)


class Image:
    """A file system in a file, mounted.

    Args:
        kind: ext4 | xfs | btrfs.
        folder: for the image and where it is mounted.
    """

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder = kind, folder
        self.file = folder / "image"
        template = Path(tempfile.gettempdir()) / f"pyard-crash-{os.getuid()}-{kind}.img"
        if not template.exists():
            making = template.with_suffix(f".{os.getpid()}")
            with making.open("wb") as file:
                file.truncate(_MEGABYTES[kind] * 2**20)
            _run(*_MAKE[kind], making)
            making.replace(template)
        _copy(template, self.file)
        self.mounts: list[Path] = []
        self.place = self._mount(self.file, "mounted")

    def cut_power(self) -> Path:
        """What the disk holds now, without what was not flushed, mounted elsewhere. Nobody may be writing."""
        copy = self.folder / "copy"
        _copy(self.file, copy)
        return self._mount(copy, "after")

    def unmount(self) -> None:
        """Unmount what nobody uses, so that all that is cached of it is forgotten."""
        for mount in self.mounts:
            _run("umount", mount)
        self.mounts.clear()

    def close(self) -> None:
        """Unmount it, even if it is in use."""
        for mount in self.mounts:
            subprocess.run(["umount", "-l", mount], check=False)

    def _mount(self, image: Path, name: str) -> Path:
        mount = self.folder / name
        mount.mkdir(exist_ok=True)
        _run("mount", "-o", _MOUNT[self.kind], image, mount)
        self.mounts.append(mount)
        return mount


def can_mount(kind: str) -> str | None:
    """Why this file system cannot be mounted from an image here; None: it can."""
    if os.geteuid() != 0:
        return "only root can mount"
    if shutil.which(_MAKE[kind][0]) is None:
        return f"there is no {_MAKE[kind][0]}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            image = Image(kind, Path(folder))
        except subprocess.CalledProcessError as error:
            return f"mounting an image fails: {error.stderr.decode().strip()}"
        image.close()
    return None


def _copy(source: Path, to: Path) -> None:
    _run("cp", "--sparse=always", source, to)


def _run(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
