"""A table of prompts: rows, numbers, fingerprints, what is refused."""

from __future__ import annotations

import copy
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conditions.toy_encoder import LINES, TEXTS, WIDTH, ToyEncoder, build, contents, many_lines

from pyard.conditions import Condition, Encoded, PromptLine, PromptTable, load_conditions, save_conditions
from pyard.conditions.table import FOLDER
from pyard.errors import InputError


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_are_what_the_encoder_gave(tmp_path: Path, dtype: Any, pooled: bool) -> None:
    encoder = ToyEncoder(pooled=pooled)
    table = build(tmp_path / "t", LINES, encoder, dtype=dtype, constants={"guidance": 3.5, "size": [8, 16]})
    assert (table.count, list(table.texts)) == (5, TEXTS)
    assert table.prompts == [line.prompt for line in LINES]
    assert table.negative_prompts == ["", "", "bad", "c", ""]
    rows = [3, 0, 1, 2, 0, *range(5, 10)]
    texts = ["x y z", "a b", "c", "a b", "a b", *TEXTS]
    taken = table.take(rows)
    stored = getattr(torch, dtype)
    assert taken["tokens"].shape == (10, 4, WIDTH)
    assert set(taken) == {"tokens", "mask", "guidance", "size"} | ({"pooled"} if pooled else set())
    for i, text in enumerate(texts):
        wanted = encoder.one(text).tensors
        length = len(wanted["tokens"])
        assert torch.equal(taken["tokens"][i, :length], wanted["tokens"].to(stored).float())
        assert not taken["tokens"][i, length:].any()
        assert taken["mask"][i].tolist() == [j < length for j in range(4)]
        if pooled:
            assert torch.equal(taken["pooled"][i], wanted["pooled"].to(stored).float())
    assert torch.equal(taken["guidance"], torch.full((10,), 3.5))
    assert torch.equal(taken["size"], torch.tensor([[8.0, 16.0]]).repeat(10, 1))
    assert table.take([6])["tokens"].shape == (1, 1, WIDTH)  # padded to the longest of the batch alone
    assert table.take([]).batch_size == 0
    assert all(tensor.dtype == torch.float32 for name, tensor in taken.items() if name != "mask")
    table.dtype = torch.bfloat16
    assert table.take(rows)["tokens"].dtype == torch.bfloat16
    assert torch.equal(table.take(rows)["tokens"].float(), taken["tokens"].bfloat16().float())


def test_numbers_lead_from_prompts_to_negative_prompts(tmp_path: Path) -> None:
    table = build(tmp_path / "t")
    assert table.null([0, 1, 2, 3, 4]).tolist() == [6, 6, 8, 7, 6]
    assert table.null(torch.tensor([2])).dtype == torch.int64
    assert table.find(["c", "bad", "", "a b", "other"]) == [1, 8, 6, 0, None]
    dark = build(tmp_path / "dark", default_negative="dark")
    assert dark.negative_prompts == ["dark", "dark", "bad", "c", ""]
    with pytest.raises(InputError, match="condition numbers from 0 to 10; expected 0 to 9"):
        table.take([0, 10])
    with pytest.raises(InputError, match="condition numbers from -1 to -1; expected 0 to 9"):
        table.take([-1])
    with pytest.raises(InputError, match="condition numbers from 5 to 5; expected 0 to 4"):
        table.null([5])
    assert copy.deepcopy(table) is table


def test_each_distinct_text_is_encoded_once_and_a_finished_table_needs_no_encoder(tmp_path: Path) -> None:
    encoder, idle = ToyEncoder(), ToyEncoder()
    table = build(tmp_path / "t", many_lines(50), encoder)
    assert len(encoder.encoded) == len(set(encoder.encoded)) == 53
    assert encoder.freed == 1
    before = contents(tmp_path / "t")
    again = build(tmp_path / "t", many_lines(50), idle)
    assert (idle.encoded, idle.freed) == ([], 0)
    assert contents(tmp_path / "t") == before
    assert again.fingerprint == table.fingerprint == PromptTable(tmp_path / "t").fingerprint
    # How texts are divided into batches and files is none of the table's business.
    other = build(tmp_path / "other", many_lines(50), batch_size=7, shard_size=20)
    assert other.fingerprint == table.fingerprint
    assert len(list((tmp_path / "other/shards").iterdir())) == 4
    assert all(torch.equal(tensor, again.take(range(103))[name]) for name, tensor in other.take(range(103)).items())


