"""Writing a prompt table: one process encodes the missing texts, shard by shard."""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from tqdm import tqdm

from pyard.conditions.prompt_file import PromptLine
from pyard.conditions.prompt_storage import (
    ABOUT_NAME,
    BUILDING_NAME,
    DTYPES,
    INDEX_NAME,
    PROMPTS_NAME,
    SHARDS,
    DistinctTexts,
    TableRecord,
    TableSettings,
    fingerprint_of,
    map_shard,
    pack_shard,
    shard_name,
    shard_range,
    whole_shards,
)
from pyard.conditions.prompts import Encoded, PromptTable, TextEncoder
from pyard.errors import InputError
from pyard.storage.files import sync_directory, to_bytes, write_atomically
from pyard.storage.reading import read_json
from pyard.storage.units import format_bytes

MAX_SHARD_BYTES = 64 * 2**20

_TENSORS = ("tokens", "mask", "pooled")


@dataclass(frozen=True)
class Encoding:
    """The arguments of `PromptTable.build`, which describes them."""

    encoder: TextEncoder
    lines: Sequence[PromptLine]
    folder: Path
    constants: Mapping[str, float | Sequence[float]]
    default_negative: str
    dtype: str
    batch_size: int
    shard_size: int
    progress: bool

    def run(self) -> PromptTable:
        """Build the table, or open it."""
        if not self.lines:
            raise InputError("prompts: the list is empty; expected at least one prompt")
        if self.batch_size < 1 or self.shard_size < 1:
            raise InputError(f"prompts: batch_size {self.batch_size}, shard_size {self.shard_size}; expected at least 1")
        if self.dtype not in DTYPES:
            raise InputError(f"prompts: dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"prompts: {self.folder} is a file; expected a folder or a new path")
        distinct = DistinctTexts.of(self.lines, self.default_negative)
        content = distinct.to_bytes()
        prompts = hashlib.sha256(content).hexdigest()
        settings = TableSettings(self.encoder.fingerprint, self.dtype, _plain(self.constants), prompts)
        # A finished table may be in a read-only place, where not even a lock can be written.
        table = self._finished(settings, distinct, content)
        if table is not None and not (self.folder / BUILDING_NAME).exists():
            return table
        with _alone(self.folder, self.progress):
            table = self._finished(settings, distinct, content)
            if table is None:
                there = self._prepare(settings, distinct, content)
                self._encode(settings, distinct.texts, there)
                table = self._finish(settings, distinct)
            (self.folder / BUILDING_NAME).unlink(missing_ok=True)
        return table

    def _finished(self, settings: TableSettings, distinct: DistinctTexts, content: bytes) -> PromptTable | None:
        """The existing table, if it is complete."""
        if not (self.folder / ABOUT_NAME).is_file():
            return None
        self._require_equal(ABOUT_NAME, settings, distinct)
        try:
            table = PromptTable(self.folder)
        except InputError:  # what is missing is made again
            return None
        return table if _holds(self.folder / PROMPTS_NAME, content) else None

    def _prepare(self, settings: TableSettings, distinct: DistinctTexts, content: bytes) -> list[str]:
        """Record the table's settings before its first shard is written; return the names of the existing shards."""
        if (self.folder / BUILDING_NAME).is_file():
            self._require_equal(BUILDING_NAME, settings, distinct)
        there = whole_shards(self.folder, settings, len(distinct.texts))
        if not _holds(self.folder / PROMPTS_NAME, content):
            write_atomically(self.folder / PROMPTS_NAME, content)
        write_atomically(self.folder / BUILDING_NAME, to_bytes({"kind": "prompts", **asdict(settings)}))
        return there

    def _require_equal(self, name: str, wanted: TableSettings, distinct: DistinctTexts) -> None:
        """Raise an InputError that names the differences between the existing table and the requested one."""
        path = self.folder / name
        there = TableSettings.from_json(read_json(path), path)
        differences = [
            f"{what}: found {_short(mine)}, requested {_short(theirs)}"
            for what, mine, theirs in (
                ("fingerprint of the text encoder", there.encoder, wanted.encoder),
                ("dtype", there.dtype, wanted.dtype),
                ("constants", there.constants, wanted.constants),
            )
            if mine != theirs
        ]
        if there.prompts != wanted.prompts:
            differences.append(self._changed_prompt(there.prompts, distinct))
        if differences:
            raise InputError(
                f"{self.folder} holds a prompt table with different settings: {'; '.join(differences)}. Use the settings it "
                "was made with, or another folder (for trajectories: another store)"
            )

    def _changed_prompt(self, there: str, wanted: DistinctTexts) -> str:
        try:
            old = DistinctTexts.read(self.folder / PROMPTS_NAME, there)
        except InputError:
            return "different prompts"
        if len(old.prompt) != len(wanted.prompt):
            return f"found {len(old.prompt)} prompts, requested {len(wanted.prompt)}"
        for name in ("prompt", "negative_prompt"):
            pairs = zip(getattr(old, name).tolist(), getattr(wanted, name).tolist(), strict=True)
            for number, (mine, theirs) in enumerate(pairs, 1):
                if old.texts[mine] != wanted.texts[theirs]:
                    what = name.replace("_", " ")
                    return f"{what} {number}: found {_short(old.texts[mine])}, requested {_short(wanted.texts[theirs])}"
        return "different prompts"

    def _encode(self, settings: TableSettings, texts: list[str], there: list[str]) -> None:
        """Write the missing shards."""
        ranges = [shard_range(name) for name in there]
        ends, firsts = [0, *(end for _, end in ranges)], [*(first for first, _ in ranges), len(texts)]
        gaps = [(end, first) for end, first in zip(ends, firsts, strict=True) if end < first]
        if not gaps:
            return
        missing = sum(end - first for first, end in gaps)
        bar = tqdm(
            total=len(texts), initial=len(texts) - missing, desc="encoding prompts", unit=" texts", disable=not self.progress
        )
        written = 0
        with bar:
            for first, end in gaps:
                for begin, embeddings, cut in self._pieces(texts, first, end, bar):
                    shard = pack_shard(embeddings, cut, settings.digest)
                    write_atomically(self.folder / SHARDS / shard_name(begin, begin + len(cut)), shard)
                    written += len(shard)
                    bar.set_postfix_str(f"{format_bytes(written)} written")
        free = getattr(self.encoder, "free", None)
        if free is not None:
            free()

    def _pieces(
        self, texts: list[str], first: int, end: int, bar: Any
    ) -> Iterator[tuple[int, list[dict[str, Any]], list[bool]]]:
        """Yield (first text's number, embeddings, whether each was cut) for each shard, which consists of whole batches."""
        begin, embeddings, cut, size = first, list[dict[str, torch.Tensor]](), list[bool](), 0
        for start in range(first, end, self.batch_size):
            batch = texts[start : min(start + self.batch_size, end)]
            encoded = self.encoder.encode(batch)
            if len(encoded) != len(batch):
                raise InputError(
                    f"the text encoder gave {len(encoded)} embeddings for {len(batch)} texts; expected one for each"
                )
            for text, one in zip(batch, encoded, strict=True):
                embeddings.append(self._stored(text, one, embeddings[0] if embeddings else None))
                size += sum(tensor.nbytes for tensor in embeddings[-1].values())
            cut += [one.cut for one in encoded]
            bar.update(len(batch))
            if start + len(batch) == end or len(cut) + self.batch_size > self.shard_size or size >= MAX_SHARD_BYTES:
                yield begin, embeddings, cut
                begin, embeddings, cut, size = start + len(batch), [], [], 0

    def _stored(self, text: str, encoded: Encoded, other: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """An embedding in the dtype in which it is stored."""
        tensors = {n: t.detach().cpu().to(DTYPES[self.dtype], copy=True) for n, t in encoded.tensors.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        tokens, pooled = found.get("tokens", ()), found.get("pooled")
        if (
            set(found) - {"pooled"} != {"tokens"}
            or len(tokens) != 2
            or 0 in tokens
            or (pooled is not None and len(pooled) != 1)
        ):
            raise InputError(
                f"the text encoder gave {found} for {_short(text)}; expected tokens [n, D], n >= 1, and optionally pooled [E]"
            )
        if other is not None and {n: t.shape[-1] for n, t in other.items()} != {n: t.shape[-1] for n, t in tensors.items()}:
            raise InputError(f"the text encoder gave {found} for {_short(text)}, but different widths for the text before it")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise InputError(
                f"the text encoder's embeddings of {_short(text)} are not finite; if it computes in float16, use "
                "bfloat16 or float32"
            )
        return tensors

    def _finish(self, settings: TableSettings, distinct: DistinctTexts) -> PromptTable:
        """Write the index, then the file that marks the table as complete."""
        from safetensors.torch import save

        paths = [self.folder / SHARDS / name for name in whole_shards(self.folder, settings, len(distinct.texts))]
        shards = [map_shard(path, self.dtype) for path in paths]
        index = {
            "prompt": torch.from_numpy(distinct.prompt),
            "negative_prompt": torch.from_numpy(distinct.negative_prompt),
            "length": torch.cat([shard.length for shard in shards]),
            "digest": torch.cat([shard.digest for shard in shards]),
        }
        widths = {(s.tokens.shape[-1], None if s.pooled is None else s.pooled.shape[-1]) for s in shards}
        if len(widths) != 1:
            raise InputError(
                f"{self.folder / SHARDS}: its shards hold embeddings of different widths; delete it and start again"
            )
        cut = torch.cat([shard.cut for shard in shards]).nonzero().flatten().tolist()
        width, pooled_width = widths.pop()
        record = TableRecord(
            **asdict(settings),
            fingerprint=fingerprint_of(settings, width, pooled_width, len(cut), index),
            num_prompts=len(distinct.prompt),
            num_texts=len(distinct.texts),
            width=width,
            pooled_width=pooled_width,
            cut=len(cut),
            shards={path.name: path.stat().st_size for path in paths},
            max_sequence_length=getattr(self.encoder, "max_sequence_length", None),
        )
        write_atomically(self.folder / INDEX_NAME, save(index))
        write_atomically(self.folder / ABOUT_NAME, to_bytes(record.to_json()))
        if cut:
            warnings.warn(cut_texts([distinct.texts[number] for number in cut], len(distinct.texts)), stacklevel=4)
        return PromptTable(self.folder)


def cut_texts(cut: Sequence[str], distinct: int) -> str:
    """What a warning says of texts that an encoder cut, of a number of distinct ones."""
    return (
        f"{len(cut)} of {distinct} distinct texts are longer than the text encoder's limit and were cut, for example "
        f"{_short(cut[0])}"
    )


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _plain(constants: Mapping[str, float | Sequence[float]]) -> dict[str, float | list[float]]:
    """Constants as they are stored: finite numbers, or lists of them."""
    plain: dict[str, float | list[float]] = {}
    for name, value in constants.items():
        try:
            numbers = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError):
            numbers = torch.tensor(math.nan)
        if name in _TENSORS or numbers.ndim > 1 or not all(math.isfinite(number) for number in numbers.flatten().tolist()):
            raise InputError(
                f"prompts: the constant {name} is {value!r}; expected one or more finite numbers, under a name other than "
                f"{', '.join(_TENSORS)}"
            )
        plain[name] = numbers.tolist()
    return dict(sorted(plain.items()))


@contextmanager
def _alone(folder: Path, progress: bool) -> Iterator[None]:
    """Wait until no other process writes the table. When a process ends for any reason, the system releases its lock."""
    shards = folder / SHARDS
    new = [path for path in (shards, *shards.parents) if not path.exists()]
    shards.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync_directory(path.parent)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if progress:
            print(f"prompts: another process is writing {folder}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
