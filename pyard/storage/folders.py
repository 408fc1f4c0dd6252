"""Folders that appear whole or not at all, and whose replacement leaves the files of others alone."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyard.errors import InputError
from pyard.storage.files import sync_directory, usual_mode

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def new_folder(path: Path, owned: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder that becomes `path` if the block ends without an exception.

    A folder that is not there appears by one rename. In one that is there, what the block wrote is replaced, what it did not
    write of the `owned` names is removed, and everything else stays; both folders change places in one step, so that a kill at
    any moment leaves the old model or the new one.

    Args:
        path: the folder.
        owned: names in it that this kind of folder may have.

    Raises:
        InputError: `path` is a file or a link.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        kind = "a link" if path.is_symlink() else "a file"
        raise InputError(f"{path} is {kind}; expected a folder, or nothing. Remove it, or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(path)
    building = path.parent / f".{path.name}.{socket.gethostname()}-{os.getpid()}.new"
    building.mkdir()
    try:
        yield building
        sync_tree(building)
        if path.exists():
            _replace(path, building, owned)
        else:
            building.rename(path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` if the block ends without an exception and nobody was faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
    try:
        yield building
        sync_tree(building)
        building.chmod(0o755)
        try:
            building.rename(path)
        except OSError:
            if not path.is_dir():
                raise
        sync_directory(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def sync_tree(path: Path) -> None:
    """Make everything in a folder durable: its files, then the folders that name them."""
    folders = [path]
    for entry in path.rglob("*"):
        if entry.is_symlink():
            continue
        if entry.is_dir():
            folders.append(entry)
        elif entry.is_file():
            usual_mode(entry)
            with open(entry, "rb") as handle:
                os.fsync(handle.fileno())
    for folder in folders:
        sync_directory(folder)


def _replace(path: Path, building: Path, owned: Collection[str]) -> None:
    """Make `building` the folder `path`, with what is foreign in `path`; what was replaced ends in `building`."""
    written = {entry.name for entry in building.iterdir()}
    foreign = [entry for entry in path.iterdir() if entry.name not in written and entry.name not in owned]
    try:
        for entry in foreign:
            _link(entry, building / entry.name)
        _exchange(building, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        # A file system without hard links or exchanges: entry by entry, what names the others last.
        for entry in foreign:
            _remove(building / entry.name)
        for name in sorted(written, key=lambda name: name.endswith(".json")):
            _remove(path / name)
            (building / name).rename(path / name)
        for name in set(owned) - written:
            _remove(path / name)
        return
    # What others put into the old folder meanwhile.
    for entry in [e for e in building.rglob("*") if not e.is_dir() or e.is_symlink()]:
        place = path / entry.relative_to(building)
        top = entry.relative_to(building).parts[0]
        if top not in written and top not in owned and not os.path.lexists(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            entry.rename(place)


def _link(entry: Path, to: Path) -> None:
    """The same files under another name."""
    if entry.is_dir() and not entry.is_symlink():
        to.mkdir()
        for inner in entry.iterdir():
            _link(inner, to / inner.name)
        shutil.copystat(entry, to)
    else:
        os.link(entry, to, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> None:
    """Two folders change their names in one step."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def _remove_left_overs(path: Path) -> None:
    """What processes of this machine that were killed while they wrote this folder have left."""
    host = re.escape(socket.gethostname())
    for entry in path.parent.glob(f".{path.name}.*.new"):
        match = re.fullmatch(rf"\.{re.escape(path.name)}\.{host}-(\d+)\.new", entry.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
