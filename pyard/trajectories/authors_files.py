"""From and to the files of the authors' public code: one small .npz for each sample and step.

Their tree, as github.com/alsdudrla10/ARD reads it (n teacher steps, t of them still to do):

    zt/{t}/{label}/{seed}_{number}.npz        array "zt" [C, H, W]: the state; t = n is the noise, t = 0 the sample
    pred_z0/{t}/{label}/{seed}_{number}.npz   array "pred_z0" [C, H, W]: the denoised prediction of evaluation n - t
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.storage.arrays import open_npz
from pyard.storage.disk import require_room
from pyard.storage.files import new_file
from pyard.storage.folders import sync_tree
from pyard.storage.typed import checked
from pyard.teachers import load_teacher
from pyard.trajectories.compute import pack_shard
from pyard.trajectories.gather import as_tensor
from pyard.trajectories.generate import default_shard_size, require_disk_space
from pyard.trajectories.manifest import IMPORTED, DType, Keep, TrajectoryManifest
from pyard.trajectories.parts import Part, writing
from pyard.trajectories.store import TrajectoryStore, write_shard

# Zip and array headers of one file, rounded up to a block of the file system.
_NPZ_OVERHEAD = 4096


@checked("trajectories")
def convert_trajectories(
    source: str | Path,
    out: str | Path,
    *,
    teacher: str | None = None,
    num_steps: int = 4,
    num_classes: int = 1000,
    cfg_scale: float = 1.5,
    cfg_channels: int | None = 3,
    dtype: DType = "float32",
    progress: bool = True,
    network: str | None = None,
) -> TrajectoryStore | None:
    """Turn the .npz tree of the authors' code into a store, or a store into such a tree.

    Example: pyard trajectories convert samples_trajectory/latent_trajectory trajectories --teacher dit-xl-2

    Args:
        source: a folder with `zt/` (their `latent_trajectory`), or a store.
        out: the store, or the folder to write `zt/` and `pred_z0/` to.
        teacher: the teacher that computed an imported tree, so that its students can be trained on it; none: unknown.
        num_steps: S of the store; the tree must hold the steps of its grid.
        num_classes: classes of the teacher, if no teacher is given.
        cfg_scale: guidance that the tree was computed with, which its files do not say.
        cfg_channels: channels that were guided: 3 in DiT's public code; none: all.
        dtype: how an imported store keeps states and predictions.
        progress: show a progress bar.
        network: package.module:Class of the teacher's backbone, if it is not one of pyard's.

    Returns:
        The store that was imported; nothing after an export.

    Raises:
        InputError: neither a store nor a tree, files that are missing or broken, or a folder in the way.
    """
    source, out = Path(source), Path(out)
    if (source / "manifest.json").exists():
        export_npz(TrajectoryStore.open(source), out, progress)
        return None
    if not (source / "zt").is_dir():
        raise InputError(f"convert: {source} has neither a manifest.json (a store) nor a folder zt (the authors' tree)")
    known = load_teacher(teacher, network=network) if teacher is not None else None
    schedule = known.schedule if known is not None else NoiseSchedule()
    samples, teacher_steps, shape = list_samples(source)
    grid = TimeGrid.build(schedule, num_steps, teacher_steps)
    if known is not None:
        num_classes = known.conditions.count
        if known.sample_shape != shape:
            raise InputError(f"convert: samples of {shape} in {source}; teacher {teacher} makes {known.sample_shape}")
    manifest = TrajectoryManifest(
        teacher_fingerprint=known.fingerprint if known is not None else IMPORTED,
        solver=IMPORTED,
        schedule=schedule,
        grid=grid,
        cfg_scale=cfg_scale,
        cfg_channels=cfg_channels if cfg_channels is None else min(cfg_channels, shape[0]),
        cfg_interval=None,
        precision="float32",
        compiled=False,
        sample_shape=shape,
        num_classes=num_classes,
        keep=kept(source, grid),
        dtype=dtype,
        # Another tree must be another store: its noise is no function of a seed.
        seed=int(hashlib.sha256(repr(samples).encode()).hexdigest()[:16], 16),
        labels=tuple(label for label, _ in samples),
        batch_size=1,
        shard_size=1,
    )
    size = default_shard_size(manifest)
    manifest = TrajectoryManifest.from_json({**manifest.to_json(), "shard_size": size})
    with writing(out, Part(), manifest, len(samples)) as store:
        missing = store.missing()
        require_disk_space(store, missing)
        done = len(samples) - sum(end - first for first, end in missing)
        with tqdm(total=len(samples), initial=done, desc="importing", unit=" trajectories", disable=not progress) as bar:
            for first, end in missing:
                rows = [read_sample(source, manifest, *sample) for sample in samples[first:end]]
                tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
                tensors["label"] = torch.tensor([label for label, _ in samples[first:end]])
                write_shard(store, *pack_shard(tensors, manifest, first, "imported"))
                bar.update(end - first)
    return TrajectoryStore.open(out)


def list_samples(tree: Path) -> tuple[list[tuple[int, str]], int, tuple[int, int, int]]:
    """(label, file name) of every sample in the order of their numbers, the teacher's steps, and a sample's shape."""
    steps = [int(folder.name) for folder in (tree / "zt").iterdir() if folder.name.isdecimal()]
    if not steps or max(steps) < 1:
        raise InputError(f"convert: {tree / 'zt'} has no folder named after a number of steps, such as 25 for the noise")
    noisiest = max(steps)
    found = []
    for folder in (tree / "zt" / str(noisiest)).iterdir():
        if not folder.name.isdecimal():
            raise InputError(f"convert: {folder}: expected folders named by class labels")
        found += [(int(folder.name), file.name) for file in folder.glob("*.npz")]
    if not found:
        raise InputError(f"convert: {tree / 'zt' / str(noisiest)} holds no .npz")
    # 9 before 10 and 999999 before 1000000, whatever the padding.
    found.sort(key=lambda sample: ([int(digits) for digits in re.findall(r"\d+", sample[1])], sample[1], sample[0]))
    label, name = found[0]
    shape = read_npz(tree / "zt" / str(noisiest) / str(label) / name, "zt").shape
    if len(shape) != 3:
        raise InputError(f"convert: samples of shape {shape} in {tree}; expected (C, H, W)")
    return found, noisiest, (shape[0], shape[1], shape[2])


def places(grid: TimeGrid) -> dict[Keep, list[tuple[str, int]]]:
    """Where in the tree the S tensors of a sample are: (folder, steps still to do)."""
    n = grid.teacher_steps
    return {
        "state": [("zt", n - k) for k in grid.state_index[1:]],
        "denoised": [*(("pred_z0", n - k) for k in grid.denoised_index), ("zt", 0)],
    }


def kept(tree: Path, grid: TimeGrid) -> Keep:
    """What of a grid's tensors a tree has."""
    missing = {
        name: [f"{kind}/{step}" for kind, step in needed if not (tree / kind / str(step)).is_dir()]
        for name, needed in places(grid).items()
    }
    if all(missing.values()):
        raise InputError(
            f"convert: {tree} lacks what {grid.num_steps} steps need: {missing['denoised']} for predictions, "
            f"{missing['state']} for states; try another num_steps"
        )
    if any(missing.values()):
        return "denoised" if missing["state"] else "state"
    return "both"


