"""What feeds a training: trajectories computed by the teacher, and batches read from a store to the device."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measure import Results, Setting
from benchmarks.gpu.students import new_teacher, teacher_flops
from benchmarks.reader import synthetic_store
from pyard.trajectories import TrajectoryReader, TrajectoryStore, generate_trajectories
from pyard.trajectories.gather import native_module


def trajectories(results: Results, setting: Setting) -> None:
    """Whole trajectories a second, noise and disk included: 25 guided steps of DiT-XL/2 under bfloat16 autocast, batch 64."""

    def run(compiled: bool) -> dict[str, Any]:
        batch, count = (2, 4) if setting.smoke else (64, 128)
        steps = 5 if setting.smoke else 25
        teacher = new_teacher(setting, torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            write = partial(
                generate_trajectories,
                teacher,
                Path(folder) / "store",
                teacher_steps=steps,
                batch_size=batch,
                shard_size=batch,
                precision="bfloat16",
                compile=compiled and not setting.smoke,
                progress=False,
            )
            write(count=batch)  # what starts, compiles and loads
            start_s = time.perf_counter()
            write(count=batch + count)
            ms = (time.perf_counter() - start_s) * 1e3
        flops = 2 * steps * count * teacher_flops(teacher)
        return {"trajectories": count, "ms": ms, "gflop": flops / 1e9, "trajectories_per_s": count / ms * 1e3}

    results.measure("eager", partial(run, False), needs_s=8.0)
    results.measure("compiled, CUDA graphs", partial(run, True), needs_s=25.0)


def reader(results: Results, setting: Setting) -> None:
    """Batches of 64 on the device: from the disk (page cache) through pinned memory, and from a store held on the device."""
    batch, count = (4, 512) if setting.smoke else (64, 4096)
    found, reason = native_module()

    def run(store: TrajectoryStore, options: dict[str, Any]) -> dict[str, Any]:
        batches = iter(TrajectoryReader(store, batch, target="denoised", **options))

        def some(number: int) -> float:
            if setting.device == "cuda":
                torch.cuda.synchronize()
            start_s = time.perf_counter()
            for _ in range(number):
                next(batches).to(torch.device(setting.device))
            if setting.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start_s

        some(8)
        number = 4 if setting.smoke else 400
        seconds = some(number)
        target = next(batches).target  # [B, S, ...]; the noise crosses with it
        moved = target.numel() * target.element_size() * (1 + target.shape[1]) / target.shape[1]
        return {
            "ms": seconds / number * 1e3,
            "samples_per_s": number * batch / seconds,
            "to_device_gb_per_s": number * moved / seconds / 1e9,
            "native_module": "there" if found is not None else reason,
        }

    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Path(folder) / "store", count, "bfloat16")
        for name, options in (
            ("native", {"backend": "native"}),
            ("python", {"backend": "python"}),
            ("held on the device", {"resident": setting.device}),
        ):
            results.measure(name, partial(run, store, options), needs_s=2.0)
