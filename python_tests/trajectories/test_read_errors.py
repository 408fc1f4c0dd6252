"""A file that cannot be read is not one that is missing, and a mapped one ends a command in one line, not by a signal."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from factories import tiny_teacher
from trajectories.native import require_native

from pyard.errors import InputError
from pyard.trajectories import TrajectoryStore, generate_trajectories, merge_trajectories

# A file that became shorter while it was mapped is, for the process, a disk that fails.
MAPPED = """
import mmap, os, sys
from pyard._trajectory import exit_on_bus_errors
exit_on_bus_errors("pyard train")
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    os.truncate(sys.argv[1], 0)
mapped[5000]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is mapped")
def test_the_line_names_the_file(tmp_path: Path) -> None:
    require_native()
    file = tmp_path / "weights of a model.safetensors"
    file.write_bytes(bytes(10000))
    done = subprocess.run([sys.executable, "-c", MAPPED, file], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pyard train: error: {file} cannot be read (the disk has an error")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is mapped")
def test_full_shared_memory_is_not_taken_for_a_disk() -> None:
    require_native()
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        Path(file.name).write_bytes(bytes(10000))
        done = subprocess.run([sys.executable, "-c", MAPPED, file.name], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("pyard train: error: shared memory (/dev/shm) is full")


def test_a_signal_that_somebody_sends_ends_the_process_as_before() -> None:
    require_native()
    code = """
import os, signal
from pyard._trajectory import exit_on_bus_errors
for name in ("pyard train", "pyard train"):
    exit_on_bus_errors(name)
os.kill(os.getpid(), signal.SIGBUS)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGBUS


def test_a_sidecar_that_cannot_be_read_is_not_taken_for_a_missing_shard(tmp_path: Path) -> None:
    generate_trajectories(
        tiny_teacher(), tmp_path / "store", 16, num_steps=2, teacher_steps=4, batch_size=8, shard_size=8, progress=False
    )
    sidecar = max((tmp_path / "store" / "shards").glob("*.json"))
    content = sidecar.read_bytes()
    sidecar.unlink()
    sidecar.symlink_to(sidecar.name)  # to itself: the system refuses to open it
    with pytest.raises(InputError, match=rf"{sidecar.name} cannot be read"):
        TrajectoryStore.open(tmp_path / "store")
    with pytest.raises(InputError, match=rf"{sidecar.name} cannot be read"):
        merge_trajectories([tmp_path / "store"], tmp_path / "merged", progress=False)
    sidecar.unlink()
    sidecar.write_bytes(content)
    assert TrajectoryStore.open(tmp_path / "store").count == 16
