"""Look into a store: check it, count it, draw some of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyard.data.pictures import save_tiles
from pyard.errors import InputError
from pyard.models.codec import Codec, LatentCodec
from pyard.storage.typed import checked
from pyard.storage.units import format_bytes, format_seconds
from pyard.trajectories.gather import as_tensor
from pyard.trajectories.store import TrajectoryStore

# Enough for two digits of a mean; the whole store would take as long as reading it does.
_MOMENT_SAMPLES = 4096


def verify_trajectories(store: str | Path) -> int:
    """Read every shard of a store and compare it with its checksum, and its labels with the manifest.

    Example: pyard trajectories verify trajectories/digits

    Args:
        store: the store's folder.

    Returns:
        0; what is wrong is an InputError, which the command line makes exit status 2.

    Raises:
        InputError: names every shard that is missing, broken or changed.
    """
    opened = TrajectoryStore.open(store)
    begin = time.perf_counter()
    opened.verify()
    size = sum(shard.num_bytes for shard in opened.shards)
    taken = format_seconds(time.perf_counter() - begin)
    print(f"{store}: {opened.count} trajectories in {len(opened.shards)} shards, {format_bytes(size)}: all right ({taken})")
    return 0


@checked("trajectories")
def trajectory_stats(
    store: str | Path,
    *,
    picture: str | Path | None = None,
    trajectories: int = 8,
    vae: str | Path | None = None,
    teacher: str | Path | None = None,
) -> int:
    """Print what a store holds, and draw a few of its trajectories.

    Example: pyard trajectories stats trajectories/digits --picture digits.png

    Args:
        store: the store's folder.
        picture: a .png to write: a row for each trajectory, its noise and its denoised predictions of x_0 along the columns
            (its states if the store keeps no predictions, all but the last of them noisy); none: `stats.png` in the store's
            folder, if the samples are pictures.
        trajectories: rows of the picture.
        vae: folder of the diffusers autoencoder that decodes latents; none: their first three channels are drawn as they are.
        teacher: folder of the teacher, whose VAE decodes them, in place of vae. Samples of a teacher without a VAE are drawn as
            they are if they have 1 or 3 channels.

    Returns:
        0.

    Raises:
        InputError: no store there, or it holds no trajectory; a VAE that is missing or does not fit; a .png of samples that are
            no pictures.
    """
    codec = _codec(vae, teacher)
    opened = TrajectoryStore.open(store)
    if teacher is not None and codec is None and not _are_pixels(opened.manifest.sample_shape):
        raise InputError(
            f"stats: the teacher {teacher} has no vae/ in its folder, and samples of shape "
            f"{tuple(opened.manifest.sample_shape)} are not pixels; give --vae FOLDER, or leave out --teacher"
        )
    if not opened.shards:
        raise InputError(f"trajectories {store}: holds no trajectories yet; run the command that writes them")
    if trajectories < 1:
        raise InputError(f"stats: trajectories is {trajectories}; expected at least 1")
    path = Path(picture) if picture is not None else opened.path / "stats.png"
    if path.suffix.lower() != ".png":
        raise InputError(f"stats: picture is {path}; expected a .png")
    shape = tuple(opened.manifest.sample_shape)
    shape = shape if codec is None else codec.image_shape(shape)
    print(as_table(opened))
    if len(shape) != 3:
        if picture is not None:
            raise InputError(
                f"stats: samples of shape {shape} are not pictures; leave out --picture, or give --vae or --teacher"
            )
        print(f"\nsamples of shape {shape} are not pictures: none drawn")
        return 0
    draw(opened, path, trajectories, codec)
    print(f"\n{path}: {min(trajectories, opened.count)} trajectories")
    return 0


def as_table(store: TrajectoryStore) -> str:
    """The store for people."""
    manifest = store.manifest
    grid = manifest.grid
    guidance = "none"
    if manifest.cfg_scale != 1:
        channels = f" of the first {manifest.cfg_channels} channels" if manifest.cfg_channels else ""
        interval = f" at times {manifest.cfg_interval[0]:g} to {manifest.cfg_interval[1]:g}" if manifest.cfg_interval else ""
        guidance = f"{manifest.cfg_scale:g}{channels}{interval}"
    missing = sum(end - first for first, end in store.missing())
    size = sum(shard.num_bytes for shard in store.shards)
    writers = Counter(tuple(sorted(shard.written_by.items())) for shard in store.shards)
    facts = [
        ("trajectories", f"{store.count}" + (f", {missing} more were requested" if missing else "")),
        ("on disk", f"{format_bytes(size)} in {len(store.shards)} shards, {format_bytes(manifest.sample_bytes)} each"),
        ("teacher", manifest.teacher_fingerprint[:16]),
        ("solver", f"{manifest.solver}, {grid.teacher_steps} steps, {manifest.precision}"),
        ("guidance", guidance),
        ("sample", f"{manifest.sample_shape}, kept: {manifest.keep} in {manifest.dtype}"),
        ("grid times", ", ".join(f"{time:g}" for time in grid.times)),
        ("labels", label_counts(store)),
        *((f"rounding of {name}", text) for name, text in rounding(store)),
        *(("written by", ", ".join(f"{k} {v}" for k, v in who) + f" ({n} shards)") for who, n in writers.items()),
        *(("problem", problem) for problem in store.problems),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {text}" for name, text in facts]
    lines += ["", f"{'first ' + str(min(store.count, _MOMENT_SAMPLES)):<18}{'mean':>10}{'std':>10}{'min':>10}{'max':>10}"]
    lines += [f"{name:<18}" + "".join(f"{value:>10.4f}" for value in row) for name, row in moments(store)]
    return "\n".join(lines)


def label_counts(store: TrajectoryStore) -> str:
    """How often the classes occur."""
    counts: Counter[int] = Counter()
    for shard in store.shards:
        counts.update(store.manifest.number_of(np.arange(shard.first, shard.end)).tolist())
    classes = store.manifest.num_classes
    how = store.manifest.labels if isinstance(store.manifest.labels, str) else "given"
    fewest = min(counts.values()) if len(counts) == classes else 0
    return f"{how}; {len(counts)} of {classes} classes, {fewest} to {max(counts.values())} of each"


def rounding(store: TrajectoryStore) -> list[tuple[str, str]]:
    """Per tensor, the error of storing it in a narrow dtype, over all shards."""
    result = []
    for name in sorted({name for shard in store.shards for name in shard.rounding}):
        errors = [(shard.count, shard.rounding[name]) for shard in store.shards if name in shard.rounding]
        rms = (sum(count * error["rms"] ** 2 for count, error in errors) / sum(count for count, _ in errors)) ** 0.5
        result.append((name, f"rms {rms:.2e}, largest {max(error['max'] for _, error in errors):.2e}"))
    return result


def moments(store: TrajectoryStore) -> list[tuple[str, tuple[float, float, float, float]]]:
    """(mean, standard deviation, smallest, largest) of the noise and of each step's tensors, of the first samples."""
    found: dict[str, list[np.ndarray[Any, Any]]] = {}
    samples = 0
    for shard in store.shards:
        take = min(shard.count, _MOMENT_SAMPLES - samples)
        for name, rows in ((name, as_tensor(a[:take]).float().numpy()) for name, a in store.tensors(shard).items()):
            if name == "noise":
                found.setdefault("noise", []).append(rows)
            elif name != "label":
                for step in range(rows.shape[1]):
                    found.setdefault(f"{name} {step + 1}", []).append(rows[:, step])
        samples += take
        if samples == _MOMENT_SAMPLES:
            break
    result = []
    for name, pieces in found.items():
        values = np.concatenate(pieces).astype(np.float64)
        result.append((name, (float(values.mean()), float(values.std()), float(values.min()), float(values.max()))))
    return result


