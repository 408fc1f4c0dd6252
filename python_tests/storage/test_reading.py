"""What a file claims is compared with what is there, and whatever is wrong is one line that names it."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaged_files import Runs, npy
from safetensors.torch import save_file

from pyard.errors import InputError
from pyard.storage.arrays import open_npz, read_npy, read_npz
from pyard.storage.files import write_text
from pyard.storage.folders import new_folder
from pyard.storage.log import read_log
from pyard.storage.numbers import number
from pyard.storage.pickles import ForeignObjectError, _Inert, read_pickle, require_names, require_sound
from pyard.storage.reading import MAX_DEPTH, parse_json, parse_yaml, read_bytes, read_json, read_text, read_yaml, reading
from pyard.storage.tensor_files import read_safetensors, require_finite, tensor_shapes

READERS: tuple[Callable[[Path], Any], ...] = (
    read_json, read_yaml, read_bytes, read_text, read_npz, read_npy, read_pickle, require_sound, read_safetensors,
    tensor_shapes,
)  # fmt: skip


@pytest.mark.parametrize("read", READERS)
def test_only_regular_files_are_read(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a pipe"), ("folder", "a folder"), ("link", "a device")):
        with pytest.raises(InputError, match=f"{name} is {kind}; expected a regular file"):
            read(tmp_path / name)
    with pytest.raises(InputError, match="none: missing"):
        read(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "\0")


def test_a_link_to_a_regular_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to("file")
    assert read_json(tmp_path / "link") == {"a": 1}


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    for read in (read_json, read_yaml, read_text):
        with pytest.raises(InputError, match=f"{2**40} bytes; a file of this kind has at most"):
            read(tmp_path / "large")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested deeper than 100"),
        ("[" * 10**6, "not valid JSON"),
        ('{"a": NaN}', "it holds NaN"),
        ('{"a": -Infinity}', "it holds -Infinity"),
        ('{"a": 1, "a": 2}', "a key appears twice"),
        ('["\\ud800"]', "lone surrogate"),
        ("1" * 5000, "not valid JSON"),
        (b"\xff\xfe{\0}\0", "not valid JSON .not UTF-8"),
    ],
)
def test_json_that_is_none(text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as failed:
        parse_json(text, "x.json")
    assert str(failed.value).startswith("x.json")
    assert "\n" not in str(failed.value)


def test_json_that_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1.5, null]}', "x") == {"a": [1.5, None]}
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deep, "x") is not None
    wide = "[" + "[],{}," * 500 + "[]]"
    assert len(parse_json(wide, "x")) == 1001
    assert np.isnan(parse_json("NaN", "x", finite=False))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 50_000, "nested deeper than 100"),
        ("\n".join("  " * i + "a:" for i in range(200)), "nested deeper than 100"),
        ("a: &a [*a]", "contains itself"),
        (
            "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10 if i else 'x')}]" for i in range(12)]),
            "its aliases are expanded",
        ),
        ("!!python/object/apply:os.system [true]", "not valid YAML"),
        ("a: *b", "not valid YAML"),
        ("a: 2026-99-99", "not valid YAML"),
        ("{[1, 2]: 3}", "not valid YAML"),
        ("a: [1", "not valid YAML"),
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is in line 1 as well; give it once"),
        ("b: {a: 1, c: 2,\n a: 1}", "line 2: 'a' is in line 1 as well"),
    ],
)
def test_yaml_that_is_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as failed:
        parse_yaml(text, "x.yaml")
    assert str(failed.value).startswith("x.yaml")
    assert "\n" not in str(failed.value)


def test_yaml_with_aliases_is_read() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {d: *x}", "x") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}


def test_yaml_keeps_what_only_a_settings_type_can_tell() -> None:
    text = "[8, 010, 1_000, 12:30, 0x10, 1.1, 1.10, 1.0e-05, 2026-01-02, no, null, '8', a: 010]"
    expected = [8, "010", "1_000", "12:30", "0x10", 1.1, "1.10", "1.0e-05", "2026-01-02", False, None, "8", {"a": "010"}]
    assert parse_yaml(text, "x", as_written=True) == expected
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, b: 2}", "x") == {"a": {"b": 1}, "c": {"b": 2}}


def test_pickles_hold_what_was_saved(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    content = {
        "a": weight,
        "tied": weight,
        "h": torch.randn(2).half(),
        "args": argparse.Namespace(n=3),
        "x": [1, None, "text", (2.5,)],
    }
    for new in (True, False):
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
        require_sound(tmp_path / "x.pt")
        found = read_pickle(tmp_path / "x.pt")
        assert torch.equal(found["a"], weight)
        assert torch.equal(found["h"], content["h"])
        assert (found["args"].n, found["x"]) == (3, content["x"])


@dataclass(frozen=True)
class Key:
    """What names a part of a tensor in the index of a sharded checkpoint."""

    number: int


def test_pickles_of_many_named_things_are_walked(tmp_path: Path) -> None:
    """As in a checkpoint of many ranks, whose keys are looked up by their hashes."""
    path = tmp_path / "many.pkl"
    path.write_bytes(pickle.dumps({Key(i): i for i in range(1000)}))
    require_names(path, {Key.__module__: {"Key"}})
    keys = [_Inert() for _ in range(1000)]
    assert len(set(map(hash, keys))) > 900


def test_numbers_beyond_floats_are_refused() -> None:
    with pytest.raises(InputError, match="rms is a number of 401 digits; expected one that a float can hold"):
        number("rms", 10**400)


def test_pickles_with_numbers_of_eight_bits_are_read(tmp_path: Path) -> None:
    saved = {"weight": torch.randn(4, 3).to(torch.float8_e4m3fn), "count": torch.tensor([1, 65535], dtype=torch.uint16)}
    torch.save(saved, tmp_path / "x.pt")
    found = read_pickle(tmp_path / "x.pt")
    assert found["weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(found["weight"].float(), saved["weight"].float())
    assert found["count"].tolist() == [1, 65535]


def test_pickles_of_optimisers_and_random_states_are_read(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "random": torch.get_rng_state(), "step": torch.tensor(3)}
    torch.save(state, tmp_path / "x.pt")
    found = read_pickle(tmp_path / "x.pt")
    optimizer.load_state_dict(found["optimizer"])
    assert torch.equal(found["random"], state["random"])


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_code_of_a_pickle_is_run(protocol: int, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    content = pickle.dumps({"model": Runs(str(trace))}, protocol=protocol)
    (tmp_path / "x.pt").write_bytes(content)
    torch.save({"a": torch.zeros(2)}, tmp_path / "zip.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, content if name.endswith("data.pkl") else good.read(name))
    for name in ("x.pt", "bad.pt"):
        for read in (read_pickle, require_sound):
            with pytest.raises(ForeignObjectError) as failed:
                read(tmp_path / name)
            assert failed.value.kind in ("posix.mkdir", "nt.mkdir")
    with pytest.raises(ForeignObjectError):
        require_names(tmp_path / "x.pt", {"collections": {"OrderedDict"}})
    assert not trace.exists()


def test_tensors_that_are_larger_than_their_file(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(16)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as good, zipfile.ZipFile(tmp_path / "short.pt", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name)[:8] if name.endswith("data/0") else good.read(name))
    # torch.load(weights_only=True) would return 64 bytes, of which 56 are not the file's.
    with pytest.raises(InputError, match="a tensor of 64 bytes, but only 8 are in the file"):
        read_pickle(tmp_path / "short.pt")
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "wide.pt")
    with pytest.raises(InputError, match="its tensors repeat few numbers"):
        read_pickle(tmp_path / "wide.pt")
    torch.save({"a": torch.zeros(4, 4).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(InputError):
        read_pickle(tmp_path / "sparse.pt")


def test_arrays_hold_what_was_saved(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "e": np.empty((0, 3)), "t": np.array("x")}
    arrays["f"] = np.asfortranarray(np.arange(6).reshape(2, 3))
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = read_npz(tmp_path / "x.npz")
        assert all(np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in arrays.items())
        assert all(array.flags.writeable for array in found.values())
    np.save(tmp_path / "x.npy", arrays["f"])
    assert np.array_equal(read_npy(tmp_path / "x.npy"), arrays["f"])
    with open_npz(tmp_path / "x.npz") as archive, archive.stream("a") as (header, stream):
        assert (header.shape, len(stream.read())) == ((2, 3), 48)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("(1000000000000,)"), "4000000000000 bytes, but has 0 bytes"),
        (npy("(2,)", "'<f4'", bytes(9)), "8 bytes, but has 9 bytes"),
        (npy("(-2,)"), "declares float32"),
        (npy("(2,)", "'|O'", bytes(16)), "Objects would be unpickled"),
        (npy("(2,)", "[('a', '<f4')]", bytes(8)), "expected numbers"),
        (npy("(" * 4000 + ")" * 4000), "header"),
        (b"\x93NUMPY\x09\x00", r"format \(9, 0\)"),
        (b"PK\x03\x04", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_arrays_whose_header_lies(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_npy(tmp_path / "x.npy")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x.npy", content)
    (tmp_path / "x.npz").write_bytes(archive.getvalue())
    with pytest.raises(InputError, match=message):
        read_npz(tmp_path / "x.npz")


def test_archives_that_unpack_to_far_more_are_bombs(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(2**25))
    with pytest.raises(InputError, match="unpack to 268435"):
        read_npz(tmp_path / "x.npz")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, float("inf")]).half(), "b": torch.arange(3)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors: a holds NaN or infinity"):
        require_finite(read_safetensors(tmp_path / "x.safetensors"), tmp_path / "x.safetensors")
    large = {"a": torch.full((10,), torch.finfo(torch.float64).max, dtype=torch.float64), "e": torch.empty(0)}
    require_finite({"a": torch.full((4,), 3e38), "e": torch.empty(0), "h": torch.full((4,), 6e4).half()}, "x")
    with pytest.raises(InputError, match="NaN or infinity"):
        require_finite(large, "x")  # which no float32 holds


def test_only_what_damage_raises_is_turned_into_a_line() -> None:
    with pytest.raises(InputError, match=r"x cannot be read \(there is no 'a'\); expected b"), reading("x", "expected b"):
        {}["a"]
    with pytest.raises(NameError), reading("x"):
        raise NameError("a fault of pyard's own")


def test_a_log_is_read_up_to_a_line_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2]
    for text in ("[1]\n", '{"step": "a"}\n', '{"step": -1}\n', "{}\n"):
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(InputError, match=r"log\.jsonl, line 1"):
            read_log(tmp_path / "log.jsonl")


def test_files_have_the_mode_that_the_umask_gives_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "folder") as folder:
            save_file({"a": torch.zeros(1)}, folder / "x.safetensors")
        write_text(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert oct((tmp_path / "folder/x.safetensors").stat().st_mode)[-3:] == "640"
    assert oct((tmp_path / "x").stat().st_mode)[-3:] == "640"
