"""Tables of conditions: a stored sample has the number of its row, and the table has the row's tensors.

B batch · n tokens of a row · D width of a token
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from pyard.conditions.condition import Condition
from pyard.errors import InputError
from pyard.storage.files import to_bytes
from pyard.storage.folders import appearing_folder
from pyard.storage.numbers import whole_number
from pyard.storage.reading import read_object, reading
from pyard.storage.tensor_files import read_safetensors, require_finite

FOLDER = "conditions"
_ABOUT_NAME = "conditions.json"
_TENSORS_NAME = "conditions.safetensors"

Numbers = Sequence[int] | NDArray[np.integer[Any]] | torch.Tensor


@runtime_checkable
class Conditions(Protocol):
    """The table of a teacher's conditions.

    Attributes:
        count: number of rows that a sample may have, 0 ... count - 1. Null rows have the numbers after these.
    """

    @property
    def count(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """A text that changes whenever a row does; empty for classes, whose rows contain only their number."""
        ...

    def take(self, numbers: Numbers) -> Condition:
        """The tensors of rows, null rows included, on the CPU or on the device of `numbers`."""
        ...

    @property
    def free_sizes(self) -> Mapping[str, Mapping[int, str]]:
        """Names of the dimensions whose size depends on the rows taken, by tensor; equal names have equal sizes."""
        ...

    def null(self, numbers: Numbers) -> torch.Tensor:
        """For each row, the number of the row that guidance leads away from (no class, the negative prompt): int64 [B]."""
        ...


class ClassConditions:
    """Classes: row c is `{"label": c}`, and the null row, "no class", has the number `count`.

    Args:
        count: number of classes.
        names: names of the classes, in order, with synonyms separated by commas. None: the classes only have numbers.
        has_null: whether the network was trained with "no class".
    """

    def __init__(self, count: int, names: Sequence[str] | None = None, *, has_null: bool = True):
        if count < 1:
            raise InputError(f"conditions: {count} classes; expected at least 1")
        if names is not None and len(names) != count:
            raise InputError(f"conditions: {len(names)} names for {count} classes; expected one for each")
        self.count, self.has_null = count, has_null
        self.names = None if names is None else tuple(names)

    fingerprint = ""
    free_sizes: Mapping[str, Mapping[int, str]] = MappingProxyType({})

    def take(self, numbers: Numbers) -> Condition:
        return Condition({"label": as_numbers(numbers)})

    def null(self, numbers: Numbers) -> torch.Tensor:
        if not self.has_null:
            raise InputError("this teacher was trained without label dropout, so it cannot be guided; use cfg_scale=1")
        return torch.full_like(as_numbers(numbers), self.count)

    def find(self, labels: Sequence[int | str]) -> list[int]:
        """The class numbers of labels; texts are looked up among the names and their synonyms.

        A whole name takes precedence over a synonym of another class, and an exact match over one that differs in case.

        Raises:
            InputError: a name is unknown or shared by several classes, or the classes have no names.
        """
        if self.names is None:
            raise InputError(
                f"this student has no class names; give numbers from 0 to {self.count - 1}, or write class_names into its "
                "config.json (docs/checkpoints.md, Class names)"
            )
        return [
            self._find(label) if isinstance(label, str) else whole_number("label", label, 0, self.count - 1) for label in labels
        ]

    def _find(self, label: str) -> int:
        wanted = _one_spelling(label)
        for spellings in self._spellings:
            found = spellings.get(wanted, spellings.get(wanted.casefold(), ()))
            if len(found) == 1:
                return found[0]
            if found:
                several = ", ".join(f"{i} ({self.names[i]})" for i in found[:5])  # type: ignore[index]
                raise InputError(f"{label!r} is the name of several classes: {several}; give a number, or the whole name")
        near = [name for name in self.names or () if wanted.casefold() in _one_spelling(name).casefold()]
        hint = f"; near: {', '.join(near[:5])}" if near else ""
        raise InputError(f"no class is named {label!r}{hint}")

    @functools.cached_property
    def _spellings(self) -> tuple[dict[str, list[int]], ...]:
        """Classes by whole name, by whole name in lower case, and by synonym in lower case."""
        exact: dict[str, list[int]] = {}
        whole: dict[str, list[int]] = {}
        synonyms: dict[str, list[int]] = {}
        for i, name in enumerate(self.names or ()):
            exact.setdefault(_one_spelling(name), []).append(i)
            whole.setdefault(_one_spelling(name).casefold(), []).append(i)
            for synonym in {_one_spelling(part).casefold() for part in name.split(",")}:
                synonyms.setdefault(synonym, []).append(i)
        return exact, whole, synonyms


def _one_spelling(name: str) -> str:
    """A name whose accents are written in one way: macOS, and archives made there, take them apart."""
    return unicodedata.normalize("NFC", name.strip())


class EmbeddingTable:
    """Rows of token embeddings of any length, kept unpadded; the last row is the null row.

    `take` pads the rows of a batch to the longest of them: `{"tokens": [B, n, D], "mask": bool [B, n]}`.

    Args:
        rows: count + 1 tensors [n_i, D] of one floating-point dtype, n_i at least 1; the last one is the null row.

    Raises:
        InputError: there are fewer than two rows, or their widths or dtypes differ.
    """

    def __init__(self, rows: Sequence[torch.Tensor]):
        if len(rows) < 2:
            raise InputError(f"conditions: {len(rows)} rows; expected at least one row and the null row")
        kinds = {(row.ndim, row.shape[-1] if row.ndim else 0, row.dtype) for row in rows}
        if len(kinds) > 1 or rows[0].ndim != 2 or not rows[0].is_floating_point() or not all(len(row) for row in rows):
            raise InputError("conditions: rows of different kinds; expected tensors [n, D] of one floating-point dtype, n >= 1")
        self._tokens = torch.cat(list(rows)).cpu().contiguous()
        self._begin = np.concatenate([[0], np.cumsum([len(row) for row in rows])])

    free_sizes: Mapping[str, Mapping[int, str]] = MappingProxyType({"tokens": {1: "num_tokens"}, "mask": {1: "num_tokens"}})

    @property
    def count(self) -> int:
        """Number of rows, without the null row."""
        return len(self._begin) - 2

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of lengths and embeddings."""
        digest = hashlib.sha256(self._begin.astype("<i8").tobytes())
        digest.update(f"{self._tokens.dtype} {tuple(self._tokens.shape)}".encode())
        digest.update(self._tokens.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def take(self, numbers: Numbers) -> Condition:
        wanted = as_numbers(numbers)
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) <= self.count:
            raise InputError(f"condition numbers from {int(wanted.min())} to {int(wanted.max())}; expected 0 to {self.count}")
        rows = [self._tokens[self._begin[i] : self._begin[i + 1]] for i in wanted.tolist()]
        longest = max((len(row) for row in rows), default=1)
        tokens = self._tokens.new_zeros((len(rows), longest, self._tokens.shape[-1]))
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        return Condition({"tokens": tokens, "mask": mask}).to(wanted.device)

    def null(self, numbers: Numbers) -> torch.Tensor:
        return torch.full_like(as_numbers(numbers), self.count)

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingTable:
        # It never changes, so copies of a student, such as its averages, share the table.
        return self

    def save(self, folder: Path) -> None:
        """Write the table into a folder that is being built."""
        from safetensors.torch import save_file

        lengths = torch.from_numpy(np.diff(self._begin).astype(np.int64))
        save_file({"tokens": self._tokens, "lengths": lengths}, folder / _TENSORS_NAME)
        (folder / _ABOUT_NAME).write_bytes(to_bytes({"kind": "embeddings", "fingerprint": self.fingerprint}))

    @classmethod
    def load(cls, folder: Path) -> EmbeddingTable:
        """Read a table that `save` wrote."""
        tensors = read_safetensors(folder / _TENSORS_NAME)
        require_finite(tensors, folder / _TENSORS_NAME)
        with reading(folder / _TENSORS_NAME, "it is not a table of conditions written by pyard", RuntimeError):
            return cls(list(tensors["tokens"].split(tensors["lengths"].tolist())))


