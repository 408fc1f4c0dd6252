"""The reader: an endless stream of shuffled batches from a store, which resumes at the exact sample."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from pyard.diffusion.noise import epoch_order
from pyard.diffusion.time_grid import Target
from pyard.errors import InputError
from pyard.storage.typed import checked
from pyard.trajectories.batch import TrajectoryBatch
from pyard.trajectories.gather import Backend, BatchDType, Gather, NativeGather, PythonGather, ResidentGather, native_module
from pyard.trajectories.store import TrajectoryStore


class TrajectoryReader:
    """An endless iterator over shuffled `TrajectoryBatch`es.

    An epoch visits every trajectory at most once. The ranks together take consecutive slices of world_size * batch_size
    samples from a permutation that depends only on (seed, epoch). All backends give the same batches.

    Example:
        reader = TrajectoryReader("trajectories/digits", 64, target="denoised")
        student(batch.history, batch.condition)  # with batch = next(reader)

    Args:
        store: a complete store, or its folder.
        batch_size: B, the number of trajectories in this rank's batch.
        target: `denoised` (history [noise, denoised[:-1]], target denoised) or `state` (the same with states).
        seed: random seed of the order, 0 to 2**64 - 1.
        rank: number of this reader, 0 to world_size - 1.
        world_size: number of readers that share an epoch.
        drop_last: leave out an epoch's last slice if it is not full. If False, its samples are divided among the ranks as
            evenly as possible, in smaller batches (and left out only if there are fewer samples than ranks).
        dtype: dtype of the batches: `float32`, or `stored`, the store's own dtype, to which the noise is rounded.
        backend: `native` (threads, memory maps, prefetched batches), `python`, or `auto`: native if it was built.
        prefetch: number of batches that the native backend prepares in advance.
        num_threads: threads of the native backend; None: one per processor, at most 8.
        count: read only the first `count` trajectories of the store; None: all.
        resident: device on which to keep all trajectories, such as `cuda`; batches are gathered there. None: read from the
            disk.

    Raises:
        InputError: the store is incomplete, does not contain `target`, or is smaller than one batch of all ranks together.
    """

    @checked("reader")
    def __init__(
        self,
        store: TrajectoryStore | str,
        batch_size: int,
        *,
        target: Target,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        dtype: BatchDType = "float32",
        backend: Backend = "auto",
        prefetch: int = 2,
        num_threads: int | None = None,
        count: int | None = None,
        resident: torch.device | str | None = None,
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
        if prefetch < 0 or (num_threads is not None and num_threads < 1):
            raise InputError(
                f"reader: prefetch {prefetch}, num_threads {num_threads}; expected a prefetch from 0 on and at least one thread"
            )
        for name, value, choices in (("dtype", dtype, get_args(BatchDType)), ("backend", backend, get_args(Backend))):
            if value not in choices:
                raise InputError(f"reader: {name} is {value!r}; expected one of {choices}")
        self.batch_size, self.target, self.seed, self.rank, self.world_size = batch_size, target, seed, rank, world_size
        self.drop_last = drop_last
        # The store adds up its shards, of which there may be thousands.
        stored = self.store.count
        if count is not None and not 0 < count <= stored:
            raise InputError(f"reader: count is {count}; expected 1 to {stored}, the trajectories of {self.store.path}")
        self.count = stored if count is None else count
        if self.batches_per_epoch == 0:
            raise InputError(
                f"trajectories {self.store.path}: {self.count} trajectories are fewer than one batch of "
                f"{batch_size} on {world_size} ranks; use a smaller batch_size or generate more"
            )
        out = torch.float32 if dtype == "float32" else getattr(torch, self.store.manifest.dtype)
        self._gather: Gather
        if resident is not None:
            self._gather, self._ahead = ResidentGather(self.store, target, out, resident), 0
        elif backend == "native" or (backend == "auto" and native_module()[0] is not None):
            self._gather = NativeGather(self.store, target, out, batch_size, prefetch, num_threads)
            self._ahead = prefetch
        else:
            self._gather, self._ahead = PythonGather(self.store, target, out), 0
        self._epoch = 0
        self._batch = 0  # batches of this epoch that were handed out
        self._begun: deque[Callable[[], TrajectoryBatch]] = deque()  # batches that follow those
        self._order = epoch_order(self.count, seed, epoch=0)
        self._order_epoch = 0

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each rank gets from an epoch."""
        full, rest = divmod(self.count, self.batch_size * self.world_size)
        return full + (not self.drop_last and rest >= self.world_size)

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        return self

    def __next__(self) -> TrajectoryBatch:
        while len(self._begun) <= self._ahead:
            self._begun.append(self._gather.start(self._indices(*self._after(len(self._begun)))))
        batch = self._begun[0]()
        self._begun.popleft()
        self._epoch, self._batch = self._after(0)
        self._batch += 1
        return batch

    def gather(self, indices: NDArray[np.int64]) -> TrajectoryBatch:
        """The batch of the given samples, in that order.

        Raises:
            InputError: a number is out of range.
        """
        numbers = np.asarray(indices)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise InputError(f"reader: indices are {numbers.dtype} {list(numbers.shape)}; expected whole numbers, one a sample")
        wrong = numbers[(numbers < 0) | (numbers >= self.store.count)]
        if wrong.size:
            raise InputError(f"reader: sample {wrong[0]}; expected 0 to {self.store.count - 1}")
        return self._gather.start(numbers.astype(np.int64))()

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from; the same on every rank, JSON-able."""
        return {"epoch": self._epoch, "batch": self._batch, **self._order_settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position at which `state_dict` was called.

        Raises:
            InputError: the state comes from a reader of other samples, or of the same samples in another order.
        """
        mine = self._order_settings()
        theirs = {name: state.get(name) for name in mine}
        if mine != theirs:
            differences = [f"{name} is {mine[name]}, was {theirs[name]}" for name in mine if mine[name] != theirs[name]]
            raise InputError(
                f"reader: cannot resume at the exact sample: {'; '.join(differences)}. Resume with the same settings "
                "and store, or start over"
            )
        epoch, batch = state.get("epoch"), state.get("batch")
        if type(epoch) is not int or type(batch) is not int or epoch < 0 or not 0 <= batch <= self.batches_per_epoch:
            raise InputError(
                f"reader: epoch {epoch!r}, batch {batch!r}; expected an epoch from 0 on and a batch of 0 to "
                f"{self.batches_per_epoch}"
            )
        self._begun.clear()
        self._epoch, self._batch = epoch, batch

    def _after(self, batches: int) -> tuple[int, int]:
        """(epoch, batch) of the batch to hand out after so many more."""
        epochs, batch = divmod(self._batch + batches, self.batches_per_epoch)
        return self._epoch + epochs, batch

    def _indices(self, epoch: int, batch: int) -> NDArray[np.int64]:
        """This rank's samples of a batch."""
        if epoch != self._order_epoch:
            self._order, self._order_epoch = epoch_order(self.count, self.seed, epoch), epoch
        global_size = self.batch_size * self.world_size
        begin = batch * global_size
        share, more = divmod(min(global_size, self.count - begin), self.world_size)
        # The first `more` ranks get one sample more of a slice that is not full.
        begin += self.rank * share + min(self.rank, more)
        return self._order[begin : begin + share + (self.rank < more)]

    def _order_settings(self) -> dict[str, Any]:
        # Ranks may change as long as all of them together take the same samples in a step.
        return {
            "seed": self.seed,
            "count": self.count,
            "global_batch_size": self.batch_size * self.world_size,
            "drop_last": self.drop_last,
            "manifest": self.store.manifest.digest,
        }
