"""Damaged checkpoints, second trainers, lost signals: a run goes on from what is whole, or says in one line why not."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import teacher_and_store, train_in

from pyard.errors import InputError
from pyard.storage.checkpoints import Checkpoints
from pyard.storage.lock import only_one
from pyard.training.processes import Preempted
from pyard.training.regression import Regression

# Takes the lock and is killed.
HOLDER = """
import os, sys
from pathlib import Path
from pyard.storage.lock import only_one
with only_one(Path(sys.argv[1]), "training"):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    teacher_and_store(tmp_path)
    return tmp_path


@pytest.mark.parametrize("damage", ["cut off", "a flipped bit", "another step's", "state"])
def test_of_a_damaged_checkpoint_the_one_before_is_used(folder, damage):
    out = train_in(folder, "run")
    before, newest = (out / "checkpoints" / f"step-{step:07d}" for step in (8, 12))
    student = (out / "student" / "model.safetensors").read_bytes()
    file = newest / ("state.json" if damage == "state" else "optimizer.pt")
    content = bytearray(file.read_bytes())
    if damage == "state":
        content = file.read_bytes().replace(b'"batch": ', b'"batch": 1')
        assert content != file.read_bytes()
    elif damage == "cut off":
        content = content[:100]
    elif damage == "a flipped bit":
        content[len(content) // 2] ^= 1
    else:
        content = (before / "optimizer.pt").read_bytes()
    file.write_bytes(content)
    wanted = "changed after it was written" if damage == "state" else "optimizer.pt is not the file that was written"
    with pytest.warns(UserWarning, match=f"step-0000012 is damaged .*{wanted}.*: it was renamed to damaged-step-0000012"):
        train_in(folder, "run")
    assert (out / "student" / "model.safetensors").read_bytes() == student
    for checkpoint in (before, newest):
        (checkpoint / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"step-0000012 is damaged .*no earlier one is intact"):
        train_in(folder, "run")


def test_a_second_trainer_in_a_folder_is_refused(folder):
    with (
        only_one(folder / "run", "training"),
        pytest.raises(InputError, match=rf"is in use by process {os.getpid()} on {re.escape(socket.gethostname())} since 20"),
    ):
        train_in(folder, "run")
    # A holder that was killed does not count.
    subprocess.run([sys.executable, "-c", HOLDER, folder / "run"], check=False)
    assert (folder / "run" / ".locks" / "training.json").exists()
    train_in(folder, "run")


def test_a_signal_that_was_lost_before_the_first_update_ends_the_run(folder, monkeypatch):
    """Raised in a destructor, the exception of a handler is dropped."""

    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    made = Regression.__init__

    def interrupted(self, *args):
        made(self, *args)
        Dropped()

    monkeypatch.setattr(Regression, "__init__", interrupted)
    monkeypatch.setattr(sys, "unraisablehook", lambda about: None)
    with pytest.raises(Preempted) as ended:
        train_in(folder, "run")
    assert ended.value.code == 75
    assert Checkpoints(folder / "run" / "checkpoints").steps() == []
    monkeypatch.undo()
    train_in(folder, "run")


def test_a_store_that_lacks_trajectories_begins_no_run(folder):
    """Its settings would say how many there are, and go on with as many when the store is whole again."""
    sidecar = max((folder / "store" / "shards").glob("*.json"))
    content = sidecar.read_bytes()
    sidecar.write_bytes(content[:10])
    with pytest.raises(InputError, match="40 were requested, 20 are stored"):
        train_in(folder, "run")
    assert not (folder / "run" / "train.json").exists()
    sidecar.write_bytes(content)
    train_in(folder, "run")
    assert json.loads((folder / "run" / "train.json").read_text())["manifest"]["count"] == 40
