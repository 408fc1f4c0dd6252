"""Several stores read as one: a store for each sample shape, and every batch from one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyard.diffusion.noise import epoch_order
from pyard.errors import InputError
from pyard.trajectories.batch import TrajectoryBatch
from pyard.trajectories.reader import TrajectoryReader
from pyard.trajectories.store import TrajectoryStore

# What decides what a student learns, and not only which samples it sees.
_SHARED = ("teacher_fingerprint", "solver", "schedule", "cfg_scale", "cfg_channels", "cfg_interval", "precision",
           "num_classes", "conditions")  # fmt: skip
# Of their grids; the times may depend on the size, as those of some text-to-image pipelines do.
_SHARED_OF_GRIDS = ("num_steps", "teacher_steps", "state_index", "denoised_index")


class BatchReader(Protocol):
    """What training reads: one store, or buckets."""

    @property
    def batch_size(self) -> int: ...

    def __next__(self) -> TrajectoryBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BucketReader:
    """Batches of several readers for ever, each batch from one of them.

    An epoch is one epoch of each reader, so batches come from each store in proportion to its full batches. Which reader comes
    next is a function of (seed, epoch): a permutation of all batches, the same on every rank.

    Args:
        readers: of one rank each, with equal batch sizes.
        seed: of the order of the stores, 0 to 2**64 - 1.

    Raises:
        InputError: no readers, or readers of different batch sizes.
    """

    def __init__(self, readers: Sequence[TrajectoryReader], seed: int = 0):
        sizes = {(reader.batch_size, reader.rank, reader.world_size) for reader in readers}
        if len(sizes) != 1:
            raise InputError(f"buckets: readers of (batch_size, rank, world_size) {sorted(sizes)}; expected one and the same")
        self.readers, self.seed = list(readers), seed
        self.batch_size = self.readers[0].batch_size
        self._epoch = self._batch = 0
        self._order, self._order_epoch = self._order_of(0), 0

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each rank gets from an epoch of all stores."""
        return sum(reader.batches_per_epoch for reader in self.readers)

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        return self

    def __next__(self) -> TrajectoryBatch:
        if self._batch == self.batches_per_epoch:
            self._epoch, self._batch = self._epoch + 1, 0
        if self._epoch != self._order_epoch:
            self._order, self._order_epoch = self._order_of(self._epoch), self._epoch
        batch = next(self.readers[self._order[self._batch]])
        self._batch += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from; the same on every rank, JSON-able."""
        states = [reader.state_dict() for reader in self.readers]
        return {"seed": self.seed, "epoch": self._epoch, "batch": self._batch, "readers": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was taken.

        Raises:
            InputError: the state is of other stores, or of the same ones in another order.
        """
        states, epoch, batch = (state.get(name) for name in ("readers", "epoch", "batch"))
        if not isinstance(states, list) or len(states) != len(self.readers) or state.get("seed") != self.seed:
            found = len(states) if isinstance(states, list) else "no"
            raise InputError(
                f"buckets: cannot resume at the exact sample: {len(self.readers)} stores with seed {self.seed}, was {found} "
                f"with seed {state.get('seed')}. Resume with the same settings and stores, or start over"
            )
        if type(epoch) is not int or type(batch) is not int or epoch < 0 or not 0 <= batch <= self.batches_per_epoch:
            raise InputError(
                f"buckets: epoch {epoch!r}, batch {batch!r}; expected an epoch from 0 on and a batch of 0 to "
                f"{self.batches_per_epoch}"
            )
        for reader, theirs in zip(self.readers, states, strict=True):
            reader.load_state_dict(theirs)
        self._epoch, self._batch = epoch, batch

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        """The number of the reader of each batch of an epoch."""
        ends = np.cumsum([reader.batches_per_epoch for reader in self.readers])
        return np.searchsorted(ends, epoch_order(self.batches_per_epoch, self.seed, epoch), side="right")


def check_buckets(stores: Sequence[TrajectoryStore]) -> None:
    """Raises InputError unless the stores differ in sample shape, and in nothing that decides what is learnt from them."""
    first = stores[0]
    for i, store in enumerate(stores[1:], start=1):
        mine, theirs = (s.manifest for s in (first, store))
        places = [(name, mine, theirs) for name in _SHARED] + [(name, mine.grid, theirs.grid) for name in _SHARED_OF_GRIDS]
        differing = [
            f"{name} is {getattr(one, name)} in one, {getattr(other, name)} in the other"
            for name, one, other in places
            if getattr(one, name) != getattr(other, name)
        ]
        if differing:
            raise InputError(f"trajectories {first.path} and {store.path} do not belong together: {'; '.join(differing)}")
        same = next((s for s in stores[:i] if s.manifest.sample_shape == theirs.sample_shape), None)
        if same is not None:
            raise InputError(
                f"trajectories {same.path} and {store.path} have one sample shape, {theirs.sample_shape}; expected a store for "
                "each shape: a larger count of one seed makes a store larger"
            )
