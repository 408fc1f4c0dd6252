"""The store under hostile input: whatever is done to its files is noticed, and named, before a number is used."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trajectories.gaussian import contents, flip_byte, write

from pyard.errors import InputError
from pyard.trajectories import TrajectoryManifest, TrajectoryReader, TrajectoryStore
from pyard.trajectories.shard import map_shard

SHARD = "shards/0000000008-0000000016.safetensors"
SIDECAR = "shards/0000000008-0000000016.json"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change a shard's header and keep its payload."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(edit(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def test_manifest_round_trip(tmp_path: Path) -> None:
    written = write(tmp_path, labels=[2, 1], cfg_channels=1).manifest
    read = TrajectoryStore.open(tmp_path).manifest
    assert read == written
    assert read.digest == written.digest
    assert TrajectoryManifest.from_json(written.to_json()) == written


def test_maps_are_read_only_and_read_what_safetensors_reads(tmp_path: Path) -> None:
    store = write(tmp_path)
    arrays = store.tensors(store.shards[1])
    assert {name: array.shape for name, array in arrays.items()} == {
        "label": (8,),
        "noise": (8, 1, 4, 4),
        "state": (8, 3, 1, 4, 4),
        "denoised": (8, 3, 1, 4, 4),
    }
    with pytest.raises(ValueError, match="read-only"):
        arrays["noise"][0] = 0
    assert isinstance(arrays["state"].base, np.memmap) or isinstance(arrays["state"], np.memmap)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda root: (root / SHARD).unlink(), "missing, though its sidecar is there"),
        (lambda root: (root / SIDECAR).unlink(), "20 were requested, 12 are stored"),
        (lambda root: truncate(root / SHARD, 100), "truncated or overwritten"),
        (lambda root: (root / SHARD).write_bytes(b""), "truncated or overwritten"),
        (lambda root: (root / SIDECAR).write_bytes(b""), "not valid JSON"),
        (lambda root: (root / SIDECAR).write_bytes(b"[" * 100_000), "not valid JSON"),
        (lambda root: (root / SIDECAR).write_bytes(b'{"count": 8, "count": 9}'), "a key appears twice"),
        (lambda root: (root / SIDECAR).write_text("[]"), "not a sidecar"),
        (lambda root: edit_json(root / SIDECAR, extra=1), "not a sidecar"),
        (lambda root: edit_json(root / SIDECAR, count=9), "its name says otherwise"),
        (lambda root: edit_json(root / SIDECAR, count="8"), "its name says otherwise"),
        (lambda root: edit_json(root / SIDECAR, num_bytes=8), "its sidecar says 8"),
        (lambda root: edit_json(root / SIDECAR, num_bytes=None), "its name says otherwise"),
    ],
)
def test_a_shard_without_a_valid_sidecar_does_not_exist(tmp_path: Path, harm: Callable[[Path], Any], reason: str) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    harm(tmp_path)
    store = TrajectoryStore.open(tmp_path)
    assert (store.count, store.missing()) == (12, [(8, 16)])
    for refuse in (store.verify, lambda: TrajectoryReader(store, 4, target="state")):
        with pytest.raises(InputError, match=reason):
            refuse()
    write(tmp_path)  # and is made again
    assert contents(tmp_path) == before


def test_the_last_shard_missing_is_noticed(tmp_path: Path) -> None:
    write(tmp_path)
    for file in (tmp_path / "shards").glob("0000000016-*"):
        file.unlink()
    with pytest.raises(InputError, match="20 were requested, 16 are stored; 1 shards are missing"):
        TrajectoryReader(str(tmp_path), 4, target="state")
    # "with a smaller count to do with less", as the message says.
    write(tmp_path, 16)
    assert len(next(TrajectoryReader(str(tmp_path), 16, target="state"))) == 16


def test_verify_names_every_shard_that_changed(tmp_path: Path) -> None:
    store = write(tmp_path)
    store.verify()
    flip_byte(tmp_path / SHARD, -5)
    flip_byte(tmp_path / "shards/0000000016-0000000020.safetensors", -5)
    store = TrajectoryStore.open(tmp_path)
    with pytest.raises(InputError, match=r"2 of 3 shards are broken: 0000000008-.*sha256 is .*; 0000000016-.*sha256 is"):
        store.verify()


def test_verify_compares_labels_with_the_manifest(tmp_path: Path) -> None:
    write(tmp_path / "a", labels=[0, 1])
    write(tmp_path / "b", labels=[1, 0])
    for ending in (".safetensors", ".json"):
        shard = Path(SHARD).with_suffix(ending)
        (tmp_path / "a" / shard).write_bytes((tmp_path / "b" / shard).read_bytes())
    with pytest.raises(InputError, match="the shard comes from another store"):
        TrajectoryStore.open(tmp_path / "a")
    edit_json(tmp_path / "a" / SIDECAR, manifest=TrajectoryStore.open(tmp_path / "b").manifest.digest[::-1])
    with pytest.raises(InputError, match=r"manifest\.json was changed, or the shard comes from another store"):
        write(tmp_path / "a", 40, labels=[0, 1])  # a writer does not overwrite it either
    edit_json(tmp_path / "a" / SIDECAR, manifest=write(tmp_path / "c", labels=[0, 1]).manifest.digest)
    with pytest.raises(InputError, match="its labels are not those that the manifest gives"):
        TrajectoryStore.open(tmp_path / "a").verify()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda header: header.pop("noise") and None, "holds the tensors"),
        (lambda header: header.update(more=header["noise"]), "holds the tensors"),
        (lambda header: header["noise"].update(dtype="F64"), "the manifest says F32"),
        (lambda header: header["noise"].update(shape=[8, 1, 4, 5]), r"the manifest says F32 \[8, 1, 4, 4\]"),
        (lambda header: header["noise"].update(shape=[2**62, 1, 4, 4]), "the manifest says"),
        (lambda header: header["state"].update(data_offsets=header["denoised"]["data_offsets"]), "overlap or leave a hole"),
        (lambda header: header["state"].update(data_offsets=[0, 2**63]), "aligned bytes within"),
        (lambda header: header["state"].update(data_offsets=[-8, 0]), "aligned bytes within"),
        (lambda header: header["state"].update(data_offsets=[8, 4]), "aligned bytes within"),
        (lambda header: header["state"].update(data_offsets=[0.0, 1536.0]), "expected \\[begin, end\\]"),
        (lambda header: header["state"].update(data_offsets=None), "expected \\[begin, end\\]"),
        (lambda header: [1, 2], "header is a list"),
        (lambda header: {**header, "noise": 3}, "the manifest says F32"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    store = write(tmp_path)
    edit_header(tmp_path / SHARD, edit)
    with pytest.raises(InputError, match=message):
        map_shard(tmp_path / SHARD, store.manifest.layout(8))


@pytest.mark.parametrize(
    "content", [b"", b"\x10", struct.pack("<Q", 2**63), struct.pack("<Q", 100) + b"{}", struct.pack("<Q", 4) + b"\xff{}}"]
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    store = write(tmp_path / "store")
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=r"not a shard, or truncated|not valid JSON"):
        map_shard(tmp_path / "x", store.manifest.layout(8))


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    store = write(tmp_path)
    with (tmp_path / SHARD).open("ab") as file:
        file.write(bytes(8))
    with pytest.raises(InputError, match="8 bytes follow the last tensor"):
        map_shard(tmp_path / SHARD, store.manifest.layout(8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"{}", "format version None"),
        (b'{"format_version": 1}', "settings missing"),
        (b'{"format_version": 2}', "format version 2; this pyard reads version 1"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    for use in (lambda: TrajectoryStore.open(tmp_path), lambda: write(tmp_path)):
        with pytest.raises(InputError, match=message) as caught:
            use()
        assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": "4"},
        {"batch_size": True},
        {"shard_size": None},
        {"sample_shape": [1, 4]},
        {"sample_shape": 16},
        {"labels": 3},
        {"labels": [0, 9]},
        {"labels": []},
        {"grid": None},
        {"grid": {"times": ["a"], "embed_times": [], "state_index": [], "denoised_index": []}},
        {"schedule": []},
        {"schedule": {"kind": "sde"}},
        {"cfg_scale": "high"},
        {"dtype": ["float32"]},
        {"keep": None},
        {"unknown": 1},
    ],
)
def test_a_manifest_with_a_wrong_setting_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path)
    edit_json(tmp_path / "manifest.json", **change)
    with pytest.raises(InputError, match=r"manifest\.json"):
        TrajectoryStore.open(tmp_path)


def test_a_manifest_that_was_edited_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    edit_json(tmp_path / "manifest.json", cfg_scale=2.0)
    with pytest.raises(InputError, match=r"written under a manifest .* manifest\.json was changed"):
        TrajectoryStore.open(tmp_path)


def test_a_lost_manifest_comes_back_with_the_same_settings_only(tmp_path: Path) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"not a trajectory store \(no manifest\.json\)"):
        TrajectoryStore.open(tmp_path)
    with pytest.raises(InputError, match="written under a manifest"):
        write(tmp_path, cfg_scale=2.0)
    assert not (tmp_path / "manifest.json").exists()
    write(tmp_path)
    assert contents(tmp_path) == before


def test_a_lost_or_broken_request_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "request.json").write_text('{"count": "20"}')
    with pytest.raises(InputError, match=r'expected \{"count": N\}'):
        TrajectoryStore.open(tmp_path)
    (tmp_path / "request.json").unlink()
    with pytest.raises(InputError, match=r"request\.json: missing"):
        TrajectoryStore.open(tmp_path)
    assert write(tmp_path).count == 20


def test_foreign_files_are_left_alone_but_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "shards" / "notes.json").write_text("{}")
    store = TrajectoryStore.open(tmp_path)
    assert store.problems == ("notes.json: not the name of a shard",)
    store.verify()
    write(tmp_path, 30)
    assert (tmp_path / "shards" / "notes.json").exists()
