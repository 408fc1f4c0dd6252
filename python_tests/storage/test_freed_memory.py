from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Allocates and frees 64 MiB in pieces of 2 MiB, twice. Prints how many pieces of the second round glibc mapped on their own,
# and how many MiB of freed memory it holds in the end. Both are glibc's own counts: page faults would depend on the size of
# the pages.
ROUNDS = """
import ctypes, sys, torch
from pyard.storage.freed_memory import keep_freed_memory
FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in FIELDS]
counts = ctypes.CDLL(None).mallinfo
counts.restype = Counts
if sys.argv[1] == "keep":
    print(keep_freed_memory())
[torch.empty(2**19) for _ in range(32)]
before = counts().hblks
pieces = [torch.empty(2**19) for _ in range(32)]
print(counts().hblks - before)
del pieces
print(counts().fordblks // 2**20)
"""


def printed(*arguments: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")


@glibc_only
def test_freed_memory_is_kept_for_the_next_update() -> None:
    made, mapped, kept = printed("keep")
    assert made == "True"
    assert int(mapped) == 0
    assert int(kept) >= 60


@glibc_only
def test_settings_of_the_environment_have_priority() -> None:
    made, mapped, _ = printed("keep", MALLOC_MMAP_THRESHOLD_="131072")
    assert made == "False"
    assert int(mapped) == 32
