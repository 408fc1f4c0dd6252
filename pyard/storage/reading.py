"""One way of reading a file that may be damaged, hostile, or something else altogether: JSON, YAML, text, bytes.

A file is read only if it is a regular one and not larger than its kind may be, and what it holds may nest only so deep.
Whatever is wrong is an `InputError` of one line that names the path. numpy's files are in `arrays.py`, safetensors in
`tensor_files.py`, pickles in `pickles.py`.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pyard.errors import InputError

# JSON takes up to 40 times its size in memory.
MOST_JSON_BYTES = 2**25
# Of the longest that pyard writes: manifests, and what a run began with, may list a label for each of some ten million samples.
MOST_LABELLED_BYTES = 2**27
# PyYAML reads about 100 KB a second.
MOST_YAML_BYTES = 2**19
MAX_DEPTH = 100
_MOST_YAML_NODES = 10**5  # with aliases written out

# What reading code of pyard, of the standard library and of numpy raises where a file is not what it was taken for. Exceptions
# that mean a fault of pyard's own in any case (NameError, ImportError, NotImplementedError) are not among them.
DAMAGE: tuple[type[BaseException], ...] = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, RecursionError, struct.error,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class UnreadableError(InputError):
    """The system cannot read a file, which may be whole: a failing disk, a lost network, no permission."""


@contextmanager
def reading(path: Path | str, expected: str = "", *also: type[BaseException], what: str = "") -> Iterator[None]:
    """What a damaged file makes the block raise becomes an InputError that names the file.

    Args:
        path: where what the block works on comes from.
        expected: what it should have been, and what to do; ends the message.
        also: exceptions beside `DAMAGE`: those of a library.
        what: it was read as, such as "as a picture".
    """
    try:
        yield
    except InputError:
        raise
    except (*DAMAGE, *also) as error:
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
            raise  # torch's, of which the file is not guilty
        raise damaged(path, error, expected, what) from None


def damaged(path: Path | str, error: BaseException, expected: str = "", what: str = "") -> InputError:
    """What to say of a file that could not be read because of `error`."""
    found = " ".join(str(error).split())[:300]
    if isinstance(error, OSError) and error.strerror:
        found = error.strerror
    elif isinstance(error, KeyError):
        found = f"there is no {found}"
    elif not found or type(error) not in (ValueError, InputError):
        found = f"{type(error).__name__}: {found}" if found else type(error).__name__
    read = f"cannot be read {what}".rstrip()
    kind = UnreadableError if isinstance(error, OSError) and error.errno is not None else InputError
    return kind(f"{path} {read} ({found})" + (f"; {expected}" if expected else ""))


@contextmanager
def regular_file(path: Path, most: int | None = None) -> Iterator[IO[bytes]]:
    """A file opened for reading, if it is a regular one: a pipe would never end to be waited for, nor a device to be read.

    Args:
        path: the file, or a link to it.
        most: bytes that a file of its kind may have; None: any number.

    Raises:
        InputError: missing, not a regular file, not readable, or too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except (OSError, ValueError) as error:  # such as a NUL in the name
        raise damaged(path, error) from None
    _require_regular(descriptor, path)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if most is not None and size > most:
            raise InputError(
                f"{path}: {size} bytes; a file of this kind has at most {most}. It is damaged, or a different file"
            )
        yield file


def require_regular(path: Path, most: int | None = None) -> None:
    """Raises InputError unless the file is one that `regular_file` opens: before a library is told to open it."""
    with regular_file(path, most):
        pass


def require_readable(path: Path) -> None:
    """Raises InputError unless every byte of a regular file can be read: before it is mapped, since a process that meets an
    error of the disk in a mapping is killed."""
    with regular_file(path) as file:
        buffer = memoryview(bytearray(2**20))
        try:
            while file.raw.readinto(buffer):  # type: ignore[attr-defined]
                pass
        except OSError as error:
            raise damaged(path, error) from None


def read_bytes(path: Path, most: int | None = MOST_JSON_BYTES) -> bytes:
    """The bytes of a regular file; errors as of `regular_file`."""
    with regular_file(path, most) as file:
        try:
            return file.read()
        except OSError as error:
            raise damaged(path, error) from None


def read_text(path: Path, most: int | None = MOST_JSON_BYTES) -> str:
    """A text in UTF-8, with or without a byte order mark; errors as of `regular_file`, and of other encodings."""
    return decode(read_bytes(path, most), path)


