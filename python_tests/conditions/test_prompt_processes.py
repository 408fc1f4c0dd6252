"""Tables that several processes write, or that are killed while they write: the bytes are those of an undisturbed build."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conditions import toy_encoder
from conditions.toy_encoder import SIZES, ToyEncoder, contents, many_lines

from pyard.conditions import PromptTable
from pyard.errors import InputError

COUNT = 120  # 123 texts with the negative prompts: 16 shards of 2 batches
DISTINCT = 123


def start(folder: Path, delay: float, log: Path) -> subprocess.Popen[str]:
    """A process that builds a table as soon as it is told to `go`; it has imported everything when this returns."""
    here = Path(toy_encoder.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parents[2]), str(here.parents[1])])}
    process = subprocess.Popen(
        [sys.executable, here, folder, str(COUNT), str(delay), log],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def wait_for_shards(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob("shards/*.safetensors"))) < count:
        assert process.poll() is None, "the process ended before it wrote a shard"
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    PromptTable.build(ToyEncoder(), many_lines(COUNT), tmp_path / "undisturbed", **SIZES)
    return contents(tmp_path / "undisturbed")


def kill_and_resume(tmp_path: Path, wanted: dict[str, bytes], kills: int, seed: int) -> None:
    folder, log = tmp_path / "killed", tmp_path / "log"
    draw = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = start(folder, 0.02, log)
        go(process)
        wait_for_shards(folder, len(list(folder.glob("shards/*.safetensors"))) + 1, process)
        time.sleep(draw.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # it was faster, on a busy machine
            break
        killed += 1
        with pytest.raises(InputError, match=r"conditions\.json: missing"):
            PromptTable(folder)
        for path in folder.glob("shards/*.safetensors"):  # what is under its name is whole
            assert path.read_bytes() == wanted[f"shards/{path.name}"]
    assert killed
    encoder = ToyEncoder(log=log)
    PromptTable.build(encoder, many_lines(COUNT), folder, **SIZES)
    assert len(encoder.encoded) < DISTINCT
    assert contents(folder) == wanted
    # A kill loses the shard that was being written, and no more.
    assert DISTINCT <= len(log.read_text().splitlines()) <= DISTINCT + killed * SIZES["shard_size"]


def test_kill_minus_nine_loses_at_most_the_shard_that_was_written(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    kill_and_resume(tmp_path, undisturbed, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_kills_leave_no_trace(tmp_path: Path, undisturbed: dict[str, bytes], seed: int) -> None:
    kill_and_resume(tmp_path, undisturbed, kills=4, seed=seed + 1)


def test_of_two_processes_one_encodes_and_one_waits(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    folder, log = tmp_path / "both", tmp_path / "log"
    processes = [start(folder, 0.01, log) for _ in range(2)]
    for process in processes:
        go(process)
    for process in processes:
        finish(process)
    assert contents(folder) == undisturbed
    assert sorted(log.read_text().splitlines()) == sorted(PromptTable(folder).texts)  # each text once, by one of them


def test_a_killed_process_is_succeeded_by_the_one_that_waits(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    folder, log = tmp_path / "both", tmp_path / "log"
    first, second = start(folder, 0.1, log), start(folder, 0.0, log)
    go(first)
    wait_for_shards(folder, 1, first)
    go(second)
    wait_for_shards(folder, 3, first)  # which the second would have done long ago, were it not waiting
    assert second.poll() is None
    assert len(list(folder.glob("shards/*.safetensors"))) == 3
    first.send_signal(signal.SIGKILL)
    first.communicate()
    finish(second)
    assert contents(folder) == undisturbed
    assert len(log.read_text().splitlines()) <= DISTINCT + SIZES["shard_size"]


@pytest.mark.parametrize("left", ["prompts.jsonl", "building.json", "shards", "index.safetensors", "conditions.json"])
def test_the_same_call_goes_on_from_every_file_that_a_kill_can_leave_last(
    tmp_path: Path, undisturbed: dict[str, bytes], left: str
) -> None:
    """The files appear in a known order: a kill leaves a beginning of it, and a temporary file of the next."""
    building = {"building.json": b""}
    encoder = ToyEncoder()
    half = tmp_path / "half"

    class Stopped(ToyEncoder):
        def encode(self, texts: object) -> list:  # type: ignore[override]
            building["building.json"] = (half / "building.json").read_bytes()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PromptTable.build(Stopped(), many_lines(COUNT), half, **SIZES)
    shards = sorted(name for name in undisturbed if name.startswith("shards"))
    order = ["prompts.jsonl", "building.json", *shards, "index.safetensors", "conditions.json"]
    last = order.index(shards[2] if left == "shards" else left)
    folder = tmp_path / "left"
    (folder / "shards").mkdir(parents=True)
    for name in order[: last + 1]:
        (folder / name).write_bytes({**undisturbed, **building}[name])
    for name in order[last + 1 : last + 2]:
        (folder / f"{name}.{socket.gethostname()}-99999999.tmp").write_bytes(undisturbed.get(name, b"half")[:40])
    table = PromptTable.build(encoder, many_lines(COUNT), folder, **SIZES)
    table.verify()
    assert contents(folder) == undisturbed
    written = sum(name.startswith("shards") for name in order[: last + 1])
    assert len(encoder.encoded) == max(0, DISTINCT - written * SIZES["shard_size"])
