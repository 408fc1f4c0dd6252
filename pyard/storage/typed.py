"""Arguments and settings in the types that they are annotated with, whatever they came from: Python, YAML or flags."""

from __future__ import annotations

import builtins
import collections.abc
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import operator
import os
import reprlib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pyard.errors import InputError

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Names of one precision: every function and flag that takes one of them takes the others as well.
PRECISIONS = (("float32", "fp32", "no"), ("bfloat16", "bf16"), ("float16", "fp16"))


def conform(config: Any, what: str) -> None:
    """Give every field of a frozen dataclass a value of its annotated type.

    Numbers of numpy become Python's, lists become tuples, and what YAML 1.1 makes of `no` and `null` becomes what was meant.
    Values that are the field's default, and fields of other types, stay as they are.

    Args:
        config: the dataclass, changed in place.
        what: whose settings they are, for messages.

    Raises:
        InputError: names the setting, what was found and what was expected.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not field.default:
            object.__setattr__(config, field.name, _argument(what, field.name, value, hints[field.name]))


def checked(what: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A decorator that gives a function arguments of the types it is annotated with, as `conform` does for settings.

    Args:
        what: whose arguments they are, for messages.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        hints = functools.cache(lambda: hints_of(function))

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            bound = signature.bind(*args, **kwargs)
            for name, value in bound.arguments.items():
                parameter = signature.parameters[name]
                positional = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
                if positional and name in hints() and value is not parameter.default:
                    bound.arguments[name] = _argument(what, name, value, hints()[name])
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's type hints, with placeholders for what its module imports for the type checker alone."""
    function = inspect.unwrap(function)
    return typing.get_type_hints(function, localns=_Names(function.__globals__))


class _Names(dict[str, Any]):
    """Names of a module, with a class of no meaning for those that it imports for the type checker alone."""

    def __missing__(self, name: str) -> Any:
        placeholder = type(name, (), {"__class_getitem__": classmethod(lambda cls, item: cls)})
        return getattr(builtins, name, None) or placeholder


def _argument(what: str, name: str, value: Any, hint: Any) -> Any:
    if not _is_plain(hint):
        return value
    try:
        return convert(value, hint)
    except TypeError:
        raise InputError(f"{what}: {name} is {reprlib.repr(value)}; expected {words(hint)}") from None


