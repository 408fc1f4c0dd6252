"""Settings in the types that their fields are annotated with, whatever they came from: Python, YAML or flags."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import os
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np

from pyard.errors import InputError

# What else people call a value, by the field.
_OTHER_NAMES: dict[str, dict[Any, Any]] = {
    "mixed_precision": {"float32": "no", "fp32": "no", "bfloat16": "bf16", "float16": "fp16"},
}


def conform(config: Any, what: str) -> None:
    """Give every field of a frozen dataclass a value of its annotated type.

    Numbers of numpy become Python's, lists become tuples, and what YAML 1.1 makes of `no` and `null` becomes what was meant.

    Args:
        config: the dataclass, changed in place.
        what: whose settings they are, for messages.

    Raises:
        InputError: names the setting, what was found and what was expected.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str):
            value = _OTHER_NAMES.get(field.name, {}).get(value, value)
        try:
            object.__setattr__(config, field.name, _as(value, hints[field.name]))
        except TypeError:
            raise InputError(f"{what}: {field.name} is {value!r}; expected {_words(hints[field.name])}") from None


def _as(value: Any, hint: Any) -> Any:
    """The value in a type; a TypeError if it has no equal there."""
    if hint is Any:
        return value
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _as_one_of(value, members)
    if origin is typing.Literal:
        return _as_literal(value, members)
    if origin is tuple:
        return _as_tuple(value, members)
    if origin is list:
        return list(_as_tuple(value, (*members, ...)))
    if hint is type(None) and (value is None or value == "none"):
        return None
    if hint is bool and isinstance(value, bool | np.bool_):
        return bool(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return operator.index(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint in (str, Path) and isinstance(value, str | os.PathLike):
        return hint(value)
    if dataclasses.is_dataclass(hint) and isinstance(value, hint):  # type: ignore[arg-type]
        return value
    raise TypeError


def _as_one_of(value: Any, members: tuple[Any, ...]) -> Any:
    # Whole numbers before fractions, and "none" a name only where nothing else is meant by it.
    order = sorted(members, key=lambda member: (member is float, member is type(None)))
    for member in order:
        try:
            return _as(value, member)
        except TypeError:
            continue
    raise TypeError


def _as_literal(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        # YAML reads a bare `no` as false, and `null` for a choice that is called none.
        meant = {"no": False, "none": None}.get(choice, choice) if not isinstance(value, str) else choice
        if type(value) is type(meant) and value == meant:
            return choice
    raise TypeError


def _as_tuple(value: Any, members: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise TypeError
    hints = members[:1] * len(value) if members[-1] is Ellipsis else members
    if len(hints) != len(value):
        raise TypeError
    return tuple(_as(item, hint) for item, hint in zip(value, hints, strict=True))


def _words(hint: Any) -> str:
    """A type hint as people say it."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_words(member) for member in members)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, members))}" if len(members) > 1 else str(members[0])
    if origin is tuple:
        return "a list of numbers" if members[-1] is Ellipsis else f"{len(members)} numbers"
    if origin is list:
        return "a list"
    known = {type(None): "none", bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    return known.get(hint, getattr(hint, "__name__", str(hint)))
