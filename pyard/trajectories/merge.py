"""Join stores that hold parts of the same trajectories."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from pyard.conditions import save_conditions
from pyard.errors import InputError
from pyard.storage.disk import require_room
from pyard.storage.files import file_sha256, new_file, sync_directory, this_process, to_bytes, write_atomically
from pyard.storage.typed import checked
from pyard.trajectories.parts import Part, writing
from pyard.trajectories.shard import ShardRecord
from pyard.trajectories.store import TrajectoryStore, list_shards, remove_leftovers


@checked("trajectories")
def merge_trajectories(stores: list[str], out: str | Path, *, move: bool = False, progress: bool = True) -> TrajectoryStore:
    """Join stores that `--part k/n` wrote in several folders to one.

    Every checksum is verified on the way. The same command resumes what was interrupted.

    Example: pyard trajectories merge --stores "[part1, part2]" --out trajectories

    Args:
        stores: folders of the stores, which share one manifest: the same teacher, grid, seed and so on.
        out: folder of the joined store; may be a store that already holds some of it.
        move: remove each source shard once it is in `out`, so that the disk only needs to hold one copy.
        progress: show a progress bar.

    Returns:
        The store; `store.missing()` says what is still not there.

    Raises:
        InputError: stores of different manifests, a broken shard, or two shards of the same samples with different numbers.
    """
    sources = [TrajectoryStore.open(path) for path in stores]
    if not sources:
        raise InputError("merge: no stores given; expected at least one folder")
    out = Path(out)
    manifest = sources[0].manifest
    for source in sources:
        manifest.require_equal(source.manifest, f"{source.path}, to be merged with {sources[0].path},")
        if source.manifest.digest != manifest.digest:
            raise InputError(
                f"merge: {source.path} and {sources[0].path} differ in their embed_times, so their shards cannot be mixed"
            )
        if _same_folder(source.path, out) or _same_folder(source.path / "shards", out / "shards"):
            raise InputError(f"merge: {out} is both a source and the destination; leave it out of the sources")
    count = max(source.requested_count for source in sources)
    total = sum(shard.num_bytes for source in sources for shard in source.shards)
    if not move:
        there_already = {shard.first for shard in list_shards(out, manifest)[0]}
        needed = {s.first: s.num_bytes for source in sources for s in source.shards if s.first not in there_already}
        require_room(out, sum(needed.values()), f"merge: {len(needed)} shards", "or give --move true")
    with writing(out, Part(), manifest, count) as store:
        for source in sources:
            _require_other_folder(source, store)
        save_conditions(sources[0].conditions, out)
        there = {shard.first: shard for shard in store.shards}
        pairs = [(source, shard) for source in sources for shard in source.shards]
        verified: set[str] = set()
        with tqdm(total=total, desc="merging", unit="B", unit_scale=True, disable=not progress) as bar:
            for source, shard in pairs:
                mine = there.get(shard.first)
                if mine is None or mine.count < shard.count:
                    copy_shard(source, shard, store)
                    there[shard.first] = shard
                elif mine.count == shard.count and mine.sha256 != shard.sha256:
                    raise InputError(
                        f"merge: {source.path} and {out} or an earlier store both hold {shard.name}, with different numbers: "
                        "they were computed on machines whose results differ in the last bits. Delete its files in one of them"
                    )
                if move:
                    kept = there[shard.first]
                    if kept.name not in verified and not _is_whole(kept, store):
                        if kept.count > shard.count:
                            file = out / "shards" / f"{kept.name}.safetensors"
                            raise InputError(
                                f"merge: {file} is damaged: delete its sidecar (.json) and rerun the command; "
                                f"{source.path} keeps its shorter one"
                            )
                        copy_shard(source, shard, store)
                    verified.add(kept.name)
                    _remove_shard(source, shard.name)
                bar.update(shard.num_bytes)
        if move:
            for source in sources:
                _remove_orphans(source, store, {shard.name: shard for shard in there.values()})
                sync_directory(source.path / "shards")
    store = TrajectoryStore.open(out)
    missing = sum(end - first for first, end in store.missing())
    if progress:
        print(f"{out}: {store.count} trajectories" + (f", {missing} more were requested" if missing else ""), file=sys.stderr)
    return store


def _same_folder(one: Path, other: Path) -> bool:
    """Whether two names lead to one folder, as links and bind mounts do."""
    return one.exists() and other.exists() and one.samefile(other)


def _require_other_folder(source: TrajectoryStore, to: TrajectoryStore) -> None:
    """Raises InputError if what is written to one store appears in the other: one network folder that is mounted twice."""
    probe = to.path / "shards" / f".probe-{this_process()}"
    probe.touch()
    try:
        if (source.path / "shards" / probe.name).exists():
            raise InputError(f"merge: {source.path} and {to.path} are the same folder; leave it out of the sources")
    finally:
        probe.unlink()


def _is_whole(shard: ShardRecord, store: TrajectoryStore) -> bool:
    file = store.path / "shards" / f"{shard.name}.safetensors"
    return file.is_file() and file_sha256(file) == shard.sha256


def _remove_shard(source: TrajectoryStore, name: str) -> None:
    """The sidecar first, so that it never vouches for a shard that is gone."""
    shards = source.path / "shards"
    (shards / f"{name}.json").unlink(missing_ok=True)
    (shards / f"{name}.safetensors").unlink(missing_ok=True)


def _remove_orphans(source: TrajectoryStore, to: TrajectoryStore, moved: dict[str, ShardRecord]) -> None:
    """Shards that a move which was killed has left without their sidecars."""
    for file in (source.path / "shards").glob("*.safetensors"):
        kept = moved.get(file.stem)
        if kept is None or file.with_suffix(".json").exists():
            continue
        if file_sha256(file) == kept.sha256 and _is_whole(kept, to):
            file.unlink()


def copy_shard(source: TrajectoryStore, shard: ShardRecord, to: TrajectoryStore) -> None:
    """Copy a shard and then its sidecar; as an atomic rename, and only if its checksum is right."""
    origin = source.path / "shards" / f"{shard.name}.safetensors"
    destination = to.path / "shards" / origin.name
    with new_file(destination, shard.num_bytes) as temporary:
        shutil.copyfile(origin, temporary)
        found = file_sha256(temporary)
        if found != shard.sha256:
            raise InputError(
                f"merge: {origin}: sha256 is {found[:12]}..., its sidecar says {shard.sha256[:12]}...; delete its sidecar and "
                "give the command that wrote the store again"
            )
    write_atomically(destination.with_suffix(".json"), to_bytes(dataclasses.asdict(shard)))
    remove_leftovers(to.path, shard)
