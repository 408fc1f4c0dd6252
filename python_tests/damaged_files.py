"""Ways to damage a file: what a broken copy, a disk, an editor, another program or an attacker would leave in its place.

A damage takes a file and a random generator and leaves something else under that name. Its `certain` says whether that cannot
be read any more, so that reading it must be refused.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Rewrite = Callable[[bytes, random.Random], bytes]

_HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n"
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
# In place of a value; texts are put in raw.
_VALUES = (
    "null", "true", "-1", "0", "1", "1000000000", "1000000000000000000000000000000", "1.5", "-0.0", "1e400", "NaN", "-Infinity",
    '"text"', '""', '"\\ud800"', "[]", "{}", "[1]", '{"a": 1}', "[" * 40 + "]" * 40, "[" * 5000 + "]" * 5000,
    "[" + ",".join(["1"] * 5000) + "]", '"' + "x" * 10000 + '"', "1" * 5000, "[[1, 2], [3]]",
)  # fmt: skip


class Damage(NamedTuple):
    """One way to damage a file.

    Args:
        name: for messages.
        apply: does it, given the file and a random generator.
        certain: whether the file cannot be read any more.
    """

    name: str
    apply: Callable[[Path, random.Random], None]
    certain: bool


def rewriting(name: str, rewrite: Rewrite, *, certain: bool = False) -> Damage:
    """A damage of a file's bytes."""

    def apply(path: Path, rng: random.Random) -> None:
        content = path.read_bytes()
        path.write_bytes(rewrite(content, rng))

    return Damage(name, apply, certain)


