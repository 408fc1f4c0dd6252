"""Many writers of one store: whatever their number and order, the store has the bytes of a single writer's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest
from trajectories import gaussian
from trajectories.gaussian import GaussianTeacher, contents, write

from pyard.errors import InputError
from pyard.trajectories import TrajectoryStore, merge_trajectories
from pyard.trajectories.parts import Part

SHARD = "0000000008-0000000016"


def start_writer(out: Path, count: int, delay: float = 0.0, **environment: str) -> subprocess.Popen[bytes]:
    here = Path(gaussian.__file__)
    everything = {**os.environ, "PYTHONPATH": str(here.parents[2]), **environment}
    return subprocess.Popen([sys.executable, here, out, str(count), str(delay), ""], env=everything, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_processes_of_torchrun_share_one_store(tmp_path: Path) -> None:
    write(tmp_path / "one", 50)
    # As torchrun and Accelerate set it.
    processes = [start_writer(tmp_path / "two", 50, 0.01, RANK=str(rank), WORLD_SIZE="2") for rank in (1, 0)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("count", [1, 3, 5])
def test_parts_in_any_order_make_the_same_store(tmp_path: Path, count: int) -> None:
    write(tmp_path / "whole", 50)
    for number in reversed(range(1, count + 1)):
        store = write(tmp_path / "parts", 50, part=f"{number}/{count}")
        write(tmp_path / f"alone {number}", 50, part=f"{number}/{count}")
    assert store.missing() == []
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    alone = [str(tmp_path / f"alone {number}") for number in range(1, count + 1)]
    if count > 1:
        with pytest.raises(InputError, match="50 were requested"):
            TrajectoryStore.open(alone[0]).verify()
    merged = merge_trajectories(alone, tmp_path / "merged", progress=False)
    merged.verify()
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_two_writers_of_one_part_are_refused(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(GaussianTeacher):
        def predict(self, *args):  # type: ignore[no-untyped-def]
            begun.set()
            assert go_on.wait(60)
            return super().predict(*args)

    writer = threading.Thread(target=write, args=(tmp_path, 50, Slow()), kwargs={"part": "2/3"})
    writer.start()
    assert begun.wait(60)
    try:
        with pytest.raises(InputError, match=r"another process is writing this store \(part 2/3\)"):
            write(tmp_path, 50, part="2/3")
        for other in ("2/2", "1/1", None):  # another division would write the same shards
            with pytest.raises(InputError, match=r"another process is writing this store \(part 2/3\)"):
                write(tmp_path, 50, part=other)
        write(tmp_path, 50, part="1/3")
    finally:
        go_on.set()
        writer.join()
    write(tmp_path, 50)
    write(tmp_path / "whole", 50)
    assert contents(tmp_path / "whole").items() <= {k: v for k, v in contents(tmp_path).items() if "whole" not in k}.items()


@pytest.mark.slow
def test_two_processes_on_one_part_end_with_one_error_and_a_whole_store(tmp_path: Path) -> None:
    # Long enough that neither is done before the other has started, however busy the machine is.
    processes = [start_writer(tmp_path / "store", 40, 0.15) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes == [0, 1]
    assert any("another process is writing this store" in error for error in errors)
    write(tmp_path / "alone", 40)
    assert contents(tmp_path / "store") == contents(tmp_path / "alone")


def test_an_abandoned_lock_file_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".locks").mkdir()
    for name in ("1-of-1.lock", "3-of-7.lock", "start.lock"):
        (tmp_path / ".locks" / name).touch()
    assert write(tmp_path).count == 20


def test_a_writer_that_never_gets_to_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyard.trajectories.parts._PATIENCE_SECONDS", 0.05)
    (tmp_path / ".locks").mkdir()
    with filelock.FileLock(tmp_path / ".locks" / "start.lock"), pytest.raises(InputError, match="lock for starting to write"):
        write(tmp_path)


@pytest.mark.parametrize("wrong", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_parts_that_make_no_sense_are_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(InputError, match="expected k/n with k from 1 to n"):
        write(tmp_path / "store", part=wrong)
    assert not (tmp_path / "store").exists()


def test_the_environment_names_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Part.parse(None) == Part(1, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Part.parse(None) == Part(3, 4, same_folder=True)
    assert Part.parse("1/1") == Part(1, 1)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(InputError, match="expected 0 <= RANK < WORLD_SIZE"):
        Part.parse(None)


def halves(tmp_path: Path, **settings: object) -> list[str]:
    for number in (1, 2):
        write(tmp_path / str(number), 20, part=f"{number}/2", **settings)
    return [str(tmp_path / "1"), str(tmp_path / "2")]


def test_merge_resumes_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = halves(tmp_path)
    store = merge_trajectories([first], tmp_path / "out")
    assert (store.count, store.missing()) == (12, [(8, 16)])
    assert "12 trajectories, 8 more were requested" in capsys.readouterr().err
    (tmp_path / "out" / "shards" / f"{SHARD}.safetensors").write_bytes(b"half")  # killed in between
    merge_trajectories([first, second, first], tmp_path / "out", progress=False).verify()


def test_merge_takes_the_longer_of_two_shards_and_can_move(tmp_path: Path) -> None:
    write(tmp_path / "short", 12)
    write(tmp_path / "long", 14)
    write(tmp_path / "whole", 14)
    sources = [str(tmp_path / name) for name in ("long", "short")]
    store = merge_trajectories(sources, tmp_path / "out", move=True, progress=False)
    store.verify()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list((tmp_path / "long" / "shards").iterdir())


def test_merge_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    first, second = halves(tmp_path)
    write(tmp_path / "seed", seed=8)
    with pytest.raises(InputError, match="seed is 7, requested 8"):
        merge_trajectories([first, str(tmp_path / "seed")], tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="both a source and the destination"):
        merge_trajectories([first, second], first, progress=False)
    with pytest.raises(InputError, match="no stores given"):
        merge_trajectories([], tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="not a trajectory store"):
        merge_trajectories([str(tmp_path / "nothing")], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_merge_refuses_broken_and_contradicting_shards(tmp_path: Path) -> None:
    first, second = halves(tmp_path)
    file = Path(second) / "shards" / f"{SHARD}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{SHARD}.safetensors: sha256 is .*, its sidecar says"):
        merge_trajectories([first, second], tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "shards" / file.name).exists()

    class OtherMachine(GaussianTeacher):
        def predict(self, *args):  # type: ignore[no-untyped-def]
            return super().predict(*args) * (1 + 1e-6)

    write(tmp_path / "other", 20, OtherMachine())
    with pytest.raises(InputError, match="with different numbers"):
        merge_trajectories([first, str(tmp_path / "other")], tmp_path / "out", progress=False)
