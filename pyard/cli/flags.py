"""From the words of a command line, and a YAML file, to a function's arguments."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import inspect
import itertools
import json
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyard.errors import InputError
from pyard.storage.reading import as_object, parse_yaml, read_yaml
from pyard.storage.typed import hints_of, parse, words

_REQUIRED = inspect.Parameter.empty
_LISTS = (list, tuple, collections.abc.Sequence)


class Flag(NamedTuple):
    """What a flag takes, and what it is without being given."""

    hint: Any
    default: Any = _REQUIRED


def flags_of(target: Any) -> dict[str, Flag]:
    """The flags of a function or of a dataclass; fields of dataclasses in it are `outer.inner`."""
    hints = typing.get_type_hints(target) if dataclasses.is_dataclass(target) else hints_of(target)
    flags: dict[str, Flag] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        hint = hints.get(name, parameter.annotation)
        if dataclasses.is_dataclass(hint):
            flags |= {f"{name}.{inner}": flag for inner, flag in flags_of(hint).items()}
        else:
            flags[name] = Flag(hint, parameter.default)
    return flags


def read_flags(
    argv: Sequence[str],
    flags: dict[str, Flag],
    *,
    bare: Sequence[str] = (),
    positional: Sequence[str] = (),
    complete: bool = True,
) -> Any:
    """The values that words and the YAML files of `--config` give to flags, by name; flags come before files.

    Args:
        argv: the words. `--num-steps 3`, `--num_steps 3` and `--num_steps=3` are the same; a lone switch is true; a flag that
            takes a list takes several values, `3,4`, or JSON.
        flags: what there is.
        bare: flags that may stand without a value, for their default.
        positional: flags whose values may stand first, without the flag.
        complete: refuse words that leave out a flag that has no default.

    Raises:
        InputError: an unknown flag, with the nearest one; a value that does not fit; a flag that is missing.
    """
    leading = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))[: len(positional)]
    named = [word for name, value in zip(positional, leading, strict=False) for word in (f"--{name}", value)]
    files: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for name, values in _split([*named, *argv[len(leading) :]]):
        if name == "config":
            for value in values or [""]:
                files |= _from_file(value, flags)
            continue
        flag = _known(name, flags)
        if values or name not in bare:
            value = _from_words(name, values, flag.hint)
            if given.setdefault(name, value) != value:
                raise InputError(_given_twice(name, given[name], value, flag.hint))
    found = {**files, **given}
    missing = [name for name, flag in flags.items() if flag.default is _REQUIRED and name not in found]
    if missing and complete:
        raise InputError(f"{' and '.join(f'--{name}' for name in missing)} {'is' if len(missing) == 1 else 'are'} missing")
    return found


def arguments(target: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Values by flag as arguments of the function or dataclass, whose dataclasses are made of their own flags."""
    hints = typing.get_type_hints(target) if dataclasses.is_dataclass(target) else hints_of(target)
    inner: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {}
    for name, value in found.items():
        outer, dot, field = name.partition(".")
        if dot:
            inner.setdefault(outer, {})[field] = value
        else:
            result[name] = value
    return result | {name: hints[name](**arguments(hints[name], values)) for name, values in inner.items()}


def _given_twice(name: str, first: Any, second: Any, hint: Any) -> str:
    takes_several = any(typing.get_origin(kind) in _LISTS for kind in _members(hint))
    both = " ".join(str(item) for value in (first, second) for item in (value if isinstance(value, list | tuple) else [value]))
    return f"--{name} is given twice, as {first} and {second}; give it once" + (f": --{name} {both}" if takes_several else "")