def test_everything_that_decides_a_row_is_in_the_fingerprint(tmp_path: Path) -> None:
    different: list[dict[str, Any]] = [
        {},
        {"lines": LINES[:4]},
        {"lines": [*LINES[:4], PromptLine("c", "bad")]},
        {"lines": [*LINES[3:], *LINES[:3]]},
        {"encoder": ToyEncoder(limit=3)},
        {"encoder": ToyEncoder(name="other")},
        {"encoder": ToyEncoder(pooled=False)},
        {"dtype": "float32"},
        {"constants": {"guidance": 1.0}},
        {"constants": {"guidance": 2.0}},
        {"default_negative": "bad"},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tables = [build(tmp_path / str(i), **changes) for i, changes in enumerate(different)]
    assert len({table.fingerprint for table in tables}) == len(different)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "edited prompt": (
        {"lines": [*many_lines(19), PromptLine("new")]},
        "prompt 20: found 'scene 19 red red red red', requested 'new'",
    ),
    "edited negative": (
        {"lines": [PromptLine("scene 0", "x"), *many_lines(20)[1:]]},
        "negative prompt 1: found 'blurry', requested 'x'",
    ),
    "longer file": ({"lines": many_lines(21)}, "found 20 prompts, requested 21"),
    "another default": ({"default_negative": "ugly"}, "negative prompt 3: found '', requested 'ugly'"),
    "encoder": ({"encoder": ToyEncoder(name="new")}, "fingerprint of the text encoder: found 'toy-8', requested 'new-8'"),
    "dtype": ({"dtype": "float32"}, "dtype: found 'bfloat16', requested 'float32'"),
    "constants": ({"constants": {"guidance": 4}}, "constants: found {'guidance': 3.5}, requested {'guidance': 4.0}"),
}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "half built"])
@pytest.mark.parametrize("case", OTHERS)
def test_another_table_in_the_folder_is_refused_by_what_differs(tmp_path: Path, case: str, finished: bool) -> None:
    settings: dict = dict(lines=many_lines(20), constants={"guidance": 3.5})
    if finished:
        build(tmp_path / "t", **settings)
    else:
        half_built(tmp_path / "t", **settings)
    before = contents(tmp_path / "t")
    changes, message = OTHERS[case]
    with pytest.raises(InputError, match="holds a prompt table with different settings") as failed:
        build(tmp_path / "t", **{**settings, **changes})
    assert message in str(failed.value)
    assert str(failed.value).count(" requested ") == 1
    assert contents(tmp_path / "t") == before
    build(tmp_path / "t", **settings).verify()


class FailingEncoder(ToyEncoder):
    """Fails at the fourth batch."""

    def encode(self, texts: Any) -> list[Encoded]:
        if len(self.encoded) >= 12:
            raise ZeroDivisionError
        return super().encode(texts)


