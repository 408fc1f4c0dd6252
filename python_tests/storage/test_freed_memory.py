from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Page faults of thirty rounds that allocate and free 64 MiB in pieces.
FAULTS = """
import resource, sys, torch
from pyard.storage.freed_memory import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
def one_round():
    pieces = [torch.ones(2**19) for _ in range(32)]
one_round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    one_round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def printed(*arguments: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_is_used_again() -> None:
    (usual,) = printed("usual")
    made, kept = printed("keep")
    assert made == "True"
    assert int(usual) > 30 * 8000
    assert int(kept) < 30 * 800


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_settings_of_the_environment_have_priority() -> None:
    made, faults = printed("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert made == "False"
    assert int(faults) > 30 * 8000
