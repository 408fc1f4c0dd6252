"""Named tensors with a leading batch dimension: what a network is conditioned on besides the time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.nn import functional as F

from pyard.errors import InputError


class Condition(Mapping[str, torch.Tensor]):
    """The condition of a batch, such as `{"label": int64 [B]}` or `{"tokens": [B, n, D], "mask": bool [B, n]}`.

    Example:
        condition = teacher.conditions.take([3, 1, 4])
        teacher.predict(x, time, condition)

    Args:
        tensors: at least one tensor [B, ...], by the names that the network uses.
        lengths: number of set entries of `mask` in each row, if known; None: the attribute `lengths` counts them.

    Raises:
        InputError: no tensors, or tensors of different batch sizes.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], lengths: Sequence[int] | None = None):
        self._tensors = dict(tensors)
        self._lengths = lengths
        # Sizes are compared one by one: in a set, and in len(), an exporter's symbolic size would become a constant.
        sizes = [tensor.shape[0] if tensor.ndim else -1 for tensor in self._tensors.values()]
        if not sizes or any(size != sizes[0] or size == -1 for size in sizes):
            raise InputError(f"{self}: expected at least one tensor, all with the same leading batch dimension")

    @property
    def batch_size(self) -> int:
        """B. (`len` is the number of tensors.)"""
        return next(iter(self._tensors.values())).shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return next(iter(self._tensors.values())).device

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise InputError(f"condition: no tensor {name!r}; it has {', '.join(self._tensors)}")
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        described = (f"{name}={str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in self._tensors.items())
        return f"Condition({', '.join(described)})"

    @property
    def lengths(self) -> Sequence[int]:
        """The number of set entries of `mask` [B, n] in each row, as Python integers.

        They are counted before the condition moves to a device, because counting there would wait for all of its work.
        """
        if self._lengths is None:
            self._lengths = self["mask"].sum(dim=1).tolist()
        return self._lengths

    def to(self, device: torch.device | str) -> Condition:
        """The condition on another device; the copy is asynchronous if the memory is pinned."""
        mask = self._tensors.get("mask")
        moves = mask is not None and mask.ndim == 2 and mask.device.type == "cpu" and torch.device(device).type != "cpu"
        lengths = self.lengths if moves else self._lengths
        return self.with_tensors(
            {name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors.items()}, lengths
        )

    def with_tensors(self, tensors: Mapping[str, torch.Tensor], lengths: Sequence[int] | None = None) -> Condition:
        """A condition of the same rows and masks with other tensors, such as its own in another dtype."""
        return Condition(tensors, self._lengths if lengths is None else lengths)

    def index(self, rows: slice | torch.Tensor | Sequence[int]) -> Condition:
        """The condition of a subset of the samples."""
        lengths = self._lengths[rows] if isinstance(rows, slice) and self._lengths is not None else None
        return Condition({name: tensor[rows] for name, tensor in self._tensors.items()}, lengths)

    def repeat(self, steps: int) -> Condition:
        """Each row repeated `steps` times consecutively, [B * steps, ...]: for networks that fold steps into the batch."""
        if steps == 1:
            return self
        lengths = None if self._lengths is None else [length for length in self._lengths for _ in range(steps)]
        return Condition({name: tensor.repeat_interleave(steps, dim=0) for name, tensor in self._tensors.items()}, lengths)

    def split(self, count: int) -> list[Condition]:
        """Split into `count` conditions of equal batch size, in order."""
        pieces = [tensor.chunk(count) for tensor in self._tensors.values()]
        found = [Condition(dict(zip(self._tensors, piece, strict=True))) for piece in zip(*pieces, strict=True)]
        if self._lengths is not None:
            begins = itertools.accumulate((piece.batch_size for piece in found), initial=0)
            for begin, piece in zip(begins, found, strict=False):
                piece._lengths = self._lengths[begin : begin + piece.batch_size]
        return found

    @classmethod
    def cat(cls, conditions: Sequence[Condition]) -> Condition:
        """Concatenate the rows of several conditions.

        Tensors of different lengths, such as those of prompts, are padded with zeros at the end of each dimension; zeros in
        the mask mark the padding.
        """
        known = [condition._lengths for condition in conditions]
        lengths = [length for one in known for length in one or ()]
        tensors = {name: _cat([condition[name] for condition in conditions]) for name in conditions[0]}
        return cls(tensors, None if None in known else lengths)


def as_condition(condition: Condition | torch.Tensor) -> Condition:
    """Return a condition unchanged, and class labels, int64 [B], as the condition `{"label": labels}`."""
    return condition if isinstance(condition, Condition) else Condition({"label": condition})


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return torch.cat([pad_to(tensor, shape) for tensor in tensors])


def pad_to(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:  # [B, ...] -> [B, *shape]
    """Pad every dimension except the first with zeros at its end, up to a shape."""
    if list(tensor.shape[1:]) == list(shape):
        return tensor
    missing = [(0, size - have) for size, have in zip(shape, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [side for pair in reversed(missing) for side in pair])
