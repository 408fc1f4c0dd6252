"""The folder of a prompt table: texts, their embeddings in shards, and the file that marks the table as complete.

    prompts.jsonl                              each distinct text once, then for each prompt the numbers of its two texts
    shards/0000000000-0000001024.safetensors   texts 0 ... 1023: tokens, pooled, length, digest, cut
    index.safetensors                          prompt, negative_prompt, length, digest: all that opening needs
    conditions.json                            what the table is; written last, so that a table that has it is whole
    building.json                              what the table will be; gone when it is whole

Every file is written, flushed and renamed into place, and does not change afterwards, so a shard under its name is complete.
Each text's embedding has its own digest, so damage is found when an embedding is used, without reading the others.

P prompts · T distinct texts · n texts of a shard · D width of a token · E width of the pooled embedding
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyard.conditions.prompt_file import PromptLine
from pyard.errors import InputError
from pyard.storage.reading import UnreadableError, read_bytes, reading
from pyard.storage.tensor_files import read_safetensors, read_with_metadata

ABOUT_NAME = "conditions.json"
BUILDING_NAME = "building.json"
INDEX_NAME = "index.safetensors"
PROMPTS_NAME = "prompts.jsonl"
SHARDS = "shards"

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_SHARD_NAME = re.compile(r"(\d{10})-(\d{10})\.safetensors")


class ForeignShardError(InputError):
    """A shard was written for another table."""


@dataclass(frozen=True)
class DistinctTexts:
    """Prompts as numbers of distinct texts, which are in the order of their first appearance.

    Args:
        texts: the T distinct texts.
        prompt: number of each prompt's text, int64 [P].
        negative_prompt: number of the text that guidance leads each prompt away from, int64 [P].
    """

    texts: list[str]
    prompt: NDArray[np.int64]
    negative_prompt: NDArray[np.int64]

    @classmethod
    def of(cls, lines: Sequence[PromptLine], default_negative: str) -> DistinctTexts:
        """The distinct texts of prompts, with `default_negative` for prompts that have no negative prompt."""
        numbers: dict[str, int] = {}
        rows = [
            [numbers.setdefault(text, len(numbers)) for text in (prompt, default_negative if negative is None else negative)]
            for prompt, negative in lines
        ]
        array = np.array(rows, dtype=np.int64).reshape(-1, 2)
        return cls(list(numbers), array[:, 0].copy(), array[:, 1].copy())

    def to_bytes(self) -> bytes:
        """The contents of the file `prompts.jsonl`."""
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in self.texts]
        pairs = zip(self.prompt.tolist(), self.negative_prompt.tolist(), strict=True)
        lines += [f'{{"prompt": {prompt}, "negative_prompt": {negative}}}' for prompt, negative in pairs]
        return ("\n".join(lines) + "\n").encode()

    @classmethod
    def read(cls, path: Path, sha256: str) -> DistinctTexts:
        """Read `prompts.jsonl`.

        Raises:
            InputError: the file is missing, or does not have this checksum.
        """
        content = read_bytes(path, None)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise InputError(f"{path}: changed after it was written; {_remedy(path)}")
        # Parsed as one list, which for a million lines takes a tenth of the time.
        with reading(path, _remedy(path)):
            entries = json.loads(b"[" + content.rstrip(b"\n").replace(b"\n", b",") + b"]")
            rows = [[entry["prompt"], entry["negative_prompt"]] for entry in entries if "text" not in entry]
            array = np.array(rows, dtype=np.int64).reshape(-1, 2)
            texts = [entry["text"] for entry in entries if "text" in entry]
        if not all(isinstance(text, str) for text in texts) or (
            len(array) and not 0 <= array.min() <= array.max() < len(texts)
        ):
            raise InputError(f"{path}: expected texts and the numbers of texts; {_remedy(path)}")
        return cls(texts, array[:, 0].copy(), array[:, 1].copy())


@dataclass(frozen=True)
class TableSettings:
    """The settings that determine the contents of a table.

    Args:
        encoder: the text encoder's fingerprint.
        dtype: dtype in which embeddings are stored: a key of DTYPES.
        constants: float32 numbers that are the same for every prompt, by name.
        prompts: sha256 of `prompts.jsonl`.
    """

    encoder: str
    dtype: str
    constants: dict[str, float | list[float]]
    prompts: str

    @property
    def digest(self) -> str:
        """The digest that marks shards. It does not include constants, which are not in shards."""
        return hashlib.sha256(json.dumps([self.encoder, self.dtype, self.prompts]).encode()).hexdigest()

    @classmethod
    def from_json(cls, about: Any, path: Path) -> TableSettings:
        """The settings in a JSON object, which may have other keys as well."""
        kinds = {"encoder": str, "dtype": str, "constants": dict, "prompts": str}
        if not isinstance(about, dict) or about.get("kind") != "prompts":
            raise InputError(f"{path}: {json.dumps(about)[:80]} does not describe a prompt table; use another folder")
        for name, kind in kinds.items():
            if not isinstance(about.get(name), kind):
                raise InputError(f"{path}: {name} is {about.get(name)!r}; expected a {kind.__name__}. {_remedy(path)}")
        if about["dtype"] not in DTYPES:
            raise InputError(f"{path}: dtype is {about['dtype']!r}; expected one of {', '.join(DTYPES)}")
        return cls(**{name: about[name] for name in kinds})


@dataclass(frozen=True)
class TableRecord(TableSettings):
    """`conditions.json`: the settings of a complete table, and what it contains.

    Args:
        fingerprint: fingerprint of the whole table; see `fingerprint_of`.
        num_prompts: P.
        num_texts: T.
        width: D.
        pooled_width: E; None: there is no pooled embedding.
        cut: texts that were longer than the text encoder's limit.
        shards: bytes of each shard by file name.
        max_sequence_length: the text encoder's limit of tokens; None: tables of earlier versions do not say.
    """

    fingerprint: str
    num_prompts: int
    num_texts: int
    width: int
    pooled_width: int | None
    cut: int
    shards: dict[str, int]
    max_sequence_length: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"kind": "prompts", **asdict(self)}

    @classmethod
    def from_json(cls, about: Any, path: Path) -> TableRecord:
        settings = TableSettings.from_json(about, path)
        names = [field.name for field in fields(cls) if field not in fields(TableSettings)]
        rest = {name: about.get(name) for name in names}
        counts = [rest[name] for name in ("num_prompts", "num_texts", "width")]
        counts += [1 if rest[name] is None else rest[name] for name in ("pooled_width", "max_sequence_length")]
        if any(type(count) is not int or not 1 <= count < 2**31 for count in counts) or type(rest["cut"]) is not int:
            raise InputError(f"{path}: sizes are {counts}, cut is {rest['cut']!r}; expected whole numbers. {_remedy(path)}")
        shards = rest["shards"] if isinstance(rest["shards"], dict) else {}
        if not all(_SHARD_NAME.fullmatch(name) and type(size) is int for name, size in shards.items()):
            raise InputError(f"{path}: expected file names and sizes of shards, found {str(shards)[:80]}; {_remedy(path)}")
        ranges = [shard_range(name) for name in shards]
        if [first for first, _ in ranges] + [rest["num_texts"]] != [0] + [end for _, end in ranges]:
            raise InputError(f"{path}: its shards do not match its {rest['num_texts']} texts; {_remedy(path)}")
        return cls(**asdict(settings), **rest)


class Shard(NamedTuple):
    """The tensors of a shard, mapped into memory, so that nothing is read before it is used."""

    tokens: torch.Tensor  # [sum of lengths, D]
    pooled: torch.Tensor | None  # [n, E]
    length: torch.Tensor  # [n] int64
    digest: torch.Tensor  # [n, 32] uint8
    cut: torch.Tensor  # [n] uint8, 1 where the text was cut


def shard_name(first: int, end: int) -> str:
    """File name of the shard of texts first ... end - 1."""
    return f"{first:010d}-{end:010d}.safetensors"


def shard_range(name: str) -> tuple[int, int]:
    """(first, end) of a shard's file name."""
    match = _SHARD_NAME.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2])