def decode(content: bytes, path: Path | str) -> str:
    """The text of bytes in UTF-8 that were found in `path`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def read_json(path: Path, most: int | None = MOST_JSON_BYTES, *, finite: bool = True) -> Any:
    """The value in a JSON file; an InputError if it is none, see `parse_json`."""
    return parse_json(read_bytes(path, most), path, finite=finite)


def read_object(
    path: Path, what: str = "a JSON object", most: int | None = MOST_JSON_BYTES, *, finite: bool = True
) -> dict[str, Any]:
    """The object in a JSON file; an InputError that says `what` was expected if there is another value."""
    return as_object(read_json(path, most, finite=finite), path, what)


def as_object(value: Any, path: Path | str, what: str = "a JSON object") -> dict[str, Any]:
    """A value that was found in `path`, if it is an object."""
    if not isinstance(value, dict):
        raise InputError(f"{path}: found {_short(value)}; expected {what}")
    return value


def parse_json(text: bytes | str, path: Path | str, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        text: in UTF-8, with or without a byte order mark.
        path: where it was found; may name a line.
        finite: refuse NaN and Infinity, which JSON does not have and Python writes.

    Raises:
        InputError: no JSON, a key that appears twice, half a character, or values nested deeper than `MAX_DEPTH`.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid JSON (not UTF-8: {error.reason} at byte {error.start})") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_not_finite if finite else None)
        if "\\u" in text and not _has_whole_characters(value):
            raise ValueError("it has a lone surrogate, which is not a character")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({' '.join(str(error).split())[:200]})") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise InputError(f"{path}: values nested deeper than {MAX_DEPTH}; it is damaged, or a different file")
    return value


def read_yaml(path: Path, most: int = MOST_YAML_BYTES, *, as_written: bool = False) -> Any:
    """The value in a YAML file; an InputError if it is none, see `parse_yaml`."""
    return parse_yaml(read_text(path, most), path, as_written=as_written)


def parse_yaml(text: str, path: Path | str, *, as_written: bool = False) -> Any:
    """The value of a YAML text: plain data, never an object of a class that the text names.

    Args:
        text: of any number of lines.
        path: where it was found.
        as_written: keep a date, and a number that Python writes in another way, as the text that it is written as: YAML 1.1
            reads 010 as 8, 12:30 as 750 and 1.10 as 1.1, and only a setting's type can tell what was meant
            (`pyard.storage.typed.parse`).

    Raises:
        InputError: no YAML, a key that appears twice, values nested deeper than `MAX_DEPTH`, or aliases that stand for more
            values than any file of settings has ("billion laughs").
    """
    # Here, since a machine that runs ONNX students alone may have no yaml.
    import yaml

    try:
        _check_yaml(yaml.parse(text, Loader=yaml.SafeLoader), yaml, path)
        return yaml.load(text, Loader=_yaml_loader(yaml, path, as_written))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())[:300]})") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not valid YAML ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None


def _yaml_loader(yaml: Any, path: Path | str, as_written: bool) -> Any:
    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def flatten_mapping(self, node: Any) -> None:
            lines: dict[str, int] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                line = key.start_mark.line + 1
                if lines.setdefault(key.value, line) != line:
                    raise InputError(f"{path}, line {line}: {key.value!r} is in line {lines[key.value]} as well; give it once")
            super().flatten_mapping(node)

    def written(loader: Any, node: Any) -> Any:
        value = yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
        return value if isinstance(value, int | float) and str(value) == node.value else node.value

    if as_written:
        for kind in ("int", "float", "timestamp"):
            Loader.add_constructor(f"tag:yaml.org,2002:{kind}", written)
    return Loader


def _check_yaml(events: Iterator[Any], yaml: Any, path: Path | str) -> None:
    """Walk the events of a text, which takes no recursion, before its values are built, which does."""
    sizes: dict[str, int] = {}  # values under an anchor, aliases written out
    open_values: list[tuple[str | None, int]] = []  # anchor, and values in all before it
    count = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            open_values.append((event.anchor, count))
            count += 1
            if len(open_values) > MAX_DEPTH:
                raise InputError(f"{path}: values nested deeper than {MAX_DEPTH}; expected a mapping of settings")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_values.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_values):
                raise InputError(f"{path}: the alias *{event.anchor} contains itself; expected a mapping of settings")
            count += sizes.get(event.anchor, 1)
        if count > _MOST_YAML_NODES:
            raise InputError(
                f"{path}: more than {_MOST_YAML_NODES} values once its aliases are expanded; expected a mapping of settings"
            )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _has_whole_characters(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_finite(constant: str) -> Any:
    raise ValueError(f"it holds {constant}, which is not a number")


def _depth(value: Any) -> int:
    """Of lists and dictionaries; without recursion."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
    return depth


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _require_regular(descriptor: int, path: Path) -> None:
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for check, name in _KINDS if check(mode)), "something else")
        raise InputError(f"{path} is {kind}; expected a regular file")


_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)  # fmt: skip