def save_conditions(conditions: Conditions, folder: Path) -> None:
    """Write a table into the sub-folder `conditions`, unless an equal table is already there. Classes need no table.

    Raises:
        InputError: tables of this class cannot be saved, or another table is there.
    """
    from pyard.conditions.prompts import PromptTable  # which needs this module

    if isinstance(conditions, ClassConditions):
        return
    if not isinstance(conditions, EmbeddingTable | PromptTable):
        raise InputError(
            f"conditions: a {type(conditions).__name__} cannot be stored; expected classes, an EmbeddingTable or a PromptTable"
        )
    path = folder / FOLDER
    if not path.exists():
        with appearing_folder(path) as building:  # of several writers, the first one wins
            conditions.save(building)
    found = load_conditions(folder)
    if found is None or found.fingerprint != conditions.fingerprint:
        raise InputError(f"{path} holds a different table of conditions; use another folder")


def load_conditions(*folders: Path) -> Conditions | None:
    """The table in the sub-folder `conditions` of the first of these folders that has one; None if there is none."""
    for folder in folders:
        path = folder / FOLDER
        if not (path / _ABOUT_NAME).exists():
            continue
        about = read_object(path / _ABOUT_NAME, "the description of a table of conditions")
        if about.get("kind") == "prompts":
            from pyard.conditions.prompts import PromptTable  # which needs this module

            return PromptTable(path)
        if about.get("kind") != "embeddings":
            raise InputError(
                f"{path / _ABOUT_NAME}: {json.dumps(about)[:80]} is not a kind of conditions that this version of pyard reads"
            )
        table = EmbeddingTable.load(path)
        if table.fingerprint != about.get("fingerprint"):
            raise InputError(f"{path}: the table of conditions was changed after it was written; restore it")
        return table
    return None


def as_numbers(numbers: Numbers) -> torch.Tensor:
    """Condition numbers as int64 [B], on their device."""
    tensor = numbers if isinstance(numbers, torch.Tensor) else torch.as_tensor(np.asarray(numbers))
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        if tensor.numel():
            raise InputError(f"condition numbers: {tensor.dtype} {list(tensor.shape)}; expected integers [B]")
        tensor = tensor.flatten()
    return tensor.to(torch.int64)
