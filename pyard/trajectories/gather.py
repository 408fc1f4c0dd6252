"""Where a reader's samples come from: plain Python, the native gatherer, or tensors that live on a device.

All three give the same numbers; plain Python is the definition, the fallback without a compiler and the tests' oracle.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pyard.diffusion.time_grid import Target
from pyard.errors import InputError
from pyard.ops import gather_trajectories
from pyard.trajectories.batch import BatchBuffer, BufferPool, TrajectoryBatch
from pyard.trajectories.manifest import SAFETENSORS_DTYPES
from pyard.trajectories.store import TrajectoryStore

Backend = Literal["auto", "native", "python"]
BatchDType = Literal["float32", "stored"]

# Each mapped shard holds a file descriptor, of which a process often has 1024.
_MAX_MAPPED_SHARDS = 256
_MAX_THREADS = 8


class Gather(Protocol):
    """A source of samples."""

    def start(self, indices: NDArray[np.int64]) -> Callable[[], TrajectoryBatch]:
        """Begin to gather the samples; the call of what is returned gives the batch."""
        ...


class PythonGather:
    """Gathers with numpy when the batch is asked for.

    Args:
        store: a complete store.
        target: which tensor follows the noise.
        dtype: of the frames.
    """

    def __init__(self, store: TrajectoryStore, target: Target, dtype: torch.dtype):
        self.store, self.target, self.dtype = store, target, dtype
        self._mapped = functools.lru_cache(maxsize=_MAX_MAPPED_SHARDS)(self._map)

    def start(self, indices: NDArray[np.int64]) -> Callable[[], TrajectoryBatch]:
        return lambda: self.gather(indices)

    def gather(self, indices: NDArray[np.int64]) -> TrajectoryBatch:
        """The batch of the given samples, in that order."""
        manifest = self.store.manifest
        frames = torch.empty(len(indices), 1 + manifest.grid.num_steps, *manifest.sample_shape, dtype=self.dtype)
        numbers = torch.empty(len(indices), dtype=torch.int64)
        shard_of = indices // manifest.shard_size
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            rows = indices[places] - shard * manifest.shard_size
            arrays = self._mapped(int(shard))
            to = torch.from_numpy(places)
            frames[to, 0] = torch.from_numpy(arrays["noise"][rows]).to(self.dtype)
            frames[to, 1:] = as_tensor(arrays[self.target][rows]).to(self.dtype)
            numbers[to] = torch.from_numpy(arrays["label"][rows])
        check_numbers_of(indices, numbers, manifest.num_classes)
        return TrajectoryBatch.of_frames(frames, self.store.conditions.take(numbers))

    def _map(self, shard: int) -> dict[str, NDArray[Any]]:
        record = self.store.shards[shard]
        try:
            return self.store.tensors(record)
        except InputError:
            # A store that was extended since has a longer shard in place of its last one, with the same first samples.
            longer = [
                r for r in TrajectoryStore.open(self.store.path).shards if r.first == record.first and r.count > record.count
            ]
            if not longer:
                raise
            return self.store.tensors(longer[0])


class NativeGather:
    """Gathers with the threads of csrc/trajectory, ahead of the use, into buffers that are used again and again.

    Args:
        store: a complete store; every shard is mapped and its header checked now.
        target: which tensor follows the noise.
        dtype: of the frames.
        batch_size: samples of the largest batch.
        ahead: batches that are gathered before they are asked for.
        num_threads: threads that gather; None: those this process may run on, at most 8.

    Raises:
        InputError: a shard that is not what the manifest says; or the module was not built.
    """

    def __init__(
        self, store: TrajectoryStore, target: Target, dtype: torch.dtype, batch_size: int, ahead: int, num_threads: int | None
    ):
        manifest = store.manifest
        module, reason = native_module()
        if module is None:
            raise InputError(f"reader: backend='native', but {reason}; use backend='auto' or 'python'")
        layout = [(name, SAFETENSORS_DTYPES[t.dtype][0], list(t.shape[1:])) for name, t in manifest.layout(1).items()]
        if num_threads is None:
            num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        try:
            self._gatherer = module.Gatherer(
                paths=[str(store.path / "shards" / f"{shard.name}.safetensors") for shard in store.shards],
                counts=[shard.count for shard in store.shards],
                shard_size=manifest.shard_size,
                layout=layout,
                target=target,
                output=SAFETENSORS_DTYPES[str(dtype).removeprefix("torch.")][0],
                num_classes=manifest.num_classes,
                num_threads=num_threads,
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        # One batch in the caller's hands, one that the caller has just dropped or still compares with it.
        frames_shape = (batch_size, 1 + manifest.grid.num_steps, *manifest.sample_shape)
        self._buffers = BufferPool(frames_shape, dtype, keep=ahead + 2)
        self._batch_size = batch_size
        self._conditions = store.conditions

    def start(self, indices: NDArray[np.int64]) -> Callable[[], TrajectoryBatch]:
        count = len(indices)
        pool = self._buffers
        buffer = pool.take() if count <= self._batch_size else BatchBuffer((count, *pool.frames_shape[1:]), pool.dtype)
        try:
            ticket = self._gatherer.submit(indices, buffer.frames[:count], buffer.numbers[:count])
        except ValueError as error:
            raise InputError(f"reader: {error}") from None

        def result() -> TrajectoryBatch:
            try:
                ticket.wait()
            except ValueError as error:
                raise InputError(f"reader: {error}") from None
            return buffer.batch(count, self._conditions)

        return result


class ResidentGather:
    """Holds all the samples on a device and gathers there.

    Args:
        store: a complete store that fits into the device's memory.
        target: which tensor follows the noise.
        dtype: of the frames.
        device: where the samples are held and the batches made.
    """

    def __init__(self, store: TrajectoryStore, target: Target, dtype: torch.dtype, device: torch.device | str):
        self.dtype = dtype
        shards = [store.tensors(shard) for shard in store.shards]
        device = torch.device(device)
        sizes = {name: sum(shard[name].nbytes for shard in shards) for name in ("noise", target, "label")}
        try:
            self._noise = torch.cat([as_tensor(shard["noise"]).to(device) for shard in shards])
            self._target = torch.cat([as_tensor(shard[target]).to(device) for shard in shards])
        except torch.OutOfMemoryError:
            raise InputError(
                f"reader: {sum(sizes.values()) / 1e9:.2f} GB of trajectories do not fit on {device}; leave out `resident`, "
                "or keep them in a narrower dtype"
            ) from None
        self._label = torch.cat([as_tensor(shard["label"]) for shard in shards])
        check_numbers_of(np.arange(store.count), self._label, store.manifest.num_classes)
        self._conditions = store.conditions
        self._label = self._label.to(device)

    def start(self, indices: NDArray[np.int64]) -> Callable[[], TrajectoryBatch]:
        rows = torch.from_numpy(np.ascontiguousarray(indices)).to(self._label.device, non_blocking=True)
        history, target = gather_trajectories(self._noise, self._target, rows, self.dtype)
        batch = TrajectoryBatch(history, target, self._conditions.take(self._label[rows]))
        return lambda: batch


def native_module() -> tuple[Any, str]:
    """The compiled module and "", or None and why it is not there."""
    try:
        return importlib.import_module("pyard._trajectory"), ""
    except ImportError as error:
        return None, f"the native trajectory reader is not built ({error})"


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """A tensor of float32, float16 or int64 numbers, or of the bits of bfloat16; a copy if the array is read-only."""
    array = array if array.flags.writeable else array.copy()
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def check_numbers_of(indices: NDArray[np.int64], numbers: torch.Tensor, count: int) -> None:
    """Raises InputError if a stored label or other condition number is none of the teacher's."""
    wrong = torch.nonzero((numbers < 0) | (numbers >= count))
    if len(wrong):
        i = int(wrong[0, 0])
        raise InputError(
            f"reader: sample {int(indices[i])} has label {int(numbers[i])}; the teacher's classes are 0 to {count - 1}"
        )
