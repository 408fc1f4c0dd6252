"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyard.errors import InputError
from pyard.storage.disk import DiskFullError, did_not_fit, missing_room


@contextmanager
def new_file(path: Path, size: int | None = None, *, durable: bool = True) -> Iterator[Path]:
    """A temporary file that becomes `path`, replacing what was there, if the block ends without an exception.

    What the block wrote is on the disk, and so is its name, before the block is left: a power cut leaves the old file or the
    new one. Two processes that write one file at once do not meet: the later one replaces the earlier one's.

    Args:
        path: the file; its folder is made if it is not there.
        size: bytes that it will have, where they are known; for the message on a full disk.
        durable: False: of many small files, whose folder is flushed by `sync_tree` in the end.

    Raises:
        InputError: the disk is full, or the file too large for it.
    """
    make_folder(path.parent)
    if durable:
        for entry in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            if is_left_over(entry.name, path):
                entry.unlink(missing_ok=True)
    temporary = path.with_name(f"{path.name}.{this_process()}.tmp")
    try:
        yield temporary
        usual_mode(temporary)
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_directory(path.parent)
    except BaseException as error:
        reason = missing_room(temporary, size) if did_not_fit(error) else None
        temporary.unlink(missing_ok=True)
        if reason is not None:
            raise DiskFullError(path, reason) from error
        if isinstance(error, OSError):
            raise InputError(
                f"{path}: cannot be written ({error.strerror or error}); the previous contents are kept: fix the "
                "cause and rerun the same command"
            ) from error
        raise


def this_process() -> str:
    """A name of this process that no other one of any machine has, for files that it is writing."""
    return f"{socket.gethostname()}-{os.getpid()}"


def is_left_over(name: str, path: Path) -> bool:
    """Whether `name` is what a process of this machine, which is gone, was writing in place of `path`.

    Names of this process are among them, unless they end at random: an earlier one of the same number left them.
    """
    match = re.fullmatch(rf"\.?{re.escape(path.name)}\.{re.escape(socket.gethostname())}-(\d+)(-\w+)?\.(tmp|new)", name)
    if match is None:
        return False
    return match[2] is None if int(match[1]) == os.getpid() else not _alive(int(match[1]))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def make_folder(path: Path) -> None:
    """Make a folder and those above it; their names are on the disk afterwards."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_directory(folder.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Make `path` appear with `content` whole or not at all; see `new_file`."""
    with new_file(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Make `path` appear with a text in UTF-8 whole or not at all; see `new_file`."""
    write_atomically(path, text.encode())


def usual_mode(path: Path) -> None:
    """Give a file the mode that `open` would have given it; safetensors makes its files for their owner alone."""
    if stat.S_IMODE(path.stat().st_mode) == 0o600:
        mask = os.umask(0o077)  # there is no other way to ask for it
        os.umask(mask)
        path.chmod(0o666 & ~mask)


def sync_directory(path: Path) -> None:
    """Make renames and removals in a directory durable."""
    if os.name == "nt":  # Windows cannot open directories, and journals renames itself.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_bytes(value: Any) -> bytes:
    """JSON that a person can read."""
    return (json.dumps(value, indent=2) + "\n").encode()


def stand_in(path: Path) -> str | None:
    """What a file is that was saved in place of the one meant; None if it is none of those.

    Such are empty files, pointers of Git LFS, and web pages.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty; copy it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer in place of the file; `git lfs pull` fetches the file itself"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "it is a web page (HTML), such as an error or a login page that was saved in its place; download it again"
    return None
