"""The writer: noise and labels in, one shard after another out; a kill loses at most the shard being computed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

import pyard
from pyard.errors import InputError
from pyard.noise import standard_normal
from pyard.solvers import solve
from pyard.teachers import Teacher, load_teacher
from pyard.time_grid import TimeGrid
from pyard.trajectories.manifest import DType, Keep, TrajectoryManifest
from pyard.trajectories.shard import ShardRecord
from pyard.trajectories.store import TrajectoryStore, read_manifest, remove_leftovers, start_writing, write_shard

DEFAULT_BATCH_SIZE = 64
MAX_SHARD_SAMPLES = 1024
MAX_SHARD_BYTES = 256 * 2**20

_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def generate_trajectories(
    teacher: Teacher | str | Path,
    out: str | Path,
    count: int,
    *,
    num_steps: int = 4,
    teacher_steps: int = 25,
    grid: TimeGrid | None = None,
    cfg_scale: float = 1.5,
    cfg_channels: int | None = None,
    keep: Keep = "both",
    dtype: DType = "float32",
    seed: int = 0,
    labels: Literal["uniform", "balanced"] | list[int] = "uniform",
    batch_size: int | None = None,
    shard_size: int | None = None,
    progress: bool = True,
) -> TrajectoryStore:
    """Write a teacher's ODE trajectories, from noise to data, to a store that students learn from.

    The same call resumes what was interrupted, and a larger count appends to what is there. Sample i is a function of
    `seed` and i: its noise and label bit by bit on every machine, its states bit by bit for equal batch_size on one
    kind of machine.

    Args:
        teacher: a teacher, `digits` for the built-in one, or a teacher's folder.
        out: folder of the store.
        count: how many trajectories the store is to hold in all.
        num_steps: S, the jumps of the student-to-be: states and denoised predictions are stored at S places each.
        teacher_steps: steps of the teacher's solver (DDIM for diffusion schedules, Euler for flows).
        grid: the places themselves; overrides num_steps and teacher_steps.
        cfg_scale: classifier-free guidance weight; 1 is none and halves the cost.
        cfg_channels: guide only the first so many channels, as DiT's public code does with 3 of 4; None guides all.
        keep: what to store beside noise and label: `state` (x_t at the grid times), `denoised` (of x_0) or `both`.
        dtype: how states and predictions are stored, the noise always in float32. Sidecars record the rounding error.
        seed: of noise and labels, 0 to 2**64 - 1.
        labels: `uniform` (drawn), `balanced` (classes in turn) or a list of classes, taken in turn.
        batch_size: samples that the teacher computes together, twice that with guidance; None: 64, or the store's.
        shard_size: samples in a file, a multiple of batch_size, of which a kill loses one; None: at most 1024 samples
            and 256 MiB, or the store's.
        progress: show a progress bar with rate and time left.

    Returns:
        The store, complete.

    Raises:
        InputError: the folder holds trajectories of another teacher, grid or other setting; the disk cannot hold them;
            the teacher computes numbers that are not finite; or another process writes the same store.
    """
    if isinstance(teacher, str | Path):
        teacher = load_teacher(teacher)
    if count < 1:
        raise InputError(f"trajectories: count is {count}; expected at least 1")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"trajectories: {out} is a file; expected a folder, or nothing")
    if grid is None:
        grid = TimeGrid.build(teacher.schedule, num_steps, teacher_steps)
    there = read_manifest(out)
    batch_size = batch_size or (there.batch_size if there else DEFAULT_BATCH_SIZE)
    manifest = TrajectoryManifest(
        teacher_fingerprint=teacher.fingerprint,
        solver="ddim" if teacher.schedule.kind == "ddpm" else "euler",
        schedule=teacher.schedule,
        grid=grid,
        cfg_scale=cfg_scale,
        cfg_channels=cfg_channels,
        sample_shape=teacher.sample_shape,
        num_classes=teacher.num_classes,
        keep=keep,
        dtype=dtype,
        seed=seed,
        labels=labels if isinstance(labels, str) else tuple(labels),
        batch_size=batch_size,
        shard_size=shard_size or (there.shard_size if there else batch_size),
    )
    if shard_size is None and there is None:
        manifest = dataclasses.replace(manifest, shard_size=default_shard_size(manifest))

    with sole_writer(out):
        store = start_writing(out, manifest, count)
        for shard in store.shards:
            remove_leftovers(out, shard)
        write_missing(teacher, store, count, progress)
    return TrajectoryStore.open(out)


def write_missing(teacher: Teacher, store: TrajectoryStore, count: int, progress: bool) -> None:
    """Compute and write every shard that `count` samples need and the store does not hold."""
    missing = store.missing()
    require_disk_space(store, missing, progress)
    samples = sum(end - first for first, end in missing)
    manifest = store.manifest
    with tqdm(
        total=store.requested_count,
        initial=store.requested_count - samples,
        desc="trajectories",
        unit=" trajectories",
        disable=not progress or not missing,
    ) as bar:
        for first, end in missing:
            batches = []
            for begin in range(first, end, manifest.batch_size):
                batches.append(compute_batch(teacher, manifest, begin))
                bar.update(min(manifest.batch_size, end - begin))
            # Batches are computed whole, and samples past `end` dropped: last bits must not depend on the count.
            tensors = {name: torch.cat([batch[name] for batch in batches])[: end - first] for name in batches[0]}
            content, record = pack_shard(tensors, manifest, first, device_name(teacher.device))
            write_shard(store, content, record)
            bar.set_postfix_str(f"{format_bytes(end * manifest.sample_bytes)} on disk")


def compute_batch(teacher: Teacher, manifest: TrajectoryManifest, first: int) -> dict[str, torch.Tensor]:
    """Solve the teacher's ODE for the samples first ... first + batch_size - 1.

    Returns:
        On the CPU: `label` int64 [B]; float32 `noise` [B, C, H, W] and, if kept, `state`, `denoised` [B, S, C, H, W].
    """
    indices = np.arange(first, first + manifest.batch_size)
    noise = torch.from_numpy(standard_normal(manifest.seed, indices, manifest.sample_shape))
    label = torch.from_numpy(manifest.label_of(indices))
    grid = manifest.grid
    states: list[torch.Tensor] = []  # S times [B, C, H, W], x_0 last
    denoised: list[torch.Tensor] = []
    trajectory = solve(
        teacher,
        noise.to(teacher.device),
        label.to(teacher.device),
        grid.teacher_steps,
        cfg_scale=manifest.cfg_scale,
        cfg_channels=manifest.cfg_channels,
    )
    for evaluation, (state, prediction) in enumerate(trajectory, start=1):
        if evaluation in grid.state_index:
            states.append(state)
        if evaluation in grid.denoised_index:
            denoised.append(prediction)
    denoised.append(states[-1])
    batch = {"label": label, "noise": noise}
    for name, steps in (("state", states), ("denoised", denoised)):
        if manifest.keep not in (name, "both"):
            continue
        stacked = torch.stack(steps, dim=1).cpu()
        if not bool(torch.isfinite(stacked).all()):
            sample = int(torch.nonzero(~torch.isfinite(stacked))[0, 0])
            raise InputError(
                f"trajectories: the teacher's {name} of sample {first + sample} (label {int(label[sample])}) is not "
                "finite; the teacher is broken, or computes in a dtype too narrow for it"
            )
        batch[name] = stacked
    return batch


def pack_shard(
    tensors: dict[str, torch.Tensor], manifest: TrajectoryManifest, first: int, device: str
) -> tuple[bytes, ShardRecord]:
    """Round the tensors of a shard to the manifest's dtype and serialize them.

    Returns:
        The bytes of the safetensors file and its sidecar.
    """
    dtype = _TORCH_DTYPES[manifest.dtype]
    stored = dict(tensors)
    rounding = {}
    for name in stored.keys() & {"state", "denoised"}:
        exact = tensors[name]
        stored[name] = exact.to(dtype)
        if not bool(torch.isfinite(stored[name]).all()):
            raise InputError(
                f"trajectories: {name} reaches {float(exact.abs().max()):.3g}, more than {manifest.dtype} holds; "
                "use dtype=bfloat16"
            )
        if dtype != torch.float32:
            error = stored[name].double() - exact.double()
            rounding[name] = {"rms": float(error.square().mean().sqrt()), "max": float(error.abs().max())}
    # One key only: safetensors writes several in an order that changes from run to run.
    about = json.dumps({"first": first, "manifest": manifest.digest}, sort_keys=True)
    content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in stored.items()}, {"pyard": about})
    record = ShardRecord(
        first=first,
        count=len(tensors["label"]),
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        manifest=manifest.digest,
        rounding=dict(sorted(rounding.items())),
        written_by={"pyard": pyard.__version__, "torch": torch.__version__, "device": device},
    )
    return content, record


def default_shard_size(manifest: TrajectoryManifest) -> int:
    """Whole batches of at most 1024 samples and 256 MiB in all, but at least one batch."""
    samples = min(MAX_SHARD_SAMPLES, MAX_SHARD_BYTES // manifest.sample_bytes)
    return max(1, samples // manifest.batch_size) * manifest.batch_size


def require_disk_space(store: TrajectoryStore, missing: list[tuple[int, int]], progress: bool) -> None:
    """Say what the missing shards will take; raises InputError if the disk has not so much left."""
    if not missing:
        return
    # A header and a sidecar are about a block each.
    needed = sum((end - first) * store.manifest.sample_bytes + 8192 for first, end in missing)
    free = shutil.disk_usage(store.path).free
    samples = sum(end - first for first, end in missing)
    what = (
        f"{samples} trajectories of {format_bytes(store.manifest.sample_bytes)}: {format_bytes(needed)}, "
        f"{format_bytes(free)} free in {store.path}"
    )
    if needed > free:
        raise InputError(
            f"{what}; free some, choose another folder, keep only one of state and denoised, or use dtype=bfloat16"
        )
    if progress:
        print(what, file=sys.stderr)


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold the store's lock, which the system releases even if the process is killed."""
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"trajectories {path}: another process is writing this store; wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def device_name(device: torch.device) -> str:
    """What computed the states, as far as their last bits may depend on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {platform.machine()} {capability}, {torch.get_num_threads()} threads"


def format_bytes(size: float) -> str:
    """1536 -> '1.5 KB'."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
