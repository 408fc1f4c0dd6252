"""The condition of a student as inputs of a graph: names, dtypes and sizes, and conditions to test it with.

B batch
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyard.conditions import Condition, Conditions
from pyard.conditions.condition import pad_to
from pyard.conditions.prompts import PromptTable
from pyard.diffusion.noise import uniform_labels
from pyard.errors import InputError
from pyard.models.student import Student

# Sizes to trace with. They differ, because torch.export treats equal sizes as one size, and 1 as a constant.
TRACED_BATCH = 5
_TRACED_SIZES = (7, 11, 13, 17, 19, 23)
_KINDS = (torch.float32, torch.bool, torch.int64, torch.int32)


@dataclass(frozen=True)
class ConditionInput:
    """One tensor of a condition in the graph.

    Args:
        name: the network's name for it.
        dtype: float32 for every floating-point tensor, whatever dtype the table stores.
        sizes: sizes of a row: a number if it is fixed, otherwise a name.
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[int | str, ...]

    def to_json(self) -> dict[str, Any]:
        """Name, dtype and shape [B, ...] as stored in the metadata, with None for sizes that are not fixed."""
        shape = [None, *(None if isinstance(size, str) else size for size in self.sizes)]
        return {"name": self.name, "dtype": str(self.dtype).removeprefix("torch."), "shape": shape}


class ConditionInputs:
    """The inputs of a student's graph besides the noise.

    Args:
        student: a student with a table of conditions, unless there are examples.
        examples: conditions of one row or more. Without a table, the sizes that are not fixed are those that differ between
            examples, and the number of a text-to-image student's text tokens.

    Raises:
        InputError: there is neither a table nor an example, or examples do not match each other.
    """

    def __init__(self, student: Student, examples: Sequence[Condition] = ()):
        self._table, self._examples = student.conditions, [_plain(example) for example in examples]
        if self._table is not None:
            self.inputs = _of_table(self._table)
        elif self._examples:
            self.inputs = _of_examples(self._examples, PromptTable.free_sizes if student.config.text is not None else {})
        else:
            raise InputError(
                "this student has no table of conditions; in Python, give export_onnx examples=[…], conditions to trace it with"
            )
        free = [size for item in self.inputs for size in item.sizes if isinstance(size, str)]
        self.traced_sizes: dict[str, int] = dict(zip(dict.fromkeys(free), _TRACED_SIZES, strict=False))

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in order."""
        return [item.name for item in self.inputs]

    def example(self) -> tuple[torch.Tensor, ...]:
        """Tensors with `TRACED_BATCH` rows and the traced sizes."""
        shapes = [[self.traced_sizes[s] if isinstance(s, str) else s for s in item.sizes] for item in self.inputs]
        make = {torch.bool: torch.ones}
        pairs = zip(self.inputs, shapes, strict=True)
        return tuple(make.get(item.dtype, torch.zeros)(TRACED_BATCH, *shape, dtype=item.dtype) for item, shape in pairs)

    def draw(self, seed: int, index: NDArray[np.integer[Any]]) -> Condition:
        """Randomly drawn conditions for samples `index`; sizes that are not fixed differ from the traced ones."""
        if self._table is not None:
            condition = _plain(self._table.take(torch.from_numpy(uniform_labels(seed, index, self._table.count))))
        else:
            rows = [example.index([i]) for example in self._examples for i in range(example.batch_size)]
            condition = Condition.cat([rows[i] for i in uniform_labels(seed, index, len(rows))])
        tensors = {}
        for item in self.inputs:
            tensor = condition[item.name]
            have = zip(item.sizes, tensor.shape[1:], strict=True)
            tensors[item.name] = pad_to(tensor, [size + (self.traced_sizes.get(str(name)) == size) for name, size in have])
        return Condition(tensors)


def as_arrays(condition: Condition) -> dict[str, NDArray[Any]]:
    """A condition in the form that an exported student takes."""
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in _plain(condition).items()}


def _plain(condition: Condition) -> Condition:
    # numpy has no bfloat16, and a graph that computes in half precision narrows its inputs itself.
    return Condition({n: (t.float() if t.is_floating_point() else t).detach().cpu() for n, t in condition.items()})


def _of_table(table: Conditions) -> list[ConditionInput]:
    free = table.free_sizes
    inputs = []
    for name, tensor in _plain(table.take([0])).items():
        sizes = tuple(free.get(name, {}).get(dim, size) for dim, size in enumerate(tensor.shape[1:], 1))
        inputs.append(_checked(ConditionInput(name, tensor.dtype, sizes)))
    return inputs


def _of_examples(examples: Sequence[Condition], free: Mapping[str, Mapping[int, str]]) -> list[ConditionInput]:
    kinds = [{name: (tensor.dtype, tensor.ndim) for name, tensor in example.items()} for example in examples]
    if any(kind != kinds[0] for kind in kinds):
        raise InputError(
            f"examples: found {examples}; expected the same names, dtypes and numbers of dimensions in all of them"
        )
    names: dict[tuple[int, ...], str] = {}  # the sizes of one free dimension in all examples to its name
    inputs = []
    for name, tensor in examples[0].items():
        sizes: list[int | str] = []
        shapes = zip(*(example[name].shape for example in examples), strict=True)
        for dim, found in itertools.islice(enumerate(shapes), 1, None):
            if dim in free.get(name, {}):
                sizes.append(free[name][dim])
            else:
                sizes.append(found[0] if len(set(found)) == 1 else names.setdefault(found, f"size_{len(names)}"))
        inputs.append(_checked(ConditionInput(name, tensor.dtype, tuple(sizes))))
    return inputs


def _checked(item: ConditionInput) -> ConditionInput:
    if item.dtype not in _KINDS:
        expected = ", ".join(str(kind).removeprefix("torch.") for kind in _KINDS)
        raise InputError(f"condition {item.name!r} is of dtype {item.dtype}; an exported student takes {expected}")
    return item