def half_built(folder: Path, **settings: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        build(folder, encoder=FailingEncoder(), **settings)
    assert len(list((folder / "shards").iterdir())) == 1
    with pytest.raises(InputError, match=r"conditions\.json: missing"):
        PromptTable(folder)


def test_shards_of_another_table_are_refused(tmp_path: Path) -> None:
    half_built(tmp_path / "t", lines=many_lines(20))
    (tmp_path / "t" / "building.json").unlink()
    with pytest.raises(InputError, match=r"safetensors: written for other prompts or by another text encoder"):
        build(tmp_path / "t", many_lines(21))
    build(tmp_path / "t", many_lines(20)).verify()


def test_cut_texts_are_one_warning_with_their_count(tmp_path: Path) -> None:
    lines = many_lines(20)  # of 3 to 7 tokens
    with pytest.warns(UserWarning, match="were cut") as caught:
        table = build(tmp_path / "t", lines, ToyEncoder(limit=6))
    assert [str(w.message) for w in caught] == [
        "4 of 23 distinct texts are longer than the text encoder's limit and were cut, for example 'scene 4 red red red red'"
    ]
    assert caught[0].filename.endswith("toy_encoder.py")  # where `PromptTable.build` is called
    assert table.cut == PromptTable(tmp_path / "t").cut == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build(tmp_path / "none", lines).cut == 0


def _give(change: Callable[[Encoded], Encoded]) -> ToyEncoder:
    encoder = ToyEncoder()
    one = encoder.one
    encoder.one = lambda text: change(one(text)) if text == "x y z" else one(text)  # type: ignore[method-assign]
    return encoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: Encoded({**e.tensors, "tokens": e.tensors["tokens"] * float("nan")}, e.cut),
            "not finite; if it computes in float16",
        ),
        (lambda e: Encoded({**e.tensors, "pooled": e.tensors["pooled"] / 0}, e.cut), "not finite"),
        (lambda e: Encoded({**e.tensors, "tokens": e.tensors["tokens"][:0]}, e.cut), r"gave \{'tokens': \(0, 6\).*n >= 1"),
        (lambda e: Encoded({**e.tensors, "tokens": e.tensors["tokens"][None]}, e.cut), r"'tokens': \(1, 4, 6\)"),
        (lambda e: Encoded({"tokens": e.tensors["tokens"]}, e.cut), "different widths for the text before it"),
        (lambda e: Encoded({**e.tensors, "tokens": e.tensors["tokens"][:, :5]}, e.cut), "different widths for the text before"),
        (lambda e: Encoded({**e.tensors, "mask": e.tensors["pooled"]}, e.cut), r"expected tokens \[n, D\]"),
        (lambda e: Encoded({"pooled": e.tensors["pooled"]}, e.cut), r"expected tokens \[n, D\]"),
    ],
)
def test_an_encoder_that_gives_no_embeddings_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as failed:
        build(tmp_path / "t", encoder=_give(change))
    assert "'x y z'" in str(failed.value)
    assert build(tmp_path / "t").count == 5


