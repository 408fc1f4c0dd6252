"""The reader: every trajectory once in an epoch, in an order that nothing but its settings decides."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from trajectories.gaussian import GaussianTeacher, write
from trajectories.native import require_native

from pyard.diffusion.noise import epoch_order
from pyard.errors import InputError
from pyard.trajectories import TrajectoryBatch, TrajectoryReader, TrajectoryStore

# numpy.random.Philox(key=[0, 0], counter=[0, 0, 0, 2]).random_raw(12), sorted.
GOLDEN_ORDER = [6, 7, 9, 10, 5, 1, 4, 8, 11, 3, 0, 2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    """21 trajectories in shards of 8, 8 and 5."""
    return write(tmp_path_factory.mktemp("store"), 21)


def load(store: TrajectoryStore) -> dict[str, torch.Tensor]:
    shards = [safetensors.torch.load_file(store.path / "shards" / f"{shard.name}.safetensors") for shard in store.shards]
    return {name: torch.cat([shard[name] for shard in shards]).float() for name in shards[0]}


def samples_of(reader: TrajectoryReader, batches: int) -> list[list[int]]:
    """Which samples each of the next batches holds, told by their noise."""
    noise = load(reader.store)["noise"]
    number = {row.numpy().tobytes(): i for i, row in enumerate(noise)}
    return [[number[row.numpy().tobytes()] for row in batch.history[:, 0]] for batch in itertools.islice(reader, batches)]


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["state", "denoised"])
def test_batches_are_rows_of_the_store(tmp_path: Path, target: Any, dtype: Any) -> None:
    store = write(tmp_path, 21, dtype=dtype)
    tensors = load(store)
    reader = TrajectoryReader(store, 10, target=target)
    batch = next(reader)
    rows = epoch_order(21, seed=0, epoch=0)[:10]
    assert torch.equal(batch.target, tensors[target][rows])
    assert torch.equal(batch.history[:, 0], tensors["noise"][rows])
    assert torch.equal(batch.history[:, 1:], tensors[target][rows][:, :-1])
    assert torch.equal(batch.condition["label"], tensors["label"][rows].long())
    assert batch.history.dtype == batch.target.dtype == torch.float32
    assert repr(batch) == ("TrajectoryBatch(history=float32[10, 3, 1, 4, 4], target=float32[10, 3, 1, 4, 4], label=int64[10])")


def test_one_step_store_has_the_noise_as_its_history(tmp_path: Path) -> None:
    store = write(tmp_path, 8, num_steps=1)
    batch = next(TrajectoryReader(store, 8, target="denoised"))
    assert batch.history.shape == batch.target.shape == (8, 1, 1, 4, 4)


def test_an_epoch_visits_each_trajectory_once_and_epochs_differ(store: TrajectoryStore) -> None:
    reader = TrajectoryReader(store, 7, target="state", seed=3)
    epochs = [flat(samples_of(reader, 3)) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(21))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert flat(samples_of(TrajectoryReader(store, 7, target="state", seed=4), 3)) != epochs[0]
    assert flat(samples_of(TrajectoryReader(store, 7, target="denoised", seed=3), 3)) == epochs[0]


def test_the_last_partial_batch_is_dropped(store: TrajectoryStore) -> None:
    reader = TrajectoryReader(store, 8, target="state")
    assert reader.batches_per_epoch == 2
    assert [len(batch) for batch in itertools.islice(reader, 5)] == [8] * 5
    assert reader.state_dict()["epoch"] == 2


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 5), (3, 3), (5, 2)])
def test_ranks_partition_the_epoch(store: TrajectoryStore, world_size: int, batch_size: int) -> None:
    per_epoch = 21 // (world_size * batch_size)
    ranks = [
        samples_of(TrajectoryReader(store, batch_size, target="state", seed=3, rank=r, world_size=world_size), per_epoch)
        for r in range(world_size)
    ]
    steps = [flat(batches) for batches in zip(*ranks, strict=True)]
    # Any number of ranks that share a step takes the same samples in it as one rank with the whole batch.
    assert steps == samples_of(TrajectoryReader(store, batch_size * world_size, target="state", seed=3), per_epoch)
    seen = flat(steps)
    assert len(seen) == len(set(seen)) == per_epoch * world_size * batch_size


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 7])
def test_resume_at_the_exact_sample(store: TrajectoryStore, taken: int) -> None:
    reader = TrajectoryReader(store, 5, target="state", seed=9, rank=1, world_size=1 + 1)
    samples_of(reader, taken)
    state = json.loads(json.dumps(reader.state_dict()))
    ahead = samples_of(reader, 9)
    resumed = TrajectoryReader(store, 5, target="state", seed=9, rank=1, world_size=2)
    samples_of(resumed, 2)
    resumed.load_state_dict(state)
    assert samples_of(resumed, 9) == ahead


def test_resume_on_other_ranks_if_the_step_holds_the_same_samples(store: TrajectoryStore) -> None:
    reader = TrajectoryReader(store, 4, target="state", seed=9)
    samples_of(reader, 7)
    state = reader.state_dict()
    ahead = samples_of(reader, 6)
    ranks = [TrajectoryReader(store, 2, target="state", seed=9, rank=r, world_size=2) for r in (0, 1)]
    for rank in ranks:
        rank.load_state_dict(state)
    pieces = [samples_of(rank, 6) for rank in ranks]
    assert [a + b for a, b in zip(*pieces, strict=True)] == ahead


def test_resume_of_another_reader_is_refused(store: TrajectoryStore, tmp_path: Path) -> None:
    state = TrajectoryReader(store, 5, target="state", seed=9).state_dict()
    with pytest.raises(InputError, match="seed is 8, was 9"):
        TrajectoryReader(store, 5, target="state", seed=8).load_state_dict(state)
    with pytest.raises(InputError, match="global_batch_size is 10, was 5"):
        TrajectoryReader(store, 5, target="state", seed=9, rank=0, world_size=2).load_state_dict(state)
    larger = write(tmp_path, 22)
    with pytest.raises(InputError, match="count is 22, was 21"):
        TrajectoryReader(larger, 5, target="state", seed=9).load_state_dict(state)
    reader = TrajectoryReader(store, 5, target="state", seed=9)
    for broken in ({"batch": 5}, {"batch": -1}, {"epoch": -1}, {"epoch": None}, {"batch": 1.0}):
        with pytest.raises(InputError, match="expected an epoch from 0 on and a batch of 0 to 4"):
            reader.load_state_dict({**state, **broken})


def test_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(12, seed=0, epoch=0).tolist() == GOLDEN_ORDER
    assert epoch_order(12, seed=0, epoch=1).tolist() != GOLDEN_ORDER
    assert epoch_order(12, seed=1, epoch=0).tolist() != GOLDEN_ORDER
    assert sorted(epoch_order(1000, seed=2**64 - 1, epoch=5).tolist()) == list(range(1000))


def test_a_store_without_the_target_is_refused(tmp_path: Path) -> None:
    store = write(tmp_path, keep="state")
    with pytest.raises(InputError, match=r"target='denoised' needs a store that keeps it, but this one only keeps 'state'"):
        TrajectoryReader(store, 4, target="denoised")
    with pytest.raises(InputError, match="target is 'velocity'"):
        TrajectoryReader(store, 4, target="velocity")  # type: ignore[arg-type]
    assert len(next(TrajectoryReader(store, 4, target="state"))) == 4


def test_settings_that_make_no_sense_are_refused(store: TrajectoryStore) -> None:
    with pytest.raises(InputError, match="21 trajectories are fewer than one batch of 11 on 2 ranks"):
        TrajectoryReader(store, 11, target="state", world_size=2)
    for wrong in ({"rank": 2, "world_size": 2}, {"rank": -1}, {"batch_size": 0}):
        with pytest.raises(InputError, match="expected a batch_size from 1 on and a rank of 0 to world_size - 1"):
            TrajectoryReader(store, **{"batch_size": 4, "target": "state", **wrong})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed is -1"):
        TrajectoryReader(store, 4, target="state", seed=-1)


def test_more_shards_than_are_kept_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyard.trajectories.gather._MAX_MAPPED_SHARDS", 2)
    teacher = GaussianTeacher(shape=(1, 2, 2))
    store = write(tmp_path, 40, teacher, batch_size=4, shard_size=4)
    reader = TrajectoryReader(store, 20, target="state")
    assert sorted(flat(samples_of(reader, 2))) == list(range(40))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(2, 3, 1, 4, 5)}, r"target=float32\[2, 3, 1, 4, 5\]"),
        ({"history": torch.zeros(2, 3, 16)}, r"history=float32\[2, 3, 16\]"),
        ({"condition": torch.zeros(3, dtype=torch.int64)}, r"label=int64\[3\]"),
        ({"condition": torch.zeros(2)}, "expected class labels to be int64"),
        ({"target": torch.zeros(2, 3, 1, 4, 4, dtype=torch.float64)}, "one floating-point dtype"),
    ],
)
def test_a_batch_checks_itself_and_prints_shapes(change: dict[str, torch.Tensor], message: str) -> None:
    good = {
        "history": torch.zeros(2, 3, 1, 4, 4),
        "target": torch.zeros(2, 3, 1, 4, 4),
        "condition": torch.zeros(2, dtype=torch.int64),
    }
    TrajectoryBatch(**good)
    with pytest.raises(InputError, match=message):
        TrajectoryBatch(**{**good, **change})


def test_a_gathered_batch_owns_its_memory(store: TrajectoryStore) -> None:
    reader = TrajectoryReader(store, 4, target="state")
    batch = reader.gather(np.array([3, 20, 3, 8]))
    batch.target.zero_()
    again = reader.gather(np.array([3]))
    assert float(again.target.abs().min()) > 0


@pytest.mark.parametrize("backend", ["native", "python"])
def test_a_part_of_a_store_is_read_as_a_store_of_that_size(backend: Any, tmp_path: Path) -> None:
    small, large = write(tmp_path / "small", 8), write(tmp_path / "large", 21)
    part = TrajectoryReader(large, 3, target="state", seed=5, backend=backend, count=8)
    for ours, theirs in zip(itertools.islice(part, 7), TrajectoryReader(small, 3, target="state", seed=5), strict=False):
        assert torch.equal(ours.history, theirs.history)
        assert torch.equal(ours.condition["label"], theirs.condition["label"])
    with pytest.raises(InputError, match="count is 22; expected 1 to 21"):
        TrajectoryReader(large, 3, target="state", count=22)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_threads_that_cannot_be_started_are_an_error(store: TrajectoryStore) -> None:
    require_native()
    code = f"""
