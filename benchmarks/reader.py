"""The native reader against memcpy and against a DataLoader over the authors' files: one run, warm cache.

Speeds are taken in many short turns, so that what else the machine does meets all alike; the table has their medians.

    python benchmarks/reader.py [--quick]

(a) memcpy: as many threads as the reader has copy as many bytes a batch from anonymous memory, as large as the store, into
    as many buffers as the reader uses in turn.
(b) DataLoader: torch's, over one .npz for each sample and step in the layout of alsdudrla10/ARD, six files a sample.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import pyard
from pyard.bench.machine import processor
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.trajectories import TrajectoryManifest, TrajectoryReader, TrajectoryStore
from pyard.trajectories.compute import pack_shard
from pyard.trajectories.store import start_writing, write_shard

SHAPE = (4, 32, 32)  # ImageNet-256 latents
STEPS = 4
SHARD = 512
NPZ_PLACES = (("zt", 25), ("pred_z0", 15), ("pred_z0", 10), ("pred_z0", 5), ("pred_z0", 20), ("zt", 0))
RESULTS = Path(__file__).parent / "results"


def synthetic_store(path: Path, count: int, dtype: str) -> TrajectoryStore:
    """A store of random numbers; only its layout and size matter here."""
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
        num_classes=1000,
        keep="denoised",
        dtype=dtype,  # type: ignore[arg-type]
        seed=0,
        labels="balanced",
        batch_size=SHARD,
        shard_size=SHARD,
    )
    (path / "shards").mkdir(parents=True)
    store = start_writing(path, manifest, count)
    for first in range(0, count, SHARD):
        tensors = {
            "label": torch.from_numpy(manifest.number_of(np.arange(first, first + SHARD))),
            "noise": torch.randn(SHARD, *SHAPE),
            "denoised": torch.randn(SHARD, STEPS, *SHAPE),
        }
        write_shard(store, *pack_shard(tensors, manifest, first, "cpu"))
    return TrajectoryStore.open(path)


def rate(samples: int, work: Callable[[], None]) -> float:
    """Samples a second of one call."""
    begin = time.perf_counter()
    work()
    return samples / (time.perf_counter() - begin)


def reader_rate(reader: TrajectoryReader, batches: int) -> float:
    def work() -> None:
        for _ in itertools.islice(reader, batches):
            pass

    return rate(batches * reader.batch_size, work)


class MemcpyRate:
    """Threads that copy a batch's worth of bytes again and again."""

    def __init__(self, count: int, batch_size: int, threads: int, buffers: int):
        row = (1 + STEPS) * int(np.prod(SHAPE))
        self.source = np.ones((count, row), np.float32)
        self.target = np.ones((buffers, batch_size, row), np.float32)
        self.batch_size, self.threads = batch_size, threads

    def __call__(self, batches: int) -> float:
        def copy(thread: int) -> None:
            begin, end = (self.batch_size * (thread + k) // self.threads for k in (0, 1))
            for i in range(batches):
                at = i * self.batch_size % (len(self.source) - self.batch_size)
                np.copyto(self.target[i % len(self.target), begin:end], self.source[at + begin : at + end])

        def work() -> None:
            threads = [threading.Thread(target=copy, args=(k,)) for k in range(self.threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return rate(batches * self.batch_size, work)


def write_npz_tree(store: TrajectoryStore, root: Path, count: int) -> list[Path]:
    """One .npz a sample and step; returns the files of the noise."""
    files = []
    for shard in store.shards:
        tensors = store.tensors(shard)
        for i in range(min(shard.count, count - shard.first)):
            label, name = int(tensors["label"][i]), f"0_{shard.first + i:06d}.npz"
            arrays = [tensors["noise"][i], *tensors["denoised"][i], tensors["denoised"][i, -1]]
            for (kind, step), array in zip(NPZ_PLACES, arrays, strict=True):
                file = root / kind / str(step) / str(label) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                np.savez(file, **{kind: array})
            files.append(root / "zt" / "25" / str(label) / name)
    return files


class NpzDataset(Dataset[tuple[np.ndarray, ...]]):
    """Six small files a sample."""

    def __init__(self, root: Path, files: list[Path]):
        self.root, self.files = root, files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[np.ndarray, ...]:
        label, name = self.files[i].parts[-2:]
        arrays = (np.load(self.root / kind / str(step) / label / name)[kind] for kind, step in NPZ_PLACES)
        return (*arrays, np.array(int(label)))


def npz_rate(dataset: NpzDataset, batch_size: int, workers: int) -> float:
    loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0)
    for _ in loader:  # warms the cache and starts the workers
        pass

    def work() -> None:
        for _ in loader:
            pass

    return rate(len(loader) * batch_size, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small store and few repetitions")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    count, npz_count, repeats = (1024, 128, 5) if arguments.quick else (8192, 1024, 61)
    batches = min(count // arguments.batch_size, 32)  # of one turn: some 20 ms
    threads_tried = sorted({1, len(os.sched_getaffinity(0))})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            store = synthetic_store(Path(folder) / dtype, count, dtype)
            for threads in threads_tried:
                memcpy = MemcpyRate(count, arguments.batch_size, threads, buffers=6)
                reader = TrajectoryReader(
                    store, arguments.batch_size, target="denoised", backend="native", num_threads=threads, prefetch=4
                )
                memcpy(batches), reader_rate(reader, 3 * count // arguments.batch_size)  # warm: page tables and cache
                pairs = [(memcpy(batches), reader_rate(reader, batches)) for _ in range(repeats)]
                python = TrajectoryReader(store, arguments.batch_size, target="denoised", backend="python")
                row: dict[str, Any] = {
                    "store": dtype,
                    "threads": threads,
                    "memcpy": statistics.median(m for m, _ in pairs),
                    "native": statistics.median(r for _, r in pairs),
                    "memcpy_best": max(m for m, _ in pairs),
                    "native_best": max(r for _, r in pairs),
                    "python": statistics.median(reader_rate(python, batches) for _ in range(3)),
                }
                row["native_of_memcpy"] = row["native"] / row["memcpy"]
                row["best_of_best"] = row["native_best"] / row["memcpy_best"]
                rows.append(row)
                print(row, flush=True)
                del memcpy, reader
        tree = Path(folder) / "latent_trajectory"
        dataset = NpzDataset(tree, write_npz_tree(TrajectoryStore.open(Path(folder) / "float32"), tree, npz_count))
        npz = {workers: npz_rate(dataset, arguments.batch_size, workers) for workers in (0, 2, 4)}
    best = max(npz.values())
    for row in rows:
        row["native_of_npz"] = row["native"] / best
    result = {
        "pyard": pyard.__version__,
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.platform(),
        "batch_size": arguments.batch_size,
        "samples": count,
        "sample_shape": SHAPE,
        "steps": STEPS,
        "batch_bytes_float32": arguments.batch_size * (1 + STEPS) * int(np.prod(SHAPE)) * 4,
        "rows": rows,
        "npz_dataloader_samples_per_second_by_workers": npz,
    }
    if arguments.quick:
        print(json.dumps(result, indent=2))
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "reader.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "reader.md").write_text(as_table(result), encoding="utf-8")
    print(as_table(result))


def as_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    columns = ("store", "threads", "memcpy", "native reader", "of memcpy", "best of best", "plain Python", "of the DataLoader")
    lines = [
        "# The native trajectory reader",
        "",
        f"`python benchmarks/reader.py` on {result['cpu']}, {result['cores']} cores. Samples a second, warm cache, one run;",
        "memcpy and reader in short turns, medians of them, and the best turns against each other.",
        f"Batches of {result['batch_size']} trajectories, S = {result['steps']}, {result['sample_shape']} each, float32.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for row in result["rows"]:
        cells = (
            row["store"],
            str(row["threads"]),
            f"{row['memcpy']:,.0f}",
            f"{row['native']:,.0f}",
            f"{row['native_of_memcpy']:.0%}",
            f"{row['best_of_best']:.0%}",
            f"{row['python']:,.0f}",
            f"{row['native_of_npz']:.0f} x",
        )
        lines.append(f"| {' | '.join(cells)} |")
    npz = ", ".join(f"{rate:,.0f} ({w} workers)" for w, rate in result["npz_dataloader_samples_per_second_by_workers"].items())
    return "\n".join([*lines, "", f"DataLoader over one .npz a sample and step (six files a sample): {npz}.", ""])


if __name__ == "__main__":
    main()
