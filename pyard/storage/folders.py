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

# Of file systems without hard links or exchanges, and of mount points.
_NO_EXCHANGE = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBUSY)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def new_folder(path: Path, owned: Collection[str] = (), size: int | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `path` if the block ends without an exception.

    A folder that is not there appears by one rename. In one that is there, what the block wrote is replaced, what it did not
    write of the `owned` names is removed, and everything else stays; both folders change places in one step, so that a kill at
    any moment leaves the old model or the new one. Some folders have to stay the ones they are: the working folder and those
    around it, mount points, folders whose parent cannot be written. In them the files change one after the other, each in one
    step, those that name the others last.

    Args:
        path: the folder.
        owned: names in it that this kind of folder may have.
        size: bytes that will be written, where they are known; for the message on a full disk.

    Raises:
        InputError: `path` is a file or a link, or cannot be written; the disk is full.
    """
    path = with_a_name(path)
    require_folder_or_nothing(path)
    with building_folder(path, size) as building:
        yield building
        sync_tree(building)
        with _alone_in(building.parent):
            if building.parent == path:
                _replace_each(path, building, owned)
            elif path.exists():
                _replace(path, building, owned)
            else:
                building.rename(path)
            sync_directory(building.parent)


def require_folder_or_nothing(path: Path) -> None:
    """Raises InputError if `path` is a file or a link, which `new_folder` does not replace."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        kind = "a link" if path.is_symlink() else "a file"
        raise InputError(f"{path} is {kind}; expected a folder or a new path. Remove it, or choose another name")


def with_a_name(path: Path) -> Path:
    """The same folder by a path that ends in its name, as `.` and `..` do not."""
    return path.resolve() if path.name in ("", "..") else path


def _must_stay(path: Path) -> bool:
    """Whether a folder cannot change places with another one, or should not, since processes are at work in it by its inode."""
    if not path.is_dir():
        return False
    with contextlib.suppress(FileNotFoundError):  # a working folder that was removed
        if Path.cwd().is_relative_to(path.resolve()):
            return True
    return os.path.ismount(path)


@contextmanager
def building_folder(path: Path, size: int | None = None) -> Iterator[Path]:
    """A folder beside `path` in which something is built, and which goes when the block ends, however it ends.

    Raises:
        InputError: it cannot be made; the disk is full.
    """
    building = _new_building(path)
    try:
        yield building
    except BaseException as error:
        if did_not_fit(error):
            raise DiskFullError(path, missing_room(building, size)) from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _new_building(path: Path) -> Path:
    """An empty folder beside `path`, or in it where there can be none beside it or no exchange with one."""
    name = f".{path.name}.{this_process()}.new"
    try:
        make_folder(path.parent)
        _remove_left_overs(path)
        if not _must_stay(path):
            try:
                (path.parent / name).mkdir()
                return path.parent / name
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not path.is_dir():
                    raise
        (path / name).mkdir()
        return path / name
    except OSError as error:
        if did_not_fit(error):
            raise DiskFullError(path, missing_room(path.parent, None)) from error
        raise InputError(f"{path}: cannot be made or written ({error.strerror or error}); choose another folder") from error


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
    for folder in (path.parent, path):
        for entry in folder.glob(f".{glob.escape(path.name)}.*.new"):
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
        if error.errno not in _NO_EXCHANGE:
            raise
        for entry in foreign:
            _remove(building / entry.name)
        _replace_each(path, building, owned)
        return
    # What others put into the old folder meanwhile.
    for entry in [e for e in building.rglob("*") if not e.is_dir() or e.is_symlink()]:
        place = path / entry.relative_to(building)
        top = entry.relative_to(building).parts[0]
        if top not in written and top not in owned and not os.path.lexists(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            entry.rename(place)


def _replace_each(path: Path, building: Path, owned: Collection[str]) -> None:
    """Move what is in `building` into `path`, entry by entry, what names the others last."""
    written = sorted((entry.name for entry in building.iterdir()), key=lambda name: name.endswith(".json"))
    staged = path / building.name
    if staged != building:
        try:
            building.rename(staged)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copytree(building, staged, symlinks=True)  # into a mount, whose old files stay until all new ones are there
            sync_tree(staged)
    try:
        for name in written:
            place, old = path / name, staged / f"{name}.old"
            if place.is_dir() and not place.is_symlink():
                place.rename(old)
            elif (staged / name).is_dir():
                place.unlink(missing_ok=True)
            try:
                (staged / name).replace(place)
            except OSError:
                if old.exists():
                    old.rename(place)
                raise
        for name in set(owned) - set(written):
            _remove(path / name)
        sync_directory(path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


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
