"""The folder of a trajectory store: where reading and writing a store begins.

- `manifest.json`: what decides the numbers; written once, never changed.
- `request.json`: the number of trajectories last requested, which shows whether the store is complete.
- `shards/`: see shard.py. Readers find the shards by listing the folder, so several writers never share a file.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyard.conditions import ClassConditions, Conditions, PromptTable, load_conditions
from pyard.errors import InputError
from pyard.storage.files import file_sha256, to_bytes, write_atomically
from pyard.storage.reading import MOST_LABELLED_BYTES, UnreadableError, read_json
from pyard.trajectories.manifest import MOST_SHARDS, TrajectoryManifest
from pyard.trajectories.shard import ForeignShardError, ShardRecord, map_shard, read_record, shard_name, shard_range

# Shards are named by numbers of ten digits.
MAX_COUNT = 10**10 - 1


@dataclass(frozen=True)
class TrajectoryStore:
    """A trajectory store, as it was when it was opened.

    Example:
        store = TrajectoryStore.open("trajectories/digits")
        store.verify()
        print(store.count, store.manifest.grid)

    Args:
        path: its folder.
        manifest: all settings that determine the stored numbers.
        requested_count: the number of trajectories last requested.
        shards: the complete shards by their first sample, at most one for each.
        problems: one line for each sidecar (the `.json` beside a shard) whose shard is missing or incomplete.
    """

    path: Path
    manifest: TrajectoryManifest
    requested_count: int
    shards: tuple[ShardRecord, ...]
    problems: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path) -> TrajectoryStore:
        """Open a store: read its manifest and list its shards, without reading any trajectory.

        Args:
            path: the folder that `generate_trajectories` wrote.

        Raises:
            InputError: there is no store, its format version is another one, or its manifest was changed.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest is None:
            raise InputError(f"{path}: not a trajectory store (no manifest.json); `pyard trajectories` writes one")
        requested = read_request(path)
        if requested is None:
            raise InputError(f"{path / 'request.json'}: missing; the command that wrote the store restores it")
        if -(-requested // manifest.shard_size) > MOST_SHARDS:
            raise InputError(
                f"{path / 'request.json'}: {requested} trajectories were requested, in shards of {manifest.shard_size}; a "
                f"store has at most {MOST_SHARDS}. Delete it and rerun the command that wrote the store"
            )
        shards, problems = list_shards(path, manifest)
        return cls(path, manifest, requested, shards, problems)

    @property
    def count(self) -> int:
        """Trajectories in the store."""
        return sum(shard.count for shard in self.shards)

    @functools.cached_property
    def conditions(self) -> Conditions:
        """The table that condition numbers are rows of: classes, or the table in the store's folder.

        Raises:
            InputError: the table is missing, or is not the one that the manifest names.
        """
        manifest = self.manifest
        if not manifest.conditions:
            return ClassConditions(manifest.num_classes)
        table = load_conditions(self.path)
        if table is None or table.fingerprint != manifest.conditions:
            state = "is missing" if table is None else "is not the one that the manifest names"
            raise InputError(
                f"trajectories {self.path}: the table of conditions {state}; the command that wrote the store restores it"
            )
        return table

    def missing(self) -> list[tuple[int, int]]:
        """(first, end) of each requested shard that is missing or too short."""
        return missing_shards(self.manifest, self.shards, self.requested_count)

    def require_complete(self) -> None:
        """Raise an InputError if requested trajectories are missing."""
        missing = self.missing()
        if missing:
            reasons = f" ({'; '.join(self.problems[:3])})" if self.problems else ""
            raise InputError(
                f"trajectories {self.path}: {self.requested_count} were requested, {self.count} are stored; "
                f"{len(missing)} shards are missing or too short, the first {shard_name(*missing[0])}{reasons}. Give the "
                "command that wrote the store again to finish it, with a smaller count to do with less"
            )

    def tensors(self, shard: ShardRecord) -> dict[str, NDArray[Any]]:
        """Memory maps of a shard's tensors: `noise` [n, C, ...], `label` [n], `state` and `denoised` [n, S, C, ...].

        bfloat16 tensors are returned as their bits, in uint16.
        """
        return map_shard(self.path / "shards" / f"{shard.name}.safetensors", self.manifest.layout(shard.count))

    def verify(self) -> None:
        """Read all shards, and the table of prompts if there is one, and compare them with their checksums.

        Raises:
            InputError: shards are missing, changed, or have other labels than those of the manifest; or files of the table of
                prompts are damaged. The message names all of them.
        """
        self.require_complete()
        if isinstance(self.conditions, PromptTable):
            self.conditions.verify()
        broken = []
        for shard in self.shards:
            path = self.path / "shards" / f"{shard.name}.safetensors"
            try:
                found = file_sha256(path)
                if found != shard.sha256:
                    raise InputError(f"{path.name}: sha256 is {found[:12]}..., its sidecar says {str(shard.sha256)[:12]}...")
                expected = self.manifest.number_of(np.arange(shard.first, shard.end))
                if not np.array_equal(self.tensors(shard)["label"], expected):
                    raise InputError(f"{path.name}: its labels are not those that the manifest gives")
            except (InputError, OSError) as error:
                broken.append(str(error))
        if broken:
            raise InputError(
                f"trajectories {self.path}: {len(broken)} of {len(self.shards)} shards are broken: "
                f"{'; '.join(broken)}. Delete their sidecars (.json) and give the command that wrote the store again"
            )


def read_manifest(path: Path) -> TrajectoryManifest | None:
    """The manifest of a store's folder, None if there is none; an InputError if it cannot be understood."""
    file = path / "manifest.json"
    if not file.exists():
        return None
    try:
        return TrajectoryManifest.from_json(read_json(file, MOST_LABELLED_BYTES))
    except InputError as error:
        raise InputError(str(error) if str(file) in str(error) else f"{file}: {error}") from None


def read_request(path: Path) -> int | None:
    """How many trajectories a store was last asked for, None if that was never written."""
    file = path / "request.json"
    if not file.exists():
        return None
    request = read_json(file)
    count = request.get("count") if isinstance(request, dict) else None
    if type(count) is not int or not 1 <= count <= MAX_COUNT:
        raise InputError(f'{file}: expected {{"count": N}}, found {request!r:.60}; delete it and rerun the command')
    return count


def list_shards(path: Path, manifest: TrajectoryManifest) -> tuple[tuple[ShardRecord, ...], tuple[str, ...]]:
    """The whole shards of a store, the longest of each first sample; and why other sidecars do not count."""
    longest: dict[int, ShardRecord] = {}
    problems = []
    for sidecar in sorted((path / "shards").glob("*.json")):
        if shard_range(sidecar.name) is None:
            problems.append(f"{sidecar.name}: not the name of a shard")
            continue
        try:
            record = read_record(sidecar, manifest)
        except ForeignShardError as error:
            raise InputError(f"trajectories {path}: {error}; restore the original") from None
        except UnreadableError:  # which does not mean that there is no shard
            raise
        except InputError as error:
            problems.append(str(error))
            continue
        # Names sort by first sample, then by end, so a longer shard comes after the shorter one that it replaces.
        longest[record.first] = record
    return tuple(longest.values()), tuple(problems)


def missing_shards(manifest: TrajectoryManifest, shards: tuple[ShardRecord, ...], count: int) -> list[tuple[int, int]]:
    """(first, end) of the shards of the first `count` samples that `shards` does not hold whole."""
    present = {shard.first: shard.end for shard in shards}
    return [(first, end) for first, end in shard_ranges(manifest, count) if present.get(first, 0) < end]


def shard_ranges(manifest: TrajectoryManifest, count: int) -> list[tuple[int, int]]:
    """(first, end) of all shards of a store of `count` samples."""
    size = manifest.shard_size
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def start_writing(path: Path, wanted: TrajectoryManifest, count: int) -> TrajectoryStore:
    """Create a store, or open one to resume or extend it; it is asked for `count`, or what it holds if more.

    Raises:
        InputError: the folder holds other trajectories than `wanted`.
    """
    manifest = read_manifest(path)
    if manifest is None:
        manifest = wanted
        (path / "shards").mkdir(parents=True, exist_ok=True)
    manifest.require_equal(wanted, str(path))
    shards, problems = list_shards(path, manifest)
    # Shards first, then what vouches for them: a folder with shards of another, lost manifest has been refused by now.
    if not (path / "manifest.json").exists():
        write_atomically(path / "manifest.json", to_bytes(manifest.to_json()))
    count = max(count, max((shard.end for shard in shards), default=0))
    write_atomically(path / "request.json", to_bytes({"count": count}))
    return TrajectoryStore(path, manifest, count, shards, problems)


def write_shard(store: TrajectoryStore, content: bytes, record: ShardRecord) -> None:
    """Make a shard and then its sidecar appear, and remove the shorter ones that it replaces."""
    shards = store.path / "shards"
    write_atomically(shards / f"{record.name}.safetensors", content)
    write_atomically(shards / f"{record.name}.json", to_bytes(asdict(record)))
    remove_leftovers(store.path, record)


def remove_leftovers(path: Path, record: ShardRecord) -> None:
    """Remove everything else that begins at a whole shard's first sample: a shorter shard, what a kill left behind."""
    # Sidecars sort before their shards: a shard must not outlive, nor be outlived by, the claim that it is whole.
    for file in sorted((path / "shards").glob(f"{record.first:010d}-*")):
        if not file.name.startswith(record.name + ".") or file.suffix == ".tmp":
            file.unlink(missing_ok=True)