def draw(store: TrajectoryStore, path: Path, trajectories: int, codec: Codec | None = None) -> None:
    """Write a picture: rows are trajectories, columns the noise and then the S stored steps, decoded if there is a codec."""
    name = "state" if store.manifest.keep == "state" else "denoised"
    # Pixels of noise are shown within -1 to 1; a VAE knows no such range.
    spread = 3 if codec is None else 1
    rows: list[np.ndarray[Any, Any]] = []
    for shard in store.shards:
        tensors = store.tensors(shard)
        take = min(shard.count, trajectories - len(rows))
        noise, steps = (as_tensor(tensors[key][:take]).float().numpy() for key in ("noise", name))
        rows += list(np.concatenate([noise[:, None] / spread, steps], axis=1))
        if len(rows) == trajectories:
            break
    stacked = np.stack(rows)  # [rows, 1 + S, *sample_shape]
    samples = stacked.reshape(-1, *stacked.shape[2:])
    images = samples if codec is None else codec.decode(torch.from_numpy(samples), batch_size=1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tiles(images, path, columns=stacked.shape[1])


def _codec(vae: str | Path | None, teacher: str | Path | None) -> LatentCodec | None:
    if vae is not None and teacher is not None:
        raise InputError("stats: found both vae and teacher; expected one of the two")
    if vae is not None:
        return LatentCodec(vae)
    if teacher is None:
        return None
    folder = Path(teacher)
    if not folder.exists():
        raise InputError(f"stats: there is no {teacher}; expected the folder of a teacher (--teacher)")
    # As in a pipeline's folder, whose transformer may be what was given.
    return LatentCodec.beside(folder, *([folder.parent] if folder.name == "transformer" else []))


def _are_pixels(sample_shape: Sequence[int]) -> bool:
    """Whether samples may be grey or coloured pictures; latents usually have more channels."""
    return len(sample_shape) == 3 and sample_shape[0] in (1, 3)
