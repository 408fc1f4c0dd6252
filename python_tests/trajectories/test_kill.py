"""kill -9 at random moments and disks that fill up: what is left is resumed to the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from covering import repetitions, with_products
from trajectories import gaussian
from trajectories.gaussian import GaussianTeacher, contents, write

from pyard.errors import InputError
from pyard.trajectories import TrajectoryReader, TrajectoryStore, merge_trajectories

LOG = Path(__file__).parents[2] / "benchmarks" / "results" / "kill-trajectories.log"


def start_writer(out: Path, count: int, delay: float, part: str = "") -> subprocess.Popen[bytes]:
    here = Path(gaussian.__file__)
    environment = {**os.environ, "PYTHONPATH": str(here.parents[2])}
    return subprocess.Popen([sys.executable, here, out, str(count), str(delay), part], env=environment)


def kill_while_writing(out: Path, count: int, delay: float, seed: int, parts: tuple[str, ...] = ("",)) -> int:
    """Start writers in processes of their own and kill -9 all of them at a random moment after the next shard.

    Returns:
        How many processes were killed; one that had already ended does not count.
    """
    processes = [start_writer(out, count, delay, part) for part in parts]
    done = len(list(out.glob("shards/*.json")))
    deadline = time.monotonic() + 120
    while len(list(out.glob("shards/*.json"))) <= done:
        assert any(process.poll() is None for process in processes), "the writers ended before they wrote a shard"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0, 8 * delay))
    for process in processes:
        process.send_signal(signal.SIGKILL)
    return sum(process.wait() == -signal.SIGKILL for process in processes)


@pytest.mark.slow
def test_kill_minus_nine_leaves_no_trace(tmp_path: Path) -> None:
    write(tmp_path / "undisturbed", 100)
    for attempt in range(3):
        assert kill_while_writing(tmp_path / "killed", 100, delay=0.01, seed=attempt) == 1
        store = TrajectoryStore.open(tmp_path / "killed")
        assert store.count < 100
        assert store.problems == ()
        if attempt == 0:
            with pytest.raises(InputError, match=f"100 were requested, {store.count} are stored"):
                store.verify()
    write(tmp_path / "killed", 100)
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("parts", [pytest.param(("",), marks=with_products), ("1/2", "2/2")], ids=["one writer", "two writers"])
def test_many_kills_leave_no_trace(tmp_path: Path, parts: tuple[str, ...]) -> None:
    log, kills, stores, attempts = [], 0, 0, 0
    write(tmp_path / "undisturbed", 200)
    wanted = contents(tmp_path / "undisturbed")
    while kills < repetitions(30, in_ci=12) * len(parts):
        attempts += 1
        killed = kill_while_writing(tmp_path / "killed", 200, delay=0.004, seed=attempts, parts=parts)
        kills += killed
        store = TrajectoryStore.open(tmp_path / "killed")
        leftovers = [file.name for file in (tmp_path / "killed").rglob("*") if file.suffix == ".tmp"]
        log.append(
            f"attempt {attempts:3}: killed {killed}, {store.count:3} of 200 trajectories, left behind: {leftovers or 'nothing'}"
        )
        for shard in store.shards:  # whatever claims to be whole is
            name = f"shards/{shard.name}.safetensors"
            assert (tmp_path / "killed" / name).read_bytes() == wanted[name]
        if store.count >= 160 or attempts % 7 == 0:
            write(tmp_path / "killed", 200)
            assert contents(tmp_path / "killed") == wanted
            log.append(f"store {stores}: resumed to the bytes of an undisturbed run after {attempts} attempts")
            shutil.rmtree(tmp_path / "killed")
            stores += 1
    log.append(
        f"{' and '.join(parts) or 'one writer'}: {kills} processes killed by SIGKILL, {stores} stores resumed byte for byte"
    )
    LOG.parent.mkdir(parents=True, exist_ok=True)
    before = LOG.read_text() if LOG.exists() and parts != ("",) else ""
    LOG.write_text(before + "\n".join(log) + "\n")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs Linux and root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def pretend_disk_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program fills the disk after the check for space, which here it is told to pass."""
    for module in ("generate", "authors_files", "merge"):
        monkeypatch.setattr(f"pyard.trajectories.{module}.require_room", lambda *args: None)


SIZES: dict = dict(batch_size=32, shard_size=256)  # shards of 116 KB


def test_a_disk_that_fills_up_in_mid_shard_is_an_error_and_a_clean_resume(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="free some"):
        write(small_disk / "store", 4000, **SIZES)
    pretend_disk_is_large(monkeypatch)
    with pytest.raises(InputError, match=r"cannot be written \(the disk is full: .*free\); the previous contents are kept"):
        write(small_disk / "store", 4000, **SIZES)
    store = TrajectoryStore.open(small_disk / "store")
    assert 0 < store.count < 4000
    assert store.problems == ()
    assert not list(small_disk.rglob("*.tmp"))
    with pytest.raises(InputError, match="4000 were requested"):
        TrajectoryReader(store, 8, target="state")
    # Room was made: here on a larger disk.
    shutil.copytree(small_disk / "store", tmp_path / "store")
    teacher = GaussianTeacher()
    write(tmp_path / "store", 4000, teacher, cfg_scale=1.5, **SIZES)
    assert teacher.samples_computed == 2 * 6 * (4000 - store.count)  # nothing twice
    write(tmp_path / "undisturbed", 4000, **SIZES)
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_a_disk_that_fills_up_while_merging_is_an_error_and_a_clean_resume(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "large", 4000, **SIZES)
    with pytest.raises(InputError, match=r"merge: 16 shards: .* needed, .* free in"):
        merge_trajectories([str(tmp_path / "large")], small_disk / "store", progress=False)
    pretend_disk_is_large(monkeypatch)
    with pytest.raises(InputError, match=r"cannot be written \(the disk is full: "):
        merge_trajectories([str(tmp_path / "large")], small_disk / "store", progress=False)
    store = TrajectoryStore.open(small_disk / "store")
    assert 0 < store.count < 4000
    assert store.problems == ()
    assert not list(small_disk.rglob("*.tmp"))
