"""Damaged, missing and unwritable files of a table: named in one line, never served, made again by the same call."""

from __future__ import annotations

import json
import random
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conditions.toy_encoder import ToyEncoder, build, contents, many_lines

from pyard.conditions import PromptTable
from pyard.errors import InputError


def test_no_damaged_byte_is_served(tmp_path: Path) -> None:
    """A flipped byte is an error that names the file, or changes nothing that the table gives (a header's spaces)."""
    table = build(tmp_path / "t", many_lines(20), constants={"guidance": 3.5})
    rows, texts = table.take(range(43)), list(table.texts)
    names = sorted(contents(tmp_path / "t"))
    assert len(names) == 6
    draw = random.Random(0)
    found = 0
    for name in names:
        path = tmp_path / "t" / name
        whole = path.read_bytes()
        # The end of every file is what counts most: embeddings, digests, numbers.
        places = {*range(len(whole) - 20, len(whole)), *draw.sample(range(len(whole)), 60)}
        for place in sorted(places):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            try:
                opened = PromptTable(tmp_path / "t")
                opened.verify()
                message = ""
            except InputError as error:
                message = str(error)
            if message:
                found += 1
                assert name in message
                assert "\n" not in message
            else:
                assert all(torch.equal(tensor, rows[key]) for key, tensor in opened.take(range(43)).items())
                assert list(opened.texts) == texts
                assert opened.cut == 0
                assert name.endswith(".json") or place < 8 + int.from_bytes(whole[:8], "little")
        for size in (0, 7, 100, len(whole) - 2):
            path.write_bytes(whole[:size])
            with pytest.raises(InputError, match=path.name):
                PromptTable(tmp_path / "t").verify()
        path.unlink()
        with pytest.raises(InputError, match=path.name):
            PromptTable(tmp_path / "t").verify()
        path.write_bytes(whole)
    assert found > 300
    PromptTable(tmp_path / "t").verify()


def test_a_damaged_row_is_found_where_it_is_used_and_others_are_served(tmp_path: Path) -> None:
    table = build(tmp_path / "t", many_lines(20))
    path = tmp_path / "t/shards/0000000008-0000000016.safetensors"
    wanted = table.take(range(20))
    content = path.read_bytes()
    row = table.take([19])["tokens"][0, 0].bfloat16().view(torch.uint8).numpy().tobytes()
    place = next(p for p in (tmp_path / "t/shards").iterdir() if row in p.read_bytes())
    content = place.read_bytes()
    place.write_bytes(content.replace(row, bytes([row[0] ^ 1]) + row[1:]))
    opened = PromptTable(tmp_path / "t")
    assert torch.equal(opened.take(range(19))["tokens"], wanted["tokens"][:19, : opened.take(range(19))["tokens"].shape[1]])
    with pytest.raises(InputError, match=rf"{place.name}: the embedding of text 22 is damaged; delete the file and rerun"):
        opened.take([3, 19])
    # What the message says to do.
    place.unlink()
    encoder = ToyEncoder()
    repaired = build(tmp_path / "t", many_lines(20), encoder)
    assert len(encoder.encoded) == 7
    assert place.read_bytes() == content
    assert repaired.fingerprint == table.fingerprint


@pytest.mark.parametrize(
    "name", ["conditions.json", "index.safetensors", "prompts.jsonl", "shards/0000000000-0000000008.safetensors"]
)
def test_the_same_call_repairs_what_was_deleted(tmp_path: Path, name: str) -> None:
    build(tmp_path / "t", many_lines(20))
    before = contents(tmp_path / "t")
    (tmp_path / "t" / name).unlink()
    encoder = ToyEncoder()
    build(tmp_path / "t", many_lines(20), encoder).verify()
    assert contents(tmp_path / "t") == before
    assert len(encoder.encoded) == (8 if name.startswith("shards") else 0)


def test_a_gap_is_filled_whatever_the_sizes_of_the_files_around_it(tmp_path: Path) -> None:
    table = build(tmp_path / "t", many_lines(50))
    shards = tmp_path / "t" / "shards"
    (shards / "0000000008-0000000016.safetensors").unlink()
    (shards / "0000000016-0000000024.safetensors").write_bytes(b"damaged")
    encoder = ToyEncoder()
    repaired = build(tmp_path / "t", many_lines(50), encoder, batch_size=5, shard_size=100)
    repaired.verify()
    assert repaired.fingerprint == table.fingerprint
    assert encoder.encoded == list(table.texts)[8:24]
    assert {path.name for path in shards.iterdir()} == set(repaired.record.shards)
    assert list(repaired.record.shards)[:3] == [f"{a:010d}-{b:010d}.safetensors" for a, b in ((0, 8), (8, 24), (24, 32))]


def test_verify_looks_at_the_files_that_are_there_now(tmp_path: Path) -> None:
    table = build(tmp_path / "t", many_lines(20))
    table.take(range(20))
    path = tmp_path / "t/shards/0000000008-0000000016.safetensors"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match=rf"{path.name}: missing"):
        table.verify()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=path.name):
        table.verify()
    path.write_bytes(content)
    table.verify()


def test_what_says_that_it_is_a_table_is_read_with_care(tmp_path: Path) -> None:
    build(tmp_path / "t")
    path = tmp_path / "t" / "conditions.json"
    about = json.loads(path.read_text())
    bad: list[Any] = [[], 3, None, {}, {**about, "kind": "other"}, {**about, "dtype": "int8"}, {**about, "dtype": 3}]
    values: list[Any] = [None, -1, 10**12, 1.5, "x", [], {}, {"../x": 3}, True]
    bad += [
        {**about, key: value}
        for key in about
        for value in values
        if (key, value) not in (("pooled_width", None), ("max_sequence_length", None), ("constants", {}))
    ]
    bad += [{k: v for k, v in about.items() if k != key} for key in about if key not in ("pooled_width", "max_sequence_length")]
    for content in bad:
        path.write_text(json.dumps(content))
        with pytest.raises(InputError) as failed:
            PromptTable(tmp_path / "t")
        assert "\n" not in str(failed.value)


def test_a_full_disk_is_one_line_and_the_same_call_goes_on(tmp_path: Path) -> None:
    lines = many_lines(20)
    build(tmp_path / "undisturbed", lines, shard_size=16)
    sizes = {name: len(content) for name, content in contents(tmp_path / "undisturbed").items()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in sorted({size - 1 for size in sizes.values()}):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(InputError, match=r"cannot be written \(File too large") as failed:
                build(tmp_path / "t", lines, shard_size=16)
            assert "\n" not in str(failed.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    build(tmp_path / "t", lines, shard_size=16)
    assert contents(tmp_path / "t") == contents(tmp_path / "undisturbed")
