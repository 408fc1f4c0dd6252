"""Files and folders appear whole or not at all."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pyard.errors import InputError
from pyard.storage.files import new_file, read_json, write_atomically, write_text
from pyard.storage.folders import appearing_folder, new_folder


def names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    with new_file(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == "ä".encode()
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")

    def stop_halfway(writing: AbstractContextManager[Path]) -> None:
        with writing as partial:
            (partial / "half" if partial.is_dir() else partial).write_bytes(b"half")
            raise ZeroDivisionError

    for writing in (new_file(tmp_path / "file"), new_folder(tmp_path / "folder"), appearing_folder(tmp_path / "folder")):
        with pytest.raises(ZeroDivisionError):
            stop_halfway(writing)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            InputError, match=r"file: cannot be written \(File too large: this process may write 1 KB"
        ) as failed:
            write_atomically(tmp_path / "file", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(failed.value)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_everything_is_flushed_before_a_name_appears(tmp_path: Path) -> None:
    """The system calls, as strace would show them: what is renamed, and the folders, are synchronised before and after."""
    code = f"""
import os
import socket
from pathlib import Path
calls, fsync, rename = [], os.fsync, os.rename
os.fsync = lambda handle: (calls.append("fsync " + os.readlink(f"/proc/self/fd/{{handle}}")), fsync(handle))
from pyard.storage.files import write_text
from pyard.storage.folders import new_folder
replace, move = Path.replace, Path.rename
Path.replace = lambda self, to: (calls.append(f"rename {{self}}"), replace(self, to))
Path.rename = lambda self, to: (calls.append(f"rename {{self}}"), move(self, to))
folder = Path({str(tmp_path)!r})
write_text(folder / "file", "text")
with new_folder(folder / "model") as building:
    (building / "vae").mkdir()
    (building / "vae" / "weights").write_text("numbers")
print("\\n".join(call.replace(str(folder), "").replace(f"{{socket.gethostname()}}-{{os.getpid()}}", "PID") for call in calls))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "fsync /file.PID.tmp", "rename /file.PID.tmp", "fsync ",
        "fsync /.model.PID.new/vae/weights", "fsync /.model.PID.new", "fsync /.model.PID.new/vae",
        "rename /.model.PID.new", "fsync ",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a": 1, "a": 2}', ""], ids=["cut off", "deep", "twice", "empty"])
def test_json_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(InputError, match=r"file\.json: not valid JSON"):
        read_json(tmp_path / "file.json")
