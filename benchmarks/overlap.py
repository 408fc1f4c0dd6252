"""How much of the writing of trajectories is hidden behind the computing, with a disk of a given speed.

    python benchmarks/overlap.py

The teacher is a tiny transformer with random weights; the disk is slowed down by a sleep for each shard, so that the
result does not depend on what else uses it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pyard.models.dit import DiT, DiTConfig
from pyard.noise_schedule import NoiseSchedule
from pyard.teachers.dit import DiTTeacher
from pyard.trajectories import generate, generate_trajectories
from pyard.trajectories.store import write_shard

RESULTS = Path(__file__).parent / "results"


def seconds_of(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = DiTConfig(input_size=8, in_channels=1, patch_size=2, hidden_size=64, depth=4, num_heads=4, num_classes=10)
    teacher = DiTTeacher(DiT(config), NoiseSchedule())
    shards = 8

    def run(disk_seconds: float) -> float:
        def slow_write(*args: Any) -> None:
            time.sleep(disk_seconds)
            write_shard(*args)

        with tempfile.TemporaryDirectory() as folder, mock.patch.object(generate, "write_shard", slow_write):
            return seconds_of(
                lambda: generate_trajectories(
                    teacher, folder, 64 * shards, batch_size=64, shard_size=64, teacher_steps=25, progress=False
                )
            )

    run(0.0)
    rows = []
    base = statistics.median(run(0.0) for _ in range(arguments.repeats))
    for share in (0.25, 0.5, 0.9):
        disk = share * base / shards
        taken = statistics.median(run(disk) for _ in range(arguments.repeats))
        hidden = 1 - (taken - base) / (shards * disk)
        rows.append({"disk_seconds_per_shard": disk, "of_computing": share, "seconds": taken, "hidden": hidden})
        print(rows[-1], flush=True)
    result = {"shards": shards, "seconds_without_disk": base, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overlap.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
