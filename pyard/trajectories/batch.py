"""Batches of trajectories, which are views of preallocated memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyard.conditions import Condition, Conditions, as_condition
from pyard.errors import InputError


@dataclass(frozen=True)
class TrajectoryBatch:
    """A batch of trajectories, from which a student learns in one update.

    `history` and `target` are views of one tensor [B, 1 + S, C, ...] that begins with the noise: change neither in place. A
    reader reuses a batch's memory only when no view of it is referenced any more, so a batch may be kept for any length of
    time.

    Args:
        history: the student's S inputs, [B, S, C, ...], x_T first.
        target: the outputs to learn, [B, S, C, ...], x_0 last.
        condition: B rows of the store's conditions. Class labels, int64 [B], are accepted too.
        frames: the tensor that history and target are views of, if there is one.
        buffer: the reader's memory that contains the frames, if there is any.
    """

    history: torch.Tensor
    target: torch.Tensor
    condition: Condition
    frames: torch.Tensor | None = field(default=None, repr=False, compare=False)
    buffer: BatchBuffer | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "condition", as_condition(self.condition))
        fits = self.condition.batch_size == len(self.history) if self.history.ndim >= 3 else False
        if not fits or self.target.shape != self.history.shape:
            raise InputError(
                f"{self}: expected history and target of one shape [B, S, C, ...] and a condition of B rows; "
                "one of them was built from other samples"
            )
        if not (self.history.is_floating_point() and self.target.dtype == self.history.dtype):
            raise InputError(f"{self}: expected history and target in one floating-point dtype")
        if "label" in self.condition and self.condition["label"].dtype != torch.int64:
            raise InputError(f"{self}: expected class labels to be int64")

    @classmethod
    def of_frames(
        cls,
        frames: torch.Tensor,  # [B, 1 + S, C, ...]
        condition: Condition,  # B rows
        buffer: BatchBuffer | None = None,
    ) -> TrajectoryBatch:
        """A batch whose inputs are all frames except the last, and whose outputs all except the first, without a copy."""
        return cls(frames[:, :-1], frames[:, 1:], condition, frames, buffer)

    def __len__(self) -> int:
        return len(self.history)

    def __repr__(self) -> str:
        tensors = {"history": self.history, "target": self.target, **self.condition}
        described = (f"{name}={str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in tensors.items())
        return f"TrajectoryBatch({', '.join(described)})"

    def to(self, device: torch.device | str) -> TrajectoryBatch:
        """The batch on another device. The frames are copied once, asynchronously if the memory is pinned."""
        if self.frames is None:
            history, target = (t.to(device, non_blocking=True) for t in (self.history, self.target))
            return TrajectoryBatch(history, target, self.condition.to(device))
        moved = TrajectoryBatch.of_frames(self.frames.to(device, non_blocking=True), self.condition.to(device), self.buffer)
        if self.buffer is not None and torch.device(device).type == "cuda":
            self.buffer.being_copied = torch.cuda.Event()
            self.buffer.being_copied.record()
        return moved


class BatchBuffer:
    """Memory of one batch, pinned if there is CUDA, which knows whether any tensor still refers to it.

    Args:
        frames_shape: [B, 1 + S, C, ...].
        dtype: of the frames.
    """

    def __init__(self, frames_shape: tuple[int, ...], dtype: torch.dtype):
        pin = torch.cuda.is_available()
        frames = torch.empty(frames_shape, dtype=dtype, pin_memory=pin)
        numbers = torch.empty(frames_shape[0], dtype=torch.int64, pin_memory=pin)
        self.dtype = dtype
        # numpy has no bfloat16, so that is its bits. Tensors made of an array refer to it: its reference count tells.
        self.frames: NDArray[Any] = (frames.view(torch.int16) if dtype == torch.bfloat16 else frames).numpy()
        self.numbers: NDArray[np.int64] = numbers.numpy()
        self.being_copied: torch.cuda.Event | None = None
        self._references_if_free = self._references()

    def is_free(self) -> bool:
        """Whether only this object refers to the memory."""
        return self._references() == self._references_if_free

    def _references(self) -> tuple[int, int]:
        return sys.getrefcount(self.frames), sys.getrefcount(self.numbers)

    def wait_until_copied(self) -> None:
        """Wait until the last copy to a GPU has read the memory."""
        if self.being_copied is not None:
            self.being_copied.synchronize()
            self.being_copied = None

    def batch(self, count: int, conditions: Conditions) -> TrajectoryBatch:
        """The first `count` samples as a batch, without a copy; their condition numbers are rows of `conditions`."""
        frames = torch.from_numpy(self.frames)
        frames = frames.view(torch.bfloat16) if self.dtype == torch.bfloat16 else frames
        numbers = torch.from_numpy(self.numbers)[:count]
        return TrajectoryBatch.of_frames(frames[:count], conditions.take(numbers), self)


class BufferPool:
    """Buffers of one shape; new ones are allocated only while all others are in use.

    Args:
        frames_shape: [B, 1 + S, C, ...] of the largest batch.
        dtype: of the frames.
        keep: number of unreferenced buffers to keep for the next batches.
    """

    def __init__(self, frames_shape: tuple[int, ...], dtype: torch.dtype, keep: int):
        self.frames_shape, self.dtype, self.keep = frames_shape, dtype, keep
        self._buffers: list[BatchBuffer] = []

    def take(self) -> BatchBuffer:
        """A buffer with no remaining references."""
        for i, buffer in enumerate(self._buffers):
            if buffer.is_free():
                # To the end: the one that was free for longest is the next.
                self._buffers.append(self._buffers.pop(i))
                buffer.wait_until_copied()
                return buffer
        buffer = BatchBuffer(self.frames_shape, self.dtype)
        if len(self._buffers) < self.keep:
            self._buffers.append(buffer)
        return buffer
