"""The conditions that an exported student takes besides the noise, and the check of a caller's; needs only numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyard.diffusion.noise import check_labels
from pyard.errors import InputError


@dataclass(frozen=True)
class ConditionTensor:
    """One tensor of a condition.

    Args:
        name: name of the graph's input.
        dtype: numpy's name of the dtype.
        shape: the shape [B, ...], in which a name stands for a size that is not fixed; equal names are equal sizes.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


def check_condition(
    labels: object,
    condition: Mapping[str, NDArray[Any]] | None,
    tensors: Sequence[ConditionTensor],
    num_classes: int | None,
) -> dict[str, NDArray[Any]]:
    """The arrays of a condition by name, each [n, ...], after checking them.

    Args:
        labels: integers [n], for a class-conditional student; or None.
        condition: arrays by name; or None.
        tensors: the tensors that the student takes.
        num_classes: labels are 0 to num_classes - 1; None: the student takes no classes.

    Raises:
        InputError: both or neither of `labels` and `condition` are given, names, dtypes or shapes are not those of `tensors`,
            or a label is out of range.
    """
    expected = ", ".join(map(str, tensors))
    if (labels is None) == (condition is None):
        raise InputError(
            f"found {'neither' if labels is None else 'both'} labels and condition=…; expected one of them ({expected})"
        )
    if condition is None:
        if num_classes is None:
            raise InputError(
                f"labels: this student is conditioned on tensors, not on classes; give condition=… with {expected}"
            )
        return {"label": check_labels(labels, num_classes)}
    if not isinstance(condition, Mapping) or set(condition) != {tensor.name for tensor in tensors}:
        found = ", ".join(map(str, condition)) if isinstance(condition, Mapping) else type(condition).__name__
        raise InputError(f"condition: found {found or 'nothing'}; expected a dictionary of {expected}")
    sizes: dict[str, int] = {}
    arrays = {}
    for tensor in tensors:
        array = condition[tensor.name]
        if not isinstance(array, np.ndarray):
            raise InputError(f"condition[{tensor.name!r}]: found {type(array).__name__}; expected a numpy array, {tensor}")
        pairs = list(zip(tensor.shape, array.shape, strict=False))
        fits = all(sizes.setdefault(want, have) == have if isinstance(want, str) else want == have for want, have in pairs)
        if array.dtype != np.dtype(tensor.dtype) or array.ndim != len(tensor.shape) or not fits:
            known = f", where {', '.join(f'{name} is {size}' for name, size in sizes.items())}" if sizes else ""
            raise InputError(f"condition[{tensor.name!r}]: found {array.dtype} {list(array.shape)}; expected {expected}{known}")
        arrays[tensor.name] = array
    if num_classes is not None:
        check_labels(arrays["label"], num_classes)
    return arrays
