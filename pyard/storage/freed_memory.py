"""Keeps memory that training frees and allocates again in every update."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_TRIM_BYTES, _MMAP_BYTES = 512 * 2**20, 32 * 2**20  # glibc accepts no larger threshold for mmap


def keep_freed_memory() -> bool:
    """Let the C allocator keep up to 512 MiB of freed memory instead of returning it to the system.

    On the CPU, each update frees and allocates the same tensors. If glibc returns their memory in between, every 4 KiB of it
    costs a page fault in the next update: for small networks about a tenth of the time. This setting is for the whole process.
    Settings in the environment (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`) have priority.

    Returns:
        Whether the setting was made; False with other C libraries.
    """
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)) and bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES))
