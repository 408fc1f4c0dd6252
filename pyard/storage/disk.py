"""Disks that are full: found before hours of work where that can be known; where not, one line says what was missing."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from pyard.errors import InputError
from pyard.storage.units import format_bytes

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors keeps the number in the text alone, and torch says only where in its writer it stopped.
_WORDS = ("No space left", "File too large", "quota exceeded", "inline_container", "PytorchStreamWriter")


class DiskFullError(InputError):
    """A file that did not fit.

    Args:
        path: what was to be written.
        reason: what was missing.
    """

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"{path}: cannot be written ({reason}); the previous contents are kept: free some space and rerun the same command"
        )
        self.reason = reason


def did_not_fit(error: BaseException) -> bool:
    """Whether an error of whatever library says that a disk, a quota or a limit of the process has no room left."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DiskFullError) or (isinstance(seen, OSError) and seen.errno in _NUMBERS):
            return True
        if isinstance(seen, Exception) and any(word in str(seen) for word in _WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def missing_room(temporary: Path, size: int | None) -> str:
    """What was missing for a file or a folder whose writing just failed, while its half is still there.

    Args:
        temporary: the half.
        size: bytes of the whole; None: unknown.
    """
    written, largest = _bytes_in(temporary)
    limit = _limit()
    if limit is not None and largest >= limit:
        return f"File too large: this process may write {format_bytes(limit)} per file, see `ulimit -f`"
    free = shutil.disk_usage(temporary.parent).free + written
    if size is not None and size > free:
        return f"the disk is full: {format_bytes(size)} needed, {format_bytes(free)} free"
    return f"the disk is full: more was needed than the {format_bytes(free)} that were free"


def require_room(folder: Path, needed: int, what: str, advice: str = "") -> None:
    """Check the free bytes before work begins whose result has to be kept.

    Args:
        folder: where it goes; need not be there yet.
        needed: bytes.
        what: the work, for the message.
        advice: what else helps.

    Raises:
        InputError: less is free.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"{what}: {format_bytes(needed)} needed, {format_bytes(free)} free in {folder}; free some, or choose another folder"
            + (f", {advice}" if advice else "")
        )


def _limit() -> int | None:
    """Bytes that this process may write into one file; None: any number."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit: int = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _bytes_in(path: Path) -> tuple[int, int]:
    """Bytes of all files of a folder, or of a file, and of the largest."""
    files = [path] if path.is_file() else [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    sizes = [file.lstat().st_size for file in files if file.exists()]
    return sum(sizes), max(sizes, default=0)
