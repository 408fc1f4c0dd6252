"""Prompts as conditions: each distinct text is encoded once, stored on disk, and mapped into memory.

P prompts · T distinct texts · B batch · n tokens of a text · D width of a token · E width of the pooled embedding
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from pyard.conditions.condition import Condition
from pyard.conditions.prompt_file import PromptLine
from pyard.conditions.prompt_storage import (
    ABOUT_NAME,
    INDEX_NAME,
    PROMPTS_NAME,
    SHARDS,
    DistinctTexts,
    Shard,
    TableRecord,
    digest_of,
    fingerprint_of,
    load_tensors,
    map_shard,
    shard_range,
)
from pyard.conditions.table import Numbers, as_numbers
from pyard.errors import InputError
from pyard.storage.reading import read_json

# Each mapped shard uses one of the process's memory mappings, of which there are about 65,000.
_MAX_MAPPED_SHARDS = 1024

_REMEDY = "delete the file and rerun the command that wrote it, or restore it"


class Encoded(NamedTuple):
    """A text encoder's result for one text.

    Args:
        tensors: `tokens` [n, D], n at least 1, without padding if the model masks padding; and `pooled` [E] if the model is
            conditioned on a pooled embedding.
        cut: whether the text was longer than the encoder's limit, so that its end was cut off.
    """

    tensors: dict[str, torch.Tensor]
    cut: bool


class TextEncoder(Protocol):
    """Turns texts into embeddings. If it has a method `free`, this is called when the encoder is no longer needed."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever embeddings may: with tokenizers, weights, templates, token limit. Cheap: loads no weights."""
        ...

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """The embedding of each text, on the CPU, in the encoder's own dtype."""
        ...


