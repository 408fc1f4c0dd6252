"""What autograd keeps between forward and backward pass, counted while a module runs without data.

The module runs on tensors of torch's FakeTensorMode, which have a shape and no numbers. They say that they are on the CPU, for
autocast passes by those of the meta device.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyard import ops
from pyard.cost.flops import without_weights
from pyard.ops.backend import has_kernel

_Module = TypeVar("_Module", bound=nn.Module)
_FAKE = FakeTensorMode(allow_non_fake_inputs=True)


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps of one sample between forward and backward pass; weights and their casts are not among them.

    Args:
        everything: without activation checkpointing.
        outside: with it: the blocks' inputs, and what is kept outside the blocks.
        block: what one block keeps beside its inputs, at most.
    """

    everything: float
    outside: float
    block: float

    def peak(self, checkpointing: bool) -> float:
        """At most, in a backward pass: the gradients inside a block are about a quarter of what it kept."""
        return (self.outside + self.block if checkpointing else self.everything) + 0.25 * self.block


def fake_copy(module: _Module) -> _Module:
    """A copy of a module for `count_kept`: shapes without numbers, whatever the size of the original."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with _FAKE:
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    return without_weights(module, fake)


def count_kept(
    run: Callable[[int], object], module: nn.Module, blocks: nn.ModuleList, *, mixed: bool, device_type: str
) -> Kept:
    """Count what a forward pass keeps of each sample.

    It is what three samples keep beyond what two do, so casts of weights, which do not grow with the batch, drop out.

    Args:
        run: runs the module on so many samples, made by `torch.empty` without a device.
        module: what `fake_copy` returned.
        blocks: its blocks, those that activation checkpointing computes again.
        mixed: matrices are multiplied in 16 bits.
        device_type: where the training runs: its operators are counted, and plain ones keep more than compiled ones.
    """
    backend: ops.Backend = "auto" if has_kernel("block_attention", device_type) else "reference"
    counts = []
    for batch in (2, 3):
        saved = _Saved(module, blocks)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
        with _FAKE, ops.use_backend(backend), _FusedAttention(device_type), autocast, saved:
            result = run(batch)
            counts.append(saved.bytes())
            del result
    return Kept(*(float(more - less) for less, more in zip(*counts, strict=True)))


def peak_live(run: Callable[[], object], *, device_type: str) -> int:
    """The most bytes that a pass without gradients holds at once, beside the weights: what it makes and has not dropped yet.

    Args:
        run: the pass, of a module that `fake_copy` returned, on tensors made by `torch.empty` without a device.
        device_type: see `count_kept`.
    """
    backend: ops.Backend = "auto" if has_kernel("block_attention", device_type) else "reference"
    live = _Live()
    with torch.no_grad(), _FAKE, ops.use_backend(backend), _FusedAttention(device_type), live:
        run()
    return live.most


class _Live(TorchDispatchMode):
    """Counts the storages that operators make while it is entered, and those that are gone again."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What goes in was made elsewhere, such as weights and tables, unless it is known.
        given = {_key(value) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if not isinstance(value, torch.Tensor) or _key(value) in given or _key(value) in self._known:
                continue
            storage, key = value.untyped_storage(), _key(value)
            self._known.add(key)
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        return result

    def _gone(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._now -= num_bytes


class _FusedAttention(TorchFunctionMode):
    """Attention as the device computes it: the fused kernels of GPUs learn an additive mask, those of CPUs do not.

    Where a mask wants a gradient, PyTorch on a CPU would keep the weights of all pairs of tokens instead.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self._learns_masks = device_type != "cpu"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._learns_masks:
            args = (*args[:3], *(m if m is None else m.detach() for m in args[3:4]), *args[4:])
            if kwargs.get("attn_mask") is not None:
                kwargs = {**kwargs, "attn_mask": kwargs["attn_mask"].detach()}
        return func(*args, **kwargs)


class _Saved:
    """The storages that autograd saves while this is entered, by the block that they are saved in.

    Args:
        module: whose own tensors do not count.
        blocks: its blocks.
    """

    def __init__(self, module: nn.Module, blocks: nn.ModuleList):
        self._weights = {_key(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._blocks = blocks
        self._running: list[int] = []
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no two have one address
        self._inputs: set[int] = set()
        self._outside: set[int] = set()
        self._inside: list[set[int]] = [set() for _ in blocks]
        self._handles: list[Any] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> _Saved:
        for index, block in enumerate(self._blocks):
            enter = functools.partial(self._enter, index)
            self._handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(block.register_forward_hook(self._leave))
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def bytes(self) -> tuple[int, int, int]:
        """The fields of `Kept`, of the whole batch."""
        recomputed = self._outside | self._inputs
        inside = max((self._size(block - recomputed) for block in self._inside), default=0)
        return self._size(self._outside.union(*self._inside)), self._size(recomputed), inside

    def _size(self, keys: set[int]) -> int:
        return sum(self._storages[key].nbytes() for key in keys)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self._note(tensor, self._inside[self._running[-1]] if self._running else self._outside)
        return tensor

    def _note(self, tensor: torch.Tensor, where: set[int]) -> None:
        key = _key(tensor)
        if key not in self._weights:
            self._storages[key] = tensor.untyped_storage()
            where.add(key)

    def _enter(self, index: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._running.append(index)
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self._note(value, self._inputs)

    def _leave(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
