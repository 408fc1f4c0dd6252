"""Folders that appear whole or not at all, and whose replacement leaves the files of others alone."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyard.errors import InputError
from pyard.storage.disk import DiskFullError, did_not_fit, missing_room
from pyard.storage.files import is_left_over, make_folder, sync_directory, this_process, usual_mode

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def new_folder(path: Path, owned: Collection[str] = (), size: int | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `path` if the block ends without an exception.

    A folder that is not there appears by one rename. In one that is there, what the block wrote is replaced, what it did not
    write of the `owned` names is removed, and everything else stays; both folders change places in one step, so that a kill at
    any moment leaves the old model or the new one.

    Args:
        path: the folder.
        owned: names in it that this kind of folder may have.
        size: bytes that will be written, where they are known; for the message on a full disk.

    Raises:
        InputError: `path` is a file or a link; the disk is full.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        kind = "a link" if path.is_symlink() else "a file"
        raise InputError(f"{path} is {kind}; expected a folder or a new path. Remove it, or choose another name")
    with building_folder(path, size) as building:
        yield building
        sync_tree(building)
        with _alone_in(path.parent):
            if path.exists():
                _replace(path, building, owned)
            else:
                building.rename(path)
            sync_directory(path.parent)


@contextmanager
def building_folder(path: Path, size: int | None = None) -> Iterator[Path]:
    """A folder beside `path` in which something is built, and which goes when the block ends, however it ends.

    Raises:
        InputError: the disk is full.
    """
    make_folder(path.parent)
    _remove_left_overs(path)
    building = path.parent / f".{path.name}.{this_process()}.new"
    try:
        building.mkdir()
        yield building
    except BaseException as error:
        if did_not_fit(error):
            raise DiskFullError(path, missing_room(building, size)) from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Of several processes that replace something in a folder, one at a time; where the file system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and the lock goes with it


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` if the block ends without an exception and nobody was faster."""
    make_folder(path.parent)
    _remove_left_overs(path)
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}.{this_process()}-", suffix=".new", dir=path.parent))
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
    except BaseException as error:
        if did_not_fit(error):
            raise DiskFullError(path, missing_room(building, None)) from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_left_overs(path: Path) -> None:
    for entry in path.parent.glob(f".{glob.escape(path.name)}.*.new"):
        if is_left_over(entry.name, path):
            shutil.rmtree(entry, ignore_errors=True)


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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