def pack_shard(embeddings: Sequence[Mapping[str, torch.Tensor]], cut: Sequence[bool], digest: str) -> bytes:
    """The bytes of a shard.

    Args:
        embeddings: embedding of each text, in the dtype that is stored: `tokens` [length, D] and possibly `pooled` [E].
        cut: whether each text was cut.
        digest: digest of the table's settings.
    """
    from safetensors.torch import save

    flags = torch.tensor(cut, dtype=torch.uint8)
    digests = [digest_of(e["tokens"], e.get("pooled"), flag) for e, flag in zip(embeddings, flags, strict=True)]
    tensors = {
        "tokens": torch.cat([embedding["tokens"] for embedding in embeddings]),
        "length": torch.tensor([len(embedding["tokens"]) for embedding in embeddings]),
        "digest": torch.stack(digests),
        "cut": flags,
    }
    if "pooled" in embeddings[0]:
        tensors["pooled"] = torch.stack([embedding["pooled"] for embedding in embeddings])
    return save(tensors, metadata={"table": digest})


def map_shard(path: Path, dtype: str) -> Shard:
    """Map a shard into memory, after checking that its tensors match each other.

    Raises:
        InputError: the file is missing, truncated, or not a shard.
    """
    tensors = load_tensors(path)
    try:
        first, end = shard_range(path.name)
        if tensors["length"].ndim != 1 or int(tensors["length"].min()) < 1:
            raise KeyError("length")
        shard = Shard(tensors["tokens"], tensors.get("pooled"), tensors["length"], tensors["digest"], tensors["cut"])
        wanted = {"length": (torch.int64, [end - first]), "digest": (torch.uint8, [end - first, 32])}
        wanted |= {
            "cut": (torch.uint8, [end - first]),
            "tokens": (DTYPES[dtype], [int(shard.length.sum()), shard.tokens.shape[-1]]),
        }
        if shard.pooled is not None:
            wanted["pooled"] = (DTYPES[dtype], [end - first, shard.pooled.shape[-1]])
        right = all((tensors[name].dtype, list(tensors[name].shape)) == kind for name, kind in wanted.items())
    except (LookupError, RuntimeError, TypeError):
        right = False
    if not right:
        raise InputError(f"{path}: not a shard of prompts, or damaged; {_remedy(path)}")
    return shard


