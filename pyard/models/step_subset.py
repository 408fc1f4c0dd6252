"""Some steps of a parallel pass through the blocks above the history: what an update need not compute, it need not keep.

The lowest N blocks run on all S steps, for their attentions look from step to step. The others treat steps as samples of their
own, so any k of them give the same numbers as in the whole pass.

    B batch · S steps · k steps that go all the way · N history layers · L layers
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from pyard.conditions import Condition
from pyard.errors import InputError
from pyard.models.student import Student


@dataclass
class _Rows:
    """Which rows of a pass go all the way.

    Args:
        places: of these rows among all, int64.
        whole: how many rows there are before the first block that leaves some out.
        narrowed: what is left of tensors that several blocks get, such as a text's tokens.
    """

    places: torch.Tensor
    whole: int
    narrowed: MutableMapping[Any, torch.Tensor] = field(default_factory=WeakTensorKeyDictionary)


class StepSubset:
    """A student's parallel pass in which the blocks above the history run on some of the steps.

    Args:
        student: gets hooks on its blocks, which do nothing in its other passes. No block is changed.

    Raises:
        InputError: its backbone does not say which arguments of its blocks have a row for each step.
    """

    def __init__(self, student: Student):
        trunk = student.trunk
        if trunk.row_arguments is None:
            raise InputError(
                f"steps_per_update: {type(trunk).__name__} does not say which arguments of its blocks hold a row for each "
                "step; set its class attribute row_arguments (docs/own-teacher.md), or leave steps_per_update out"
            )
        self.student, self._names, self._folded = student, trunk.row_arguments, trunk.folds_steps
        self._rows: _Rows | None = None
        upper = list(trunk.blocks)[student.config.history_layers :]
        for block in upper:
            arguments = tuple(inspect.signature(type(block).forward).parameters)[1:]
            block.register_forward_pre_hook(functools.partial(self._narrow, arguments), with_kwargs=True)
        if upper:
            upper[-1].register_forward_hook(self._widen)

    def __call__(
        self,
        history: torch.Tensor,  # [B, S, C, ...]
        condition: Condition | torch.Tensor,  # B rows, or their numbers
        kept: torch.Tensor,  # int64 [k], increasing
    ) -> torch.Tensor:  # [B, k, C, ...]
        """The predictions of these steps."""
        batch, steps = history.shape[:2]
        places, whole = kept, steps
        if self._folded:
            places = (torch.arange(batch, device=kept.device)[:, None] * steps + kept).flatten()
            whole = batch * steps
        self._rows = _Rows(places, whole) if len(kept) < steps else None
        try:
            prediction: torch.Tensor = self.student(history, condition)
        finally:
            self._rows = None
        return prediction.index_select(1, kept)

    def _narrow(self, names: tuple[str, ...], block: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._rows is None:
            return None
        some = [self._some(name, value) for name, value in zip(names, args, strict=False)]
        return tuple(some), {name: self._some(name, value) for name, value in kwargs.items()}

    def _some(self, name: str, value: Any) -> Any:
        rows = self._rows
        if rows is None or name not in self._names or value is None:
            return value
        dim = 0 if self._folded else 1
        found = value.shape[dim]
        if found == len(rows.places):  # what an earlier block returned
            return value
        if found != rows.whole:
            raise InputError(
                f"steps_per_update: argument {name} of a block has shape {tuple(value.shape)}; expected {rows.whole} rows in "
                f"dimension {dim}: correct row_arguments of {type(self.student.trunk).__name__}"
            )
        if torch.compiler.is_compiling():
            return value.index_select(dim, rows.places)
        if value not in rows.narrowed:
            rows.narrowed[value] = value.index_select(dim, rows.places)
        return rows.narrowed[value]

    def _widen(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Zeros in the rows that were left out, for what stands behind the blocks takes all of them."""
        rows = self._rows
        if rows is None:
            return None
        dim = 0 if self._folded else 1

        def widen(some: torch.Tensor) -> torch.Tensor:
            shape = list(some.shape)
            shape[dim] = rows.whole
            return some.new_zeros(shape).index_copy(dim, rows.places, some)

        return pytree.tree_map_only(torch.Tensor, widen, output)
