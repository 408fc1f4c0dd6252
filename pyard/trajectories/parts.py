"""Who writes which shards: part k of n has every n-th one, and two writers of the same shards are refused.

Locks live in `.locks/`, one for each part, and the system releases them when a process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from pyard.errors import InputError
from pyard.trajectories.manifest import TrajectoryManifest
from pyard.trajectories.store import TrajectoryStore, start_writing

# For the moments in which other writers of the store begin.
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Part:
    """One of the writers of a store.

    Args:
        number: 1 to count.
        count: writers in all.
        same_folder: whether the others are known to write to the same folder, so that the store will be whole.
    """

    number: int = 1
    count: int = 1
    same_folder: bool = False

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str | None) -> Part:
        """The part that `text` (k/n) names; without one that of this process of torchrun or Accelerate, or the whole.

        Raises:
            InputError: not k/n with k from 1 to n.
        """
        if text is None:
            rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
            if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
                raise InputError(
                    f"trajectories: RANK={rank}, WORLD_SIZE={world} in the environment; expected 0 <= RANK < WORLD_SIZE"
                )
            return cls(int(rank) + 1, int(world), same_folder=int(world) > 1)
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"trajectories: part is {text!r}; expected k/n with k from 1 to n, such as 2/4")
        return cls(int(match[1]), int(match[2]))

    def owns(self, first: int, manifest: TrajectoryManifest) -> bool:
        """Whether the shard that begins at sample `first` is of this part."""
        return first // manifest.shard_size % self.count == self.number - 1


@contextlib.contextmanager
def writing(path: Path, part: Part, manifest: TrajectoryManifest, count: int) -> Iterator[TrajectoryStore]:
    """Create or open a store for writing, and keep others from writing the same shards.

    Raises:
        InputError: the folder holds other trajectories; or another process writes this part, or another division of the store.
    """
    locks = path / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    mine = filelock.FileLock(locks / f"{part.number}-of-{part.count}.lock", timeout=0)
    try:
        with filelock.FileLock(locks / "start.lock", timeout=_PATIENCE_SECONDS):
            _acquire(mine, path, f"part {part}" if part.count > 1 else "it")
            for other in sorted(locks.glob("*-of-*.lock")):
                if not other.name.endswith(f"-of-{part.count}.lock"):
                    theirs = filelock.FileLock(other, timeout=0)
                    _acquire(theirs, path, "part " + other.stem.replace("-of-", "/"))
                    theirs.release()
            store = start_writing(path, manifest, count)
        yield store
    except filelock.Timeout:
        raise InputError(
            f"trajectories {path}: another process holds the lock for starting to write; wait for it or stop it"
        ) from None
    finally:
        mine.release()


def _acquire(lock: filelock.BaseFileLock, path: Path, what: str) -> None:
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(
            f"trajectories {path}: another process is writing this store ({what}); wait for it or stop it. To write with "
            "several processes, give each a different --part k/n with the same n"
        ) from None


def wait_for_others(path: Path, part: Part, progress: bool) -> None:
    """Return when the other processes of torchrun or Accelerate have written their parts."""
    if progress and TrajectoryStore.open(path).missing():
        print(f"trajectories: part {part} is written; waiting for the other processes", file=sys.stderr)
    while TrajectoryStore.open(path).missing():
        time.sleep(0.5)
