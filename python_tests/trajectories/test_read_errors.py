"""A mapped file that cannot be read ends a command in one line, not by a signal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from trajectories.native import require_native

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