def whole_shards(folder: Path, settings: TableSettings, num_texts: int) -> list[str]:
    """Names of the complete shards, in order; remains of others, left by a kill or damage, are removed.

    Raises:
        ForeignShardError: a shard belongs to another table.
    """
    names: list[str] = []
    for path in sorted((folder / SHARDS).glob("*")):
        if not _SHARD_NAME.fullmatch(".".join(path.name.split(".")[:2])):
            continue
        whole = path.suffix != ".tmp"
        if whole:
            try:
                if read_with_metadata(path, whole=False)[1].get("table") != settings.digest:
                    raise ForeignShardError(f"{path}: written for other prompts or by another text encoder; use another folder")
                map_shard(path, settings.dtype)
            except (ForeignShardError, UnreadableError):  # what cannot be read now may be whole
                raise
            except InputError:
                whole = False
        if whole:
            first, end = shard_range(path.name)
            whole = (shard_range(names[-1])[1] if names else 0) <= first < end <= num_texts
        if whole:
            names.append(path.name)
        else:
            path.unlink()
    return names


def fingerprint_of(
    settings: TableSettings, width: int, pooled_width: int | None, cut: int, index: Mapping[str, torch.Tensor]
) -> str:
    """sha256 of settings, rows and embeddings; it does not depend on how texts are divided into shards."""
    about = {field.name: getattr(settings, field.name) for field in fields(TableSettings)}
    digest = hashlib.sha256(json.dumps([about, width, pooled_width, cut], sort_keys=True).encode())
    for name in ("prompt", "negative_prompt", "length", "digest"):
        digest.update(np.ascontiguousarray(index[name].numpy()).tobytes())
    return digest.hexdigest()


def digest_of(tokens: torch.Tensor, pooled: torch.Tensor | None, cut: torch.Tensor) -> torch.Tensor:  # [32] uint8
    """sha256 of what is stored for one text: tokens [length, D], pooled [E], cut []."""
    digest = hashlib.sha256()
    for tensor in (tokens, pooled, cut[None]):
        if tensor is not None:
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, mapped into memory.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return read_safetensors(path, whole=False)
    except UnreadableError:
        raise
    except InputError as error:
        raise InputError(f"{error}; {_remedy(path)}") from None


def _remedy(path: Path) -> str:
    return f"delete {path.name} and rerun the command that wrote it, or restore it"