import resource
from pyard.trajectories import TrajectoryReader, TrajectoryStore
store = TrajectoryStore.open({str(store.path)!r})
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
TrajectoryReader(store, 4, target="state", backend="native", num_threads=5000)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 1  # not aborted
    assert "of 5000 reader threads could be started" in finished.stderr


@pytest.mark.parametrize("backend", ["python", "auto"])
def test_numbers_of_no_sample_are_refused(backend: Any, tmp_path: Path) -> None:
    reader = TrajectoryReader(write(tmp_path / "s", 8), 4, target="state", backend=backend)
    wrong: list[tuple[list[Any], str]] = [([-1], "sample -1; expected 0 to 7"), ([0, 8], "sample 8"), ([0.5], "whole numbers")]
    for numbers, message in wrong:
        with pytest.raises(InputError, match=message):
            reader.gather(np.array(numbers))
    assert len(reader.gather(np.array([], dtype=np.int64)).condition["label"]) == 0


@pytest.mark.parametrize("backend", ["python", "auto"])
def test_a_reader_goes_on_when_its_store_is_extended(backend: Any, tmp_path: Path) -> None:
    store = write(tmp_path / "s", 12)
    reader = TrajectoryReader(store, 4, target="state", backend=backend)
    before = TrajectoryReader(store, 4, target="state", backend="python").gather(np.arange(12))
    write(tmp_path / "s", 40)
    after = reader.gather(np.arange(12))
    assert torch.equal(after.history, before.history)
    assert torch.equal(after.condition["label"], before.condition["label"])