def _instead(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def _flip(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        if damaged:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _zeros(content: bytes, rng: random.Random) -> bytes:
    """What a power cut leaves of pages that were never written."""
    start = rng.randrange(max(len(content), 1))
    return content[:start] + bytes(len(content) - start)


ANY_FILE: tuple[Damage, ...] = (
    rewriting("cut off", lambda content, rng: content[: rng.randrange(max(len(content) // 2, 1))]),
    rewriting("a byte short", lambda content, rng: content[:-1]),
    rewriting("empty", lambda content, rng: b"", certain=True),
    rewriting("flipped bits", _flip),
    rewriting("zeros", _zeros),
    rewriting("noise", lambda content, rng: rng.randbytes(len(content)), certain=True),
    rewriting("more behind", lambda content, rng: content + rng.randbytes(100)),
    rewriting("twice", lambda content, rng: content + content),
    rewriting("web page", lambda content, rng: _HTML, certain=True),
    rewriting("pointer", lambda content, rng: _POINTER, certain=True),
    rewriting("brackets", lambda content, rng: b"[" * 50_000, certain=True),
    rewriting("zeros alone", lambda content, rng: bytes(len(content)), certain=True),
    Damage("pipe", lambda path, rng: _instead(path, os.mkfifo), True),
    Damage("device", lambda path, rng: _instead(path, lambda p: p.symlink_to("/dev/zero")), True),
    Damage("folder", lambda path, rng: _instead(path, Path.mkdir), True),
    Damage("link to itself", lambda path, rng: _instead(path, lambda p: p.symlink_to(p.name)), True),
    Damage("missing", lambda path, rng: path.unlink(), False),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values within a value are."""
    found = [at] if at else []
    if isinstance(value, dict):
        found += [place for key in value for place in places(value[key], (*at, key))]
    elif isinstance(value, list):
        found += [place for i in range(min(len(value), 3)) for place in places(value[i], (*at, i))]
    return found


def changed_value(value: Any, rng: random.Random) -> str:
    """JSON with one value in it replaced by something else, left out, or under another name."""
    value = json.loads(json.dumps(value))
    spots = places(value)
    if not spots:
        return rng.choice(_VALUES)
    *way, last = rng.choice(spots)
    home = value
    for step in way:
        home = home[step]
    what = rng.random()
    if what < 0.1 or (what < 0.15 and isinstance(home, list)):
        del home[last]
    elif what < 0.15:
        home[f"{last}_"] = home.pop(last)
    elif what < 0.3 and isinstance(home[last], int | float) and not isinstance(home[last], bool):
        home[last] = rng.choice((-home[last], home[last] * 2, home[last] + 1, home[last] / 3, str(home[last])))
    else:
        home[last] = "HERE"
        return json.dumps(value).replace('"HERE"', rng.choice(_VALUES), 1)
    return json.dumps(value)


def _other_json(content: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"[]", b"null", b"7", b'"text"', b"[1, 2, 3]", b"true", b"NaN", content.replace(b"{", b"[{", 1) + b"]"))


def _twice_named(content: bytes, rng: random.Random) -> bytes:
    value = json.loads(content)
    key = rng.choice(list(value))
    return json.dumps(value).replace("{", "{" + json.dumps(key) + ": null, ", 1).encode()


JSON_FILE: tuple[Damage, ...] = (
    *(rewriting("changed value", lambda content, rng: changed_value(json.loads(content), rng).encode()),) * 8,
    rewriting("another value", _other_json, certain=True),
    rewriting("a key twice", _twice_named, certain=True),
    rewriting("deep", lambda content, rng: b'{"a":' * 20_000 + b"1" + b"}" * 20_000, certain=True),
    rewriting("UTF-16", lambda content, rng: content.decode().encode("utf-16"), certain=True),
    rewriting("a mark", lambda content, rng: b"\xef\xbb\xbf" + content),
)


def _header(content: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _with_header(header: str, data: bytes) -> bytes:
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _changed_header(content: bytes, rng: random.Random) -> bytes:
    header, data = _header(content)
    return _with_header(changed_value(header, rng), data)


def _named(content: bytes, rng: random.Random) -> bytes:
    """A tensor under another name, such as that of a block far beyond the last."""
    header, data = _header(content)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    new = rng.choice(("blocks.1000000000.mlp.fc1.weight", "trunk.blocks.999999999.fc1.weight", "x", "", "../../x", name + ".x"))
    header = {new if key == name else key: value for key, value in header.items()}
    return _with_header(json.dumps(header), data)


def _lengths(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice((0, 1, 2**16, 2**31, 2**63, 2**64 - 1, len(content) * 2))
    return struct.pack("<Q", size) + content[8:]


def _not_a_number(content: bytes, rng: random.Random) -> bytes:
    header, data = _header(content)
    floats = [entry for name, entry in header.items() if name != "__metadata__" and entry["dtype"] == "F32" and entry["shape"]]
    if not floats:
        return content[:-4]
    begin, end = rng.choice(floats)["data_offsets"]
    at = begin + 4 * rng.randrange((end - begin) // 4)
    number = struct.pack("<f", rng.choice((float("nan"), float("inf"))))
    return _with_header(json.dumps(header), data[:at] + number + data[at + 4 :])


SAFETENSORS: tuple[Damage, ...] = (
    *(rewriting("changed header", _changed_header),) * 4,
    *(rewriting("other names", _named),) * 2,
    rewriting("header's length", _lengths, certain=True),
    rewriting("no number", _not_a_number, certain=True),
)


class Runs:
    """Pickles to a call that leaves a trace."""

    def __init__(self, trace: str):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.trace,)


def _runs_code(path: Path, rng: random.Random) -> None:
    trace = str(path.parent / "code-was-executed")
    _instead(path, lambda p: p.write_bytes(pickle.dumps(Runs(trace), protocol=rng.choice((0, 2, 4)))))


def _rezip(content: bytes, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with other contents; None leaves a member out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            found = change(name, old.read(name))
            if found is not None:
                new.writestr(name, found)
    return out.getvalue()


def _member(content: bytes, rng: random.Random, rewrite: Callable[[bytes], bytes | None]) -> bytes:
    names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    chosen = rng.choice(names)
    return _rezip(content, lambda name, held: rewrite(held) if name == chosen else held)


def _pickle_in_zip(path: Path, rng: random.Random) -> None:
    trace = str(path.parent / "code-was-executed")
    content = path.read_bytes()
    evil = pickle.dumps({"model": Runs(trace)}, protocol=2)
    _instead(path, lambda p: p.write_bytes(_rezip(content, lambda n, held: evil if n.endswith("data.pkl") else held)))


def _larger_tensors(content: bytes, rng: random.Random) -> bytes:
    """Shapes and sizes of storages in the pickle grow, while the numbers stay as they are."""

    def grow(held: bytes) -> bytes:
        # BININT1 and BININT2 of small numbers become BININT of large ones, of which the pickle has no addresses.
        spots = [i for i in range(len(held) - 1) if held[i : i + 1] == b"K" and held[i + 1] in (2, 4, 8, 16, 32, 64)]
        for i in sorted(rng.sample(spots, min(len(spots), 3)), reverse=True):
            held = held[:i] + b"J" + struct.pack("<i", rng.choice((2**20, 2**30, 2**31 - 1))) + held[i + 2 :]
        return held

    return _rezip(content, lambda name, held: grow(held) if name.endswith("data.pkl") else held)


ZIP: tuple[Damage, ...] = (
    *(rewriting("damaged member", lambda content, rng: _member(content, rng, lambda held: _flip(held, rng))),) * 2,
    rewriting("short member", lambda content, rng: _member(content, rng, lambda held: held[: len(held) // 2])),
    rewriting("no member", lambda content, rng: _member(content, rng, lambda held: None)),
    rewriting("empty archive", lambda content, rng: _rezip(content, lambda name, held: None), certain=True),
)
PICKLE: tuple[Damage, ...] = (
    *ZIP,
    Damage("code", _runs_code, True),
    Damage("code in an archive", _pickle_in_zip, True),
    *(rewriting("larger tensors", _larger_tensors),) * 2,
    rewriting("compressed", lambda content, rng: _rezip(content, lambda n, held: held, zipfile.ZIP_DEFLATED), certain=True),
)


def npy(shape: str, descr: str = "'<f4'", data: bytes = b"", order: str = "False") -> bytes:
    """An `.npy` file with this header, whatever follows it."""
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) % 2**16) + header + data


_HEADERS = (
    ("(1000000000000,)", "'<f4'"), ("(-1,)", "'<f4'"), ("(2, 2)", "'|O'"), ("()", "'<f4'"), ("(True, 2)", "'<f4'"),
    ("(0, 0, 0, 0)", "'|u1'"), ("(" * 2000 + ")" * 2000, "'<f4'"), ("(2,)", "[('a', '<f4')]"), ("(4,)", "'<U9999999'"),
    ("(2, 2, 2, 9)", "'|u1'"), ("(3, 4, 4, 3)", "'<c16'"), ("(2**70,)", "'<f4'"), ("(10**6, 10**6)", "'|u1'"),
)  # fmt: skip


def _headers(content: bytes, rng: random.Random) -> bytes:
    shape, descr = rng.choice(_HEADERS)
    return _member(content, rng, lambda held: npy(shape, descr, rng.choice((b"", bytes(64), held[128:]))))


def _bomb(content: bytes, rng: random.Random) -> bytes:
    """An archive of a few KB that unpacks to 3 GB, of which the directory may or may not know."""
    size = 3 * 2**30
    chosen = zipfile.ZipFile(io.BytesIO(content)).namelist()[0]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece, packed = bytes(2**24), []
    head = npy(f"({size},)", "'|u1'")
    packed.append(packer.compress(head))
    packed += [packer.compress(piece) for _ in range(4)]
    packed.append(packer.flush())
    data = b"".join(packed)
    name = chosen.encode()
    fields = (20, 0, 8, 0, 0, 0, len(data), size if rng.random() < 0.5 else len(head) + 4 * len(piece), len(name))
    local = b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", *fields, 0) + name + data
    central = b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, *fields, 0, 0, 0, 0, 0, 0) + name
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + end


NPZ: tuple[Damage, ...] = (
    *ZIP, *(rewriting("headers", _headers),) * 3, rewriting("bomb", _bomb, certain=True),
)  # fmt: skip


def _png(width: int, height: int, data: bytes, mode: int = 2) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    about = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def _picture_bomb(content: bytes, rng: random.Random) -> bytes:
    width, height = rng.choice(((50_000, 50_000), (2**31 - 1, 1), (1, 2**31 - 1), (0, 10), (20_000, 20_000), (1, 400_000)))
    return _png(width, height, bytes(10_000))


PICTURE: tuple[Damage, ...] = (*(rewriting("picture bomb", _picture_bomb, certain=True),) * 4,)


def _yaml_value(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode().splitlines()
    spots = [i for i, line in enumerate(lines) if ":" in line]
    i = rng.choice(spots)
    values = (
        *_VALUES[:19],
        "*a",
        "&a [*a]",
        "!!python/object/apply:os.system [touch x]",
        "2026-01-01",
        "0x10",
        "no",
        "~",
        "|",
        "1_0",
    )
    lines[i] = lines[i].partition(":")[0] + ": " + rng.choice(values)
    return ("\n".join(lines) + "\n").encode()


def _laughs(content: bytes, rng: random.Random) -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return ("\n".join(lines) + "\n").encode()


YAML_FILE: tuple[Damage, ...] = (
    *(rewriting("changed value", _yaml_value),) * 10,
    rewriting("a million laughs", _laughs, certain=True),
    rewriting("another value", lambda content, rng: rng.choice((b"- 1\n", b"7\n", b"text\n", b"~\n")), certain=True),
    rewriting("no UTF-8", lambda content, rng: content + "# ä".encode("latin-1"), certain=True),
    rewriting("a tab", lambda content, rng: b"\t" + content, certain=True),
    rewriting("an object", lambda content, rng: b"out: !!python/object/new:os.system [touch x]\n" + content, certain=True),
    rewriting("twice as deep", lambda content, rng: b"teacher: " + b"{a: " * 5000 + b"1" + b"}" * 5000, certain=True),
)

JSON_LINES: tuple[Damage, ...] = tuple(
    rewriting(
        "a changed line",
        lambda content, rng: b"\n".join(
            [*(lines := content.rstrip(b"\n").split(b"\n"))[:-1], changed_value(json.loads(lines[-1]), rng).encode(), b""]
        ),
    )
    for _ in range(4)
)