class PromptTable:
    """A table of prompts in a folder, which must not be moved while the table is used.

    Rows 0 ... P - 1 are the prompts. Rows P, P + 1, ... are the distinct texts in the order in which they first appear,
    including negative prompts. `take` returns `{"tokens": [B, n, D], "mask": bool [B, n]}`, padded with zeros to the longest
    text of the batch, with `pooled` [B, E] if the encoder returns it, and the table's constants, each float32 [B] or [B, k].

    Opening a table only reads its index, and `take` only the requested rows. When a row is first used in a process, its
    embedding is compared with its checksum; `verify` compares all of them.

    Example:
        table = PromptTable.build(encoder, read_prompts("prompts.txt"), "trajectories/conditions")
        table.take([0, 1])                    # of the first two prompts
        table.take(table.null([0, 1]))        # of their negative prompts

    Args:
        folder: a folder that `build` wrote.

    Attributes:
        dtype: dtype of what `take` returns; embeddings are usually stored in `bfloat16`.

    Raises:
        InputError: there is no table, it is not finished, or a file is missing, truncated or changed.
    """

    free_sizes: Mapping[str, Mapping[int, str]] = MappingProxyType({"tokens": {1: "num_tokens"}, "mask": {1: "num_tokens"}})

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        self.dtype = torch.float32
        self.record = TableRecord.from_json(read_json(folder / ABOUT_NAME), folder / ABOUT_NAME)
        index = load_tensors(folder / INDEX_NAME)
        record = self.record
        sizes = {"prompt": [record.num_prompts], "negative_prompt": [record.num_prompts]}
        sizes |= {"length": [record.num_texts], "digest": [record.num_texts, 32]}
        fits = {name: list(tensor.shape) for name, tensor in index.items()} == sizes
        fits = fits and all(
            index[name].dtype == torch.int64 and low <= int(index[name].min()) and int(index[name].max()) < end
            for name, low, end in (
                ("prompt", 0, record.num_texts),
                ("negative_prompt", 0, record.num_texts),
                ("length", 1, 2**32),
            )
        )
        if not fits or record.fingerprint != fingerprint_of(record, record.width, record.pooled_width, record.cut, index):
            raise InputError(
                f"{folder}: {ABOUT_NAME} or {INDEX_NAME} was changed after it was written; delete {ABOUT_NAME} and rerun the "
                "command that wrote it, or restore both"
            )
        for name, size in record.shards.items():
            path = folder / SHARDS / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                raise InputError(
                    f"{path}: {'missing' if found is None else f'{found} bytes'}, but {ABOUT_NAME} says {size} bytes; rerun "
                    "the command that wrote it, or restore it"
                )
        self._index = index
        texts = torch.arange(record.num_texts)
        self._text_of_row = torch.cat([index["prompt"], texts]).numpy()  # [P + T]
        self._begin = np.concatenate([[0], np.cumsum(index["length"].numpy())])  # [T + 1], in all shards below each other
        self._first = np.array([shard_range(name)[0] for name in record.shards])
        self._names = list(record.shards)
        self._checked = np.zeros(record.num_texts, dtype=bool)
        self._shard = functools.lru_cache(maxsize=_MAX_MAPPED_SHARDS)(self._map)

    @staticmethod
    def build(
        encoder: TextEncoder,
        lines: Sequence[PromptLine],
        folder: str | Path,
        *,
        constants: Mapping[str, float | Sequence[float]] = MappingProxyType({}),
        default_negative: str = "",
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        batch_size: int = 16,
        shard_size: int = 1024,
        progress: bool = True,
    ) -> PromptTable:
        """Encode prompts into a folder, or open the table that is already there.

        Each distinct text is encoded once. After a kill at any moment, the same call continues, having lost at most the shard
        that was being written, and ends with the same bytes on the same machine. If another process is building the same table,
        the call waits for it. If nothing is missing, only the encoder's fingerprint is used. The encoder is freed afterwards.

        Args:
            encoder: the text encoder.
            lines: the prompts, in order; see `read_prompts`.
            folder: the table's folder, which is `conditions` in a trajectory store.
            constants: further conditions that are the same for every prompt, by name, such as `{"guidance": 3.5}`.
            default_negative: negative prompt of the prompts that have none.
            dtype: dtype in which embeddings are stored.
            batch_size: number of texts encoded together; it may change the last bits.
            shard_size: largest number of texts in a file; files also have at most about 64 MiB.
            progress: show a progress bar with the rate.

        Raises:
            InputError: the folder contains another table (the message says what differs); there are no prompts; the encoder
                returns tensors of wrong kinds or non-finite numbers; or the disk is full.

        Warns:
            UserWarning: texts were cut at the encoder's limit.
        """
        from pyard.conditions.prompt_encoding import Encoding  # which opens tables

        encoding = Encoding(encoder, lines, Path(folder), constants, default_negative, dtype, batch_size, shard_size, progress)
        return encoding.run()

    @property
    def count(self) -> int:
        """P, the number of prompts."""
        return self.record.num_prompts

    @property
    def fingerprint(self) -> str:
        """sha256 of prompts, embeddings, constants and the text encoder's fingerprint."""
        return self.record.fingerprint

    @property
    def cut(self) -> int:
        """Number of distinct texts that were longer than the text encoder's limit."""
        return self.record.cut

    @functools.cached_property
    def _distinct(self) -> DistinctTexts:
        return DistinctTexts.read(self.folder / PROMPTS_NAME, self.record.prompts)

    @property
    def texts(self) -> Sequence[str]:
        """The T distinct texts; text t is row P + t."""
        return self._distinct.texts

    @functools.cached_property
    def prompts(self) -> Sequence[str]:
        """The prompt of each row 0 ... P - 1."""
        texts = self.texts
        return [texts[text] for text in self._distinct.prompt.tolist()]

    @functools.cached_property
    def negative_prompts(self) -> Sequence[str]:
        """The negative prompt of each row 0 ... P - 1."""
        texts = self.texts
        return [texts[text] for text in self._distinct.negative_prompt.tolist()]

    @functools.cached_property
    def _row_of_text(self) -> dict[str, int]:
        rows = {text: self.count + number for number, text in enumerate(self.texts)}
        return rows | {prompt: row for row, prompt in reversed(list(enumerate(self.prompts)))}

    def find(self, texts: Sequence[str]) -> list[int | None]:
        """The row of each text: that of the first prompt with this text, or else of the text itself; None: not in the table."""
        return [self._row_of_text.get(text) for text in texts]

    def take(self, numbers: Numbers) -> Condition:
        wanted = as_numbers(numbers)
        rows = self._within(wanted, len(self._text_of_row))
        embeddings = [self._embedding(int(text)) for text in self._text_of_row[rows]]
        size = (len(embeddings), max((len(tokens) for tokens, _ in embeddings), default=1))
        tokens = torch.empty(*size, self.record.width, dtype=self.dtype)
        mask = torch.zeros(size, dtype=torch.bool)
        pooled = torch.zeros(len(embeddings), self.record.pooled_width or 0, dtype=self.dtype)
        for i, (of_tokens, of_text) in enumerate(embeddings):
            tokens[i, : len(of_tokens)], mask[i, : len(of_tokens)] = of_tokens, True
            tokens[i, len(of_tokens) :] = 0
            if of_text is not None:
                pooled[i] = of_text
        tensors = {"tokens": tokens, "mask": mask}
        if self.record.pooled_width is not None:
            tensors["pooled"] = pooled
        for name, value in self.record.constants.items():
            constant = torch.tensor(value, dtype=torch.float32)
            tensors[name] = constant.expand(len(embeddings), *constant.shape).contiguous()
        return Condition(tensors).to(wanted.device)

    def null(self, numbers: Numbers) -> torch.Tensor:
        """The row of each prompt's negative prompt. Rows that are not prompts have none."""
        wanted = as_numbers(numbers)
        rows = self._within(wanted, self.count)
        return (self._index["negative_prompt"][rows] + self.count).to(wanted.device)

    def verify(self) -> None:
        """Read the whole table and compare it with its checksums.

        Raises:
            InputError: files are damaged; the message names all of them.
        """
        broken = []
        self._shard.cache_clear()
        for name in self._names:
            try:
                for text in range(*shard_range(name)):
                    self._checked[text] = False
                    self._embedding(text)
            except InputError as error:
                broken.append(str(error))
        try:
            DistinctTexts.read(self.folder / PROMPTS_NAME, self.record.prompts)
        except InputError as error:
            broken.append(str(error))
        if broken:
            raise InputError("; ".join(broken))

    def require_encoder(self, encoder: TextEncoder) -> None:
        """Raises InputError if this encoder would give other embeddings than the one that made the table."""
        if self.record.encoder == encoder.fingerprint:
            return
        limits = self.record.max_sequence_length, getattr(encoder, "max_sequence_length", None)
        if None not in limits and limits[0] != limits[1]:
            raise InputError(
                f"{self.folder}: its prompts were encoded with max_sequence_length {limits[0]}, but it is {limits[1]} now; "
                "give the same, or write new trajectories to another folder"
            )
        raise InputError(
            f"{self.folder}: its prompts were encoded by other text encoders or tokenizers, or in another precision, than the "
            "teacher's are now; restore the pipeline's folder, or write new trajectories to another folder"
        )

    def save(self, folder: Path) -> None:
        """Write the table into a folder that is being built, and verify it there.

        Shards are never changed in place, so they are hard-linked if the file system allows it. Their megabytes per prompt are
        then on the disk only once.

        Raises:
            InputError: the table is damaged, or the disk is full.
        """
        try:
            (folder / SHARDS).mkdir()
            for name in self._names:
                _link_or_copy(self.folder / SHARDS / name, folder / SHARDS / name)
            for name in (PROMPTS_NAME, INDEX_NAME, ABOUT_NAME):
                shutil.copyfile(self.folder / name, folder / name)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be copied to {folder.parent} ({error.strerror})") from error
        try:
            PromptTable(folder).verify()
        except InputError:
            self.verify()  # names the file where it lies: the copy is about to be removed
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptTable:
        # Rows never change, so copies of a student, such as its averages, share the table.
        return self

    def _within(self, wanted: torch.Tensor, end: int) -> list[int]:
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < end:
            raise InputError(f"condition numbers from {int(wanted.min())} to {int(wanted.max())}; expected 0 to {end - 1}")
        return wanted.tolist()

    def _map(self, number: int) -> Shard:
        path = self.folder / SHARDS / self._names[number]
        shard = map_shard(path, self.record.dtype)
        first, end = shard_range(path.name)
        widths = (shard.tokens.shape[-1], None if shard.pooled is None else shard.pooled.shape[-1])
        same = all(torch.equal(getattr(shard, name), self._index[name][first:end]) for name in ("length", "digest"))
        if widths != (self.record.width, self.record.pooled_width) or not same:
            raise InputError(f"{path}: not the shard that {INDEX_NAME} describes; {_REMEDY}")
        return shard

    def _embedding(self, text: int) -> tuple[torch.Tensor, torch.Tensor | None]:  # [n, D], [E]
        number = int(np.searchsorted(self._first, text, side="right")) - 1
        shard, first = self._shard(number), self._first[number]
        begin, end = self._begin[text : text + 2] - self._begin[first]
        tokens = shard.tokens[begin:end]
        pooled = None if shard.pooled is None else shard.pooled[text - first]
        if not self._checked[text]:
            if not torch.equal(digest_of(tokens, pooled, shard.cut[text - first]), self._index["digest"][text]):
                path = self.folder / SHARDS / self._names[number]
                raise InputError(f"{path}: the embedding of text {text} is damaged; {_REMEDY}")
            self._checked[text] = True
        return tokens, pooled


def _link_or_copy(source: Path, to: Path) -> None:
    try:
        os.link(source.resolve(), to)  # a store may be a download, whose names are links
    except OSError as error:
        # Another file system, one without hard links, or one that forbids links to other users' files.
        if error.errno not in (
            errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL,
        ):  # fmt: skip
            raise
        shutil.copyfile(source, to)