def _is_plain(hint: Any) -> bool:
    """Whether values of a type can be checked here: numbers, texts, paths, choices, settings, and sequences of such."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return True
    if origin in (typing.Union, types.UnionType, tuple, list, collections.abc.Sequence):
        return all(_is_plain(member) for member in members if member is not Ellipsis)
    return hint in (int, float, bool, str, Path, type(None)) or dataclasses.is_dataclass(hint)


def convert(value: Any, hint: Any) -> Any:
    """The value in a type; a TypeError if it has no equal there."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a scalar of numpy or torch
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _as_one_of(value, members)
    if origin is typing.Literal:
        return _as_literal(value, members)
    if origin is tuple:
        return _as_tuple(value, members)
    if origin in (list, collections.abc.Sequence):
        return list(_as_tuple(value, (*members, ...)))
    if hint is type(None) and (value is None or value == "none"):
        return None
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return operator.index(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint in (str, Path) and isinstance(value, str | os.PathLike):
        return hint(value)
    if dataclasses.is_dataclass(hint) and isinstance(value, hint):  # type: ignore[arg-type]
        return value
    raise TypeError


def parse(value: Any, hint: Any) -> Any:
    """A value of YAML, or a text of a command line, in a type; a TypeError if it has no equal there.

    YAML 1.1 reads 5e-4 as a text, and a bare no, off or null as something that a reader may not have meant. A path may begin
    with the home folder, `~/`, which a shell leaves alone in `--out=~/runs`; it may not be empty, as that of a variable that
    is not set.
    """
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value == "" and Path in members:
            raise TypeError
        order = sorted(members, key=_parsing_order)
        for member in order:
            try:
                return parse(value, member)
            except TypeError:
                continue
        raise TypeError
    if origin in (tuple, list, collections.abc.Sequence) and isinstance(value, list | tuple):
        hints = [members[0]] * len(value) if origin is not tuple or members[-1] is Ellipsis else list(members)
        if len(hints) != len(value):
            raise TypeError
        return convert([parse(item, item_hint) for item, item_hint in zip(value, hints, strict=True)], hint)
    if hint in (str, Path) and isinstance(value, int | float) and not isinstance(value, bool):
        return hint(str(value))
    if not isinstance(value, str):
        return convert(value, hint)
    if hint is type(None) and value.lower() in ("none", "null", "~"):
        return None
    if hint is bool and value.lower() in _SWITCH:
        return _SWITCH[value.lower()]
    if hint is Path and not value:
        raise TypeError
    if hint in (str, Path) and value.startswith("~/"):
        return hint(_in_home(value))
    if origin is typing.Literal and "no" in members and _SWITCH.get(value.lower()) is False:
        return "no"
    if hint in (int, float):
        try:
            return convert(hint(value.replace("_", "x")), hint)
        except ValueError:
            raise TypeError from None
    return convert(value, hint)


def _in_home(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # an account without a home folder
        return Path(path)


_SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _parsing_order(hint: Any) -> int:
    """A text is a text only if it is nothing else; a choice called none is meant by none."""
    if typing.get_origin(hint) is typing.Literal:
        return 0
    order: list[Any] = [type(None), int, float, bool, Path, str]
    return order.index(hint) + 1 if hint in order else 0


def read_settings(kind: Any, settings: collections.abc.Mapping[str, Any], what: str) -> dict[str, Any]:
    """Settings of YAML by name in the types of a dataclass's fields, those of dataclasses in it nested.

    Args:
        kind: the dataclass.
        settings: what was read.
        what: whose settings they are, for messages.

    Raises:
        InputError: a name that is none, with the nearest one, or a value of another type.
    """
    hints = typing.get_type_hints(kind)
    found = {}
    for name, value in settings.items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), list(hints), 1)
            raise InputError(f"{what}: no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        hint: Any = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, collections.abc.Mapping):
            found[name] = hint(**read_settings(hint, value, f"{what}: {name}"))  # type: ignore[operator]
            continue
        try:
            found[name] = parse(value, hint)
        except TypeError:
            raise InputError(f"{what}: {name} is {reprlib.repr(value)}; expected {words(hint)}") from None
    return found


def precision_of(value: Any, choices: tuple[Any, ...]) -> Any:
    """The choice that names the same precision as a value, such as "bf16", "bfloat16" or torch.bfloat16; else the value."""
    name = getattr(value, "__name__", None) or str(value).rpartition(".")[2]  # of numpy's types, and of torch's dtypes
    for same in PRECISIONS:
        if name in same:
            return next((choice for choice in choices if choice in same), value)
    return value


def _as_one_of(value: Any, members: tuple[Any, ...]) -> Any:
    # Whole numbers before fractions, and "none" a name only where nothing else is meant by it.
    order = sorted(members, key=lambda member: (member is float, member is type(None)))
    if isinstance(value, str) and value == "none" and type(None) in members and str in members:
        return None
    for member in order:
        try:
            return convert(value, member)
        except TypeError:
            continue
    raise TypeError


def _as_literal(value: Any, choices: tuple[Any, ...]) -> Any:
    if hasattr(value, "tolist"):
        raise TypeError
    for choice in choices:
        # YAML reads a bare `no` as false, and `null` for a choice that is called none.
        meant = {"no": False, "none": None}.get(choice, choice) if not isinstance(value, str) else choice
        if type(value) is type(meant) and value == meant:
            return choice
    same = precision_of(value, choices)
    if same in choices:
        return same
    raise TypeError


def _as_tuple(value: Any, members: tuple[Any, ...]) -> tuple[Any, ...]:
    if hasattr(value, "tolist"):
        value = value.tolist()  # an array of numpy or a tensor
    if not isinstance(value, collections.abc.Sequence) or isinstance(value, str | bytes):
        raise TypeError
    hints = members[:1] * len(value) if members[-1] is Ellipsis else members
    if len(hints) != len(value):
        raise TypeError
    return tuple(convert(item, hint) for item, hint in zip(value, hints, strict=True))


def words(hint: Any) -> str:
    """A type hint as people say it."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(words(member) for member in members)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, members))}" if len(members) > 1 else str(members[0])
    if origin is tuple:
        return "a list of numbers" if members[-1] is Ellipsis else f"{len(members)} numbers"
    if origin in (list, collections.abc.Sequence):
        return {int: "a list of whole numbers", float: "a list of numbers"}.get(members[0], "a list")
    known = {
        type(None): "none",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a string",
        Path: "a path",
    }
    return known.get(hint, getattr(hint, "__name__", str(hint)))
