"""How much of the writing of trajectories is hidden behind the computing, with a disk of a given speed.

    python benchmarks/overlap.py

The teacher is a tiny transformer with random weights; the disk is slowed down by a sleep for each shard, so that the
result does not depend on what else uses it. Without disk, with it, and with it but without the writer's thread, in turns; the
fastest of each counts. The last shard's writing cannot be hidden: of 8 shards 87.5 % can.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import DiT
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.trajectories import generate, generate_trajectories
from pyard.trajectories.store import write_shard

RESULTS = Path(__file__).parent / "results"


class AtOnce:
    """An executor without a thread."""

    def __init__(self, *args: Any) -> None: ...

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *args: object) -> None: ...

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*args))
        return done


def seconds_of(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = DiTConfig(input_size=8, in_channels=1, patch_size=2, hidden_size=64, depth=4, num_heads=4, num_classes=10)
    teacher = NetworkTeacher(DiT(config), NoiseSchedule())
    shards = 8

    def run(disk_seconds: float, thread: bool = True) -> float:
        def slow_write(*args: Any) -> None:
            time.sleep(disk_seconds)
            write_shard(*args)

        executor = ThreadPoolExecutor if thread else AtOnce
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(generate, "write_shard", slow_write),
            mock.patch.object(generate, "ThreadPoolExecutor", executor),
        ):
            return seconds_of(
                lambda: generate_trajectories(
                    teacher, folder, 64 * shards, batch_size=64, shard_size=64, teacher_steps=12, progress=False
                )
            )

    base = min(run(0.0) for _ in range(3))
    rows = []
    for share in (0.25, 0.5, 0.9):
        disk = share * base / shards
        turns = [(run(0.0), run(disk), run(disk, thread=False)) for _ in range(arguments.repeats)]
        computing, overlapped, in_turn = (min(times) for times in zip(*turns, strict=True))
        row = {"disk_of_computing": share, "computing": computing, "overlapped": overlapped, "in_turn": in_turn}
        rows.append({**row, "hidden": (in_turn - overlapped) / (in_turn - computing)})
        print(rows[-1], flush=True)
    result = {"shards": shards, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overlap.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