def read_sample(tree: Path, manifest: TrajectoryManifest, label: int, name: str) -> dict[str, torch.Tensor]:
    """`noise` [C, H, W] and what is kept, [S, C, H, W]."""

    def read(kind: str, step: int) -> torch.Tensor:
        file = tree / kind / str(step) / str(label) / name
        array = read_npz(file, kind)
        if array.shape != manifest.sample_shape or not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
            raise InputError(
                f"convert: {file}: {array.dtype} of shape {array.shape}; expected finite numbers of shape "
                f"{manifest.sample_shape}"
            )
        return torch.from_numpy(array.astype(np.float32))

    tensors = {"noise": read("zt", manifest.grid.teacher_steps)}
    for kind, needed in places(manifest.grid).items():
        if manifest.keep in (kind, "both"):
            tensors[kind] = torch.stack([read(*place) for place in needed])
    return tensors


def read_npz(file: Path, key: str) -> NDArray[Any]:
    """One array of an .npz; never unpickles."""
    try:
        with open_npz(file) as arrays:
            return arrays.read(key)
    except InputError as error:
        raise InputError(f"convert: {error}; expected an .npz with an array {key!r}") from None


def export_npz(store: TrajectoryStore, out: Path, progress: bool) -> None:
    """Write the authors' tree; what is there already is written again."""
    store.require_complete()
    grid, manifest = store.manifest.grid, store.manifest
    files = 1 + sum(len(needed) for kind, needed in places(grid).items() if manifest.keep in (kind, "both"))
    needed_bytes = store.count * files * (4 * int(np.prod(manifest.sample_shape)) + _NPZ_OVERHEAD)
    require_room(out, needed_bytes, f"convert: {store.count * files} files")
    with tqdm(total=store.count, desc="exporting", unit=" trajectories", disable=not progress) as bar:
        for shard in store.shards:
            tensors = {name: as_tensor(array) for name, array in store.tensors(shard).items()}
            for i in range(shard.count):
                label, name = int(tensors["label"][i]), f"{manifest.seed}_{shard.first + i:06d}.npz"
                where: dict[tuple[str, int], torch.Tensor] = {("zt", grid.teacher_steps): tensors["noise"][i]}
                for kept_kind, needed in places(grid).items():
                    if kept_kind in tensors:
                        where |= dict(zip(needed, tensors[kept_kind][i], strict=True))
                for (kind, step), tensor in where.items():
                    file = out / kind / str(step) / str(label) / name
                    array = tensor.float().numpy()
                    with new_file(file, array.nbytes, durable=False) as partial, partial.open("wb") as stream:
                        np.savez(stream, zt=array) if kind == "zt" else np.savez(stream, pred_z0=array)
            bar.update(shard.count)
    sync_tree(out)
