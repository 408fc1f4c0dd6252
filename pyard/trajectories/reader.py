"""The reader: shuffled batches of a store for ever, epoch after epoch, that resume at the exact sample."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyard.errors import InputError
from pyard.time_grid import Target
from pyard.trajectories.store import TrajectoryStore

# Philox stream of the shuffling; noise and labels have 0 and 1 (noise.py).
_ORDER_STREAM = 2
# Each mapped shard holds a file descriptor, of which a process often has 1024.
_MAX_MAPPED_SHARDS = 256


@dataclass(frozen=True)
class TrajectoryBatch:
    """What a student learns from in one step.

    Args:
        history: its S inputs, x_T first, float32 [B, S, C, H, W].
        target: its S outputs, x_0 last, float32 [B, S, C, H, W].
        condition: class labels, int64 [B].
    """

    history: torch.Tensor
    target: torch.Tensor
    condition: torch.Tensor

    def __post_init__(self) -> None:
        if self.history.ndim != 5 or self.target.shape != self.history.shape or self.condition.shape != self.history.shape[:1]:
            raise InputError(
                f"{self}: expected history and target of one shape [B, S, C, H, W] and condition [B]; "
                "one of them was built from other samples"
            )
        if not (self.history.is_floating_point() and self.target.dtype == self.history.dtype):
            raise InputError(f"{self}: expected history and target in one floating-point dtype")
        if self.condition.dtype != torch.int64:
            raise InputError(f"{self}: expected condition to be int64 class labels")

    def __len__(self) -> int:
        return len(self.condition)

    def __repr__(self) -> str:
        names = ("history", "target", "condition")
        tensors = ((name, getattr(self, name)) for name in names)
        described = (f"{name}={str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for name, tensor in tensors)
        return f"TrajectoryBatch({', '.join(described)})"

    def to(self, device: torch.device | str) -> TrajectoryBatch:
        """The batch on another device; the copy does not wait where the memory is pinned."""
        return TrajectoryBatch(*(t.to(device, non_blocking=True) for t in (self.history, self.target, self.condition)))


class TrajectoryReader:
    """Iterates shuffled `TrajectoryBatch`es for ever.

    An epoch visits every trajectory at most once: all ranks together take consecutive slices of world_size * batch_size
    from one permutation, which is a function of (seed, epoch); a last slice that is not full is dropped.

    Args:
        store: a complete store, or its folder.
        batch_size: B, trajectories in a batch of this rank.
        target: `denoised` (history [noise, denoised[:-1]], target denoised) or `state` (the same with states).
        seed: of the order, 0 to 2**64 - 1.
        rank: which of world_size readers this is.
        world_size: how many readers share an epoch.

    Raises:
        InputError: a store that is not complete, does not keep `target`, or is smaller than one batch of all ranks.
    """

    def __init__(
        self,
        store: TrajectoryStore | str,
        batch_size: int,
        *,
        target: Target,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.store = store if isinstance(store, TrajectoryStore) else TrajectoryStore.open(store)
        self.store.manifest.require_target(target, str(self.store.path))
        self.store.require_complete()
        if batch_size < 1 or not 0 <= rank < world_size:
            raise InputError(
                f"reader: batch_size {batch_size}, rank {rank} of {world_size}; expected a batch_size from 1 on and a "
                "rank of 0 to world_size - 1"
            )
        if not 0 <= seed < 2**64:
            raise InputError(f"reader: seed is {seed}; expected 0 to 2**64 - 1")
        if self.store.count < batch_size * world_size:
            raise InputError(
                f"trajectories {self.store.path}: {self.store.count} trajectories are fewer than one batch of "
                f"{batch_size} on {world_size} ranks; use a smaller batch_size or generate more"
            )
        self.batch_size, self.target, self.seed, self.rank, self.world_size = batch_size, target, seed, rank, world_size
        self._epoch = 0
        self._batch = 0  # batches of this epoch that were handed out
        self._order = epoch_order(self.store.count, seed, epoch=0)
        self._mapped = functools.lru_cache(maxsize=_MAX_MAPPED_SHARDS)(self._map)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each rank gets from an epoch."""
        return self.store.count // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        return self

    def __next__(self) -> TrajectoryBatch:
        if self._batch == self.batches_per_epoch:
            self._seek(self._epoch + 1, 0)
        start = (self._batch * self.world_size + self.rank) * self.batch_size
        batch = self.gather(self._order[start : start + self.batch_size])
        self._batch += 1
        return batch

    def gather(self, indices: NDArray[np.int64]) -> TrajectoryBatch:
        """The batch of the given samples, in that order."""
        manifest = self.store.manifest
        noise = torch.empty(len(indices), *manifest.sample_shape)
        target = torch.empty(len(indices), manifest.grid.num_steps, *manifest.sample_shape)
        condition = torch.empty(len(indices), dtype=torch.int64)
        shard_of = indices // manifest.shard_size
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            rows = indices[places] - shard * manifest.shard_size
            arrays = self._mapped(int(shard))
            to = torch.from_numpy(places)
            noise[to] = torch.from_numpy(arrays["noise"][rows])
            target[to] = as_float32(arrays[self.target][rows])
            condition[to] = torch.from_numpy(arrays["label"][rows])
        history = torch.cat([noise[:, None], target[:, :-1]], dim=1)
        return TrajectoryBatch(history, target, condition)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from; the same on every rank, JSON-able."""
        return {"epoch": self._epoch, "batch": self._batch, **self._order_settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was taken.

        Raises:
            InputError: the state is of a reader that visits other samples, or the same ones in another order.
        """
        mine = self._order_settings()
        theirs = {name: state.get(name) for name in mine}
        if mine != theirs:
            differences = [f"{name} is {mine[name]}, was {theirs[name]}" for name in mine if mine[name] != theirs[name]]
            raise InputError(
                f"reader: cannot resume at the exact sample: {'; '.join(differences)}. Resume with the same settings "
                "and store, or start anew"
            )
        epoch, batch = state.get("epoch"), state.get("batch")
        if type(epoch) is not int or type(batch) is not int or epoch < 0 or not 0 <= batch <= self.batches_per_epoch:
            raise InputError(
                f"reader: epoch {epoch!r}, batch {batch!r}; expected an epoch from 0 on and a batch of 0 to "
                f"{self.batches_per_epoch}"
            )
        self._seek(epoch, batch)

    def _seek(self, epoch: int, batch: int) -> None:
        if epoch != self._epoch:
            self._order = epoch_order(self.store.count, self.seed, epoch)
        self._epoch, self._batch = epoch, batch

    def _order_settings(self) -> dict[str, Any]:
        # Ranks may change as long as all of them together take the same samples in a step.
        return {
            "seed": self.seed,
            "count": self.store.count,
            "global_batch_size": self.batch_size * self.world_size,
            "manifest": self.store.manifest.digest,
        }

    def _map(self, shard: int) -> dict[str, NDArray[Any]]:
        return self.store.tensors(self.store.shards[shard])


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of 0 ... count - 1 that is the same on every machine and with every numpy.

    numpy keeps the raw stream of Philox, not what `Generator.permutation` makes of it; hence the order of raw numbers,
    ties (one in 2**64 per pair) by index.
    """
    key, counter = np.array([seed, epoch], dtype=np.uint64), np.array([0, 0, 0, _ORDER_STREAM], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(count), kind="stable").astype(np.int64)


def as_float32(array: NDArray[Any]) -> torch.Tensor:
    """float32, from float32, float16 or the bits of bfloat16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(array).float()
