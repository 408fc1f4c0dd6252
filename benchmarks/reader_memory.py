"""Memory of the process while the native reader hands out a million trajectories of a sparse store.

python benchmarks/reader_memory.py [--samples N]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import pyard
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.storage.files import to_bytes
from pyard.trajectories import TrajectoryManifest, TrajectoryReader, TrajectoryStore
from pyard.trajectories.manifest import SAFETENSORS_DTYPES
from pyard.trajectories.shard import ShardRecord
from pyard.trajectories.store import shard_ranges, start_writing

SHAPE = (4, 8, 8)
STEPS = 4
SHARD = 16384
RESULTS = Path(__file__).parent / "results"


def sparse_store(path: Path, count: int) -> TrajectoryStore:
    """A store whose payload is a hole: every number is 0, and nothing takes disk space."""
    schedule = NoiseSchedule()
    manifest = TrajectoryManifest(
        teacher_fingerprint="benchmark",
        solver="ddim",
        schedule=schedule,
        grid=TimeGrid.build(schedule, STEPS, 25),
        cfg_scale=1.5,
        cfg_channels=None,
        cfg_interval=None,
        precision="float32",
        compiled=False,
        sample_shape=SHAPE,
        num_classes=1,
        keep="denoised",
        dtype="float32",
        seed=0,
        labels="balanced",
        batch_size=SHARD,
        shard_size=SHARD,
    )
    (path / "shards").mkdir(parents=True)
    start_writing(path, manifest, count)
    for first, end in shard_ranges(manifest, count):
        header, at = {}, 0
        for name, tensor in manifest.layout(end - first).items():
            dtype = SAFETENSORS_DTYPES[tensor.dtype][0]
            header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.num_bytes]}
            at += tensor.num_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        record = ShardRecord(first, end - first, 8 + len(text) + at, "0" * 64, manifest.digest, {}, {})
        file = path / "shards" / f"{record.name}.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text)
        with file.open("rb+") as shard:
            shard.truncate(record.num_bytes)
        file.with_suffix(".json").write_bytes(to_bytes(dataclasses.asdict(record)))
    return TrajectoryStore.open(path)


def memory() -> dict[str, float]:
    """Megabytes of this process: its own, and file pages that it has mapped, which the system takes back at will."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {name: int(fields[key].split()[0]) / 1e3 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2_000_000, help="trajectories to read; the store has half as many")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = sparse_store(Path(folder), arguments.samples // 2)
        reader = TrajectoryReader(store, arguments.batch_size, target="denoised", backend="native")
        next(reader)
        rows: list[dict[str, Any]] = [{"samples": 0, **memory()}]
        begin = time.perf_counter()
        turn = arguments.samples // arguments.batch_size // 20
        for number in range(1, 21):
            for _ in itertools.islice(reader, turn):
                pass
            rows.append({"samples": number * turn * arguments.batch_size, **memory()})
            print(rows[-1], flush=True)
        seconds = time.perf_counter() - begin
    result = {
        "pyard": pyard.__version__,
        "store_gigabytes": store.count * store.manifest.sample_bytes / 1e9,
        "store_samples": store.count,
        "samples_per_second": rows[-1]["samples"] / seconds,
        "megabytes": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "reader-memory.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