def _split(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with its values."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            groups.append((name.replace("-", "_"), [value] if equals else []))
        elif not groups or (word.startswith("-") and not _is_number(word)):
            raise InputError(f"unexpected {word!r}; expected a flag, such as --help")
        else:
            groups[-1][1].append(word)
    return groups


def _known(name: str, flags: dict[str, Flag]) -> Flag:
    if name in flags:
        return flags[name]
    near = difflib.get_close_matches(name, flags, 1, cutoff=0.5) or [flag for flag in flags if flag.startswith(name)][:1]
    raise InputError(f"unknown flag --{name}" + (f"; did you mean --{near[0]}?" if near else "; --help lists all flags"))


def _from_words(name: str, values: list[str], hint: Any) -> Any:
    kinds = _members(hint)
    lists = [kind for kind in kinds if typing.get_origin(kind) in _LISTS]
    if not values:
        if bool in kinds:
            return True
        raise InputError(f"--{name} needs a value: expected {words(hint)}")
    value: Any = values if len(values) > 1 else values[0]
    if lists and isinstance(value, str):
        value = _as_list(value, lists, is_whole=str in kinds or Path in kinds)
    if isinstance(value, list) and not lists:
        raise InputError(f"--{name} takes one value; found {' '.join(map(repr, value))}")
    try:
        return parse(value, hint)
    except TypeError:
        shown = value if isinstance(value, str) else " ".join(map(str, value))
        raise InputError(f"--{name} is {shown!r}; expected {words(hint)}") from None


def _as_list(text: str, lists: list[Any], is_whole: bool) -> Any:
    """A single word for a flag that takes a list: JSON or YAML in brackets, numbers with commas, or itself.

    Args:
        text: the word.
        lists: the kinds of list that the flag takes.
        is_whole: whether it takes a text or path as well, such as a file of prompts in place of a list of prompts.
    """
    if text.startswith(("[", "(")):
        try:
            found = parse_yaml(f"[{text[1:-1]}]", "a flag", as_written=True)
        except InputError:
            return text
        return found if isinstance(found, list) else text
    pieces = [piece.strip() for piece in text.split(",")]
    if len(pieces) > 1 and all(map(_is_number, pieces)):
        return pieces
    if is_whole:
        return text
    # A list of one, unless the text is more likely to be what else the flag takes, such as `none`.
    items = [item for kind in lists for member in typing.get_args(kind) for item in _members(member)]
    return [text] if _is_number(text) or (str in items and text.lower() not in ("none", "null")) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _from_file(name: str, flags: dict[str, Flag]) -> dict[str, Any]:
    """The flags that a YAML file gives, nested ones as `outer.inner`."""
    # Not needed where only students in ONNX files run, which have no torch.
    from pyard.training.config import recipe_file

    file = recipe_file(name)
    content = as_object(read_yaml(file, as_written=True), f"--config {name}", "a mapping of settings")
    found = {}
    for key, value in _flattened(content, flags):
        try:
            flag = _known(key, flags)
            if key in found:
                raise InputError(f"{key} is given twice; give it once")
            found[key] = parse(value, flag.hint)
        except InputError as error:
            raise InputError(f"--config {name}: {error}") from None
        except TypeError:
            raise InputError(f"--config {name}: {key} is {value!r}; expected {words(flag.hint)}") from None
    return found


def _flattened(content: dict[Any, Any], flags: dict[str, Flag]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if isinstance(value, dict) and any(flag.startswith(f"{name}.") for flag in flags):
            pairs += [(f"{name}.{inner}", deeper) for inner, deeper in _flattened(value, flags)]
        else:
            pairs.append((name, value))
    return pairs


def as_yaml(target: Callable[..., Any], found: dict[str, Any]) -> str:
    """All settings of a command that were given or have a default, as a file that `--config` reads."""
    import yaml

    nested: dict[str, Any] = {}
    for name, flag in flags_of(target).items():
        value = found.get(name, flag.default)
        if value is _REQUIRED:
            continue
        *outer, last = name.split(".")
        place = nested
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    plain = json.loads(json.dumps(nested, default=lambda value: str(value) if isinstance(value, Path) else None))
    return str(yaml.safe_dump(plain, sort_keys=False))
