"""One process, or one group, at a time in a folder; the system releases the lock when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from pyard.errors import InputError
from pyard.storage.files import make_folder
from pyard.storage.reading import read_object

FOLDER = ".locks"


@contextmanager
def only_one(folder: Path, work: str) -> Iterator[None]:
    """Hold the lock of a folder for some kind of work while the block runs.

    Args:
        folder: is made if it is not there.
        work: such as `training`: the lock is `.locks/training.lock`, and `.locks/training.json` says who holds it.

    Raises:
        InputError: another process holds it; the message names host, process and time.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(
            f"{folder} is {'a dangling link' if folder.is_symlink() else 'a file'}; expected a folder or a new path"
        )
    locks, was_there = folder / FOLDER, folder.exists()
    make_folder(locks)
    lock, holder = filelock.FileLock(locks / f"{work}.lock", timeout=0), locks / f"{work}.json"
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(
            f"{folder} is in use by {_holder_text(holder)} ({work}); wait for it, stop it, or use another folder"
        ) from None
    try:
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        # Only a message: it may be lost, as on a disk that is full.
        with contextlib.suppress(OSError):
            holder.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}), "utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        if not was_there and [entry.name for entry in folder.iterdir()] == [FOLDER]:
            # Work that was refused leaves nothing. Still locked, so that nobody can hold the file that goes.
            with contextlib.suppress(OSError):
                (locks / f"{work}.lock").unlink()
                locks.rmdir()
                folder.rmdir()
        lock.release()


def _holder_text(holder: Path) -> str:
    try:
        about = read_object(holder)
        return f"process {about['process']} on {about['host']} since {about['since']}"
    except (OSError, InputError, KeyError):
        return "another process"