def test_bad_arguments_are_one_line(tmp_path: Path) -> None:
    class Short(ToyEncoder):
        def encode(self, texts: Any) -> list[Encoded]:
            return super().encode(texts)[1:]

    for settings, message in (
        ({"lines": []}, "the list is empty; expected at least one"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of bfloat16, float32"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"constants": {"tokens": 1.0}}, "the constant tokens is 1.0"),
        ({"constants": {"guidance": float("nan")}}, "the constant guidance is nan; expected one or more finite numbers"),
        ({"constants": {"guidance": "x"}}, "the constant guidance is 'x'"),
        ({"encoder": Short()}, "gave 3 embeddings for 4 texts"),
    ):
        with pytest.raises(InputError, match=message):
            build(tmp_path / "t", **settings)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; expected a folder"):
        build(tmp_path / "file")


def test_a_table_is_kept_where_it_lies_and_passed_on_whole_elsewhere(tmp_path: Path) -> None:
    table = build(tmp_path / "store" / FOLDER, many_lines(20))
    before = contents(tmp_path / "store")
    save_conditions(table, tmp_path / "store")
    assert contents(tmp_path / "store") == before
    save_conditions(table, tmp_path / "student")
    assert contents(tmp_path / "student") == before
    copied = load_conditions(tmp_path / "nothing", tmp_path / "student")
    assert isinstance(copied, PromptTable)
    assert copied.fingerprint == table.fingerprint
    assert copied.folder == tmp_path / "student" / FOLDER
    save_conditions(table, tmp_path / "student")
    with pytest.raises(InputError, match="holds a different table of conditions"):
        save_conditions(build(tmp_path / "other", many_lines(3)), tmp_path / "student")
    # A damaged one is not passed on.
    shard = tmp_path / "store" / FOLDER / "shards/0000000000-0000000008.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="not the shard that index") as failed:
        save_conditions(table, tmp_path / "late")
    assert str(shard) in str(failed.value)
    assert not (tmp_path / "late" / FOLDER).exists()


def test_embeddings_that_are_passed_on_are_on_the_disk_once(tmp_path: Path) -> None:
    table = build(tmp_path / "store" / FOLDER, many_lines(20))
    shards = sorted((tmp_path / "store" / FOLDER / "shards").iterdir())
    assert len(shards) > 1
    # What a writer that was killed left behind goes, and the table it was linked from stays.
    left = tmp_path / "held-out" / f".{FOLDER}.{socket.gethostname()}-{2**22 + 7}-x.new"  # no process has such a number
    (left / "shards").mkdir(parents=True)
    (left / "shards" / shards[0].name).hardlink_to(shards[0])
    save_conditions(table, tmp_path / "held-out")
    assert not left.exists()
    linked = sorted((tmp_path / "held-out" / FOLDER / "shards").iterdir())
    assert [path.stat().st_ino for path in linked] == [path.stat().st_ino for path in shards]
    assert all(path.stat().st_nlink == 2 for path in shards)
    expected = table.take([3])["tokens"]
    shutil.rmtree(tmp_path / "store")
    again = load_conditions(tmp_path / "held-out")
    assert isinstance(again, PromptTable)
    again.verify()
    assert torch.equal(again.take([3])["tokens"], expected)


def test_embeddings_under_links_are_passed_on_themselves(tmp_path: Path) -> None:
    """A download of the Hugging Face hub is a folder of links."""
    table = build(tmp_path / "store" / FOLDER, many_lines(20))
    (tmp_path / "blobs").mkdir()
    for shard in (tmp_path / "store" / FOLDER / "shards").iterdir():
        shard.rename(tmp_path / "blobs" / shard.name)
        shard.symlink_to(f"../../../blobs/{shard.name}")
    save_conditions(table, tmp_path / "deep" / "held-out")
    assert not any(path.is_symlink() for path in (tmp_path / "deep" / "held-out" / FOLDER / "shards").iterdir())
    again = load_conditions(tmp_path / "deep" / "held-out")
    assert isinstance(again, PromptTable)
    again.verify()


def test_on_another_file_system_embeddings_are_copied(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    table = build(tmp_path / "store" / FOLDER, many_lines(20))
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        save_conditions(table, Path(folder))
        assert contents(Path(folder)) == contents(tmp_path / "store")
        assert all(path.stat().st_nlink == 1 for path in (Path(folder) / FOLDER / "shards").iterdir())


def test_lengths_are_counted_before_a_condition_moves_and_stay_with_its_rows(tmp_path: Path) -> None:
    table = build(tmp_path / FOLDER, many_lines(6))
    here = table.take([0, 1, 2, 3, 4, 5])
    lengths = here["mask"].sum(dim=1).tolist()
    assert len(set(lengths)) > 1
    there = here.to("meta")  # a device that has no numbers to ask for
    assert there.lengths == lengths
    assert there.index(slice(2, 5)).lengths == lengths[2:5]
    assert there.repeat(2).lengths == [length for length in lengths for _ in range(2)]
    assert [piece.lengths for piece in there.split(3)] == [lengths[:2], lengths[2:4], lengths[4:]]
    assert Condition.cat([there, there.index(slice(0, 2))]).lengths == [*lengths, *lengths[:2]]
    assert there.with_tensors({"mask": there["mask"]}).lengths == lengths
    assert here.index([5, 0]).lengths == [lengths[5], lengths[0]]
    pictures = Condition({"mask": torch.ones(2, 1, 4, 4)}).to("meta")  # a mask of something else is left alone
    assert pictures["mask"].shape == (2, 1, 4, 4)
