"""Generates trajectories from noise and labels, shard after shard; a kill loses at most the two shards in progress."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from tqdm import tqdm

from pyard.conditions import load_conditions, save_conditions
from pyard.conditions.prompt_file import read_prompts
from pyard.diffusion.solvers import Solver, solver_of
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.storage.disk import require_room
from pyard.storage.typed import checked
from pyard.storage.units import format_bytes, format_seconds
from pyard.teachers import Teacher, load_teacher, pipeline_folder, require_teacher
from pyard.teachers.text_to_image.teacher import PipelineTeacher
from pyard.trajectories.batch_size import USUAL, default_batch_size
from pyard.trajectories.compute import compiled, compute_batch, device_name, drawn_ahead, pack_shard, warm_up
from pyard.trajectories.manifest import DType, Keep, Precision, TrajectoryManifest
from pyard.trajectories.of_pipelines import check_classes, guided_interval, text_limit, with_prompts
from pyard.trajectories.parts import Part, wait_for_others, writing
from pyard.trajectories.store import (
    MAX_COUNT,
    TrajectoryStore,
    list_shards,
    read_manifest,
    remove_leftovers,
    shard_ranges,
    write_shard,
)

if TYPE_CHECKING:
    from pyard.models.backbone import Backbone
    from pyard.teachers.network_teacher import NetworkTeacher

DEFAULT_TEACHER_STEPS = 25
DEFAULT_CFG_SCALE = 1.5
MAX_SHARD_SAMPLES = 1024
MAX_SHARD_BYTES = 256 * 2**20

_NO_PIXELS = "trajectories: height and width are for a text-to-image pipeline, in place of sample_shape"


@checked("trajectories")
def generate_trajectories(
    teacher: Teacher | str | Path,
    out: str | Path,
    count: int,
    *,
    num_steps: int = 4,
    teacher_steps: int | None = None,
    grid: TimeGrid | None = None,
    cfg_scale: float | None = None,
    cfg_channels: int | None = None,
    cfg_interval: tuple[float, float] | None = None,
    cfg_truncation: float | None = None,
    solver: Solver | None = None,
    keep: Keep = "both",
    dtype: DType = "float32",
    seed: int = 0,
    labels: Literal["uniform", "balanced"] | list[int] | None = None,
    batch_size: int | None = None,
    shard_size: int | None = None,
    precision: Precision | None = None,
    compile: bool = False,
    device: str | None = None,
    part: str | None = None,
    progress: bool = True,
    network: type[Backbone] | str | None = None,
    sample_shape: tuple[int, ...] | None = None,
    prompts: str | Path | list[str] | None = None,
    prompt_order: Literal["in_turn", "uniform"] = "in_turn",
    height: int | None = None,
    width: int | None = None,
    embedded_guidance: float | None = None,
    max_sequence_length: int | None = None,
    variant: str | None = None,
    transformer: str | None = None,
    lora: str | None = None,
) -> TrajectoryStore:
    """Write a teacher's ODE trajectories, from noise to data, to a store that students learn from.

    The same call resumes an interrupted one, and a larger count appends to the store. Sample i is a function of
    `seed` and i: its noise and label are bit-identical on every machine, its states for equal batch_size on one
    kind of machine. Before it starts, it prints the disk space and the time that it will take.

    Any number of processes can write one store. Those of `torchrun` and `accelerate launch` share the work automatically;
    others use `part`, in one folder or in several that `pyard trajectories merge` joins. See also
    `pyard trajectories verify`, `stats` and `convert`.

    Args:
        teacher: a built-in teacher (`digits`, `scenes-text`), a teacher folder that pyard wrote, a diffusers folder, or a `.pt`
            or `.safetensors` checkpoint of DiT, SiT, REPA or LightningDiT. In Python also a teacher object.
        out: folder of the store.
        count: total number of trajectories in the store.
        num_steps: S, the number of steps of the students: states and denoised predictions are stored at S times each.
        teacher_steps: steps of the teacher's solver; None: 25, or about as many as a text-to-image pipeline takes.
        grid: a `TimeGrid` in place of num_steps and teacher_steps; None: built from these two.
        cfg_scale: classifier-free guidance weight s, F_u + s (F_c - F_u); 1: no guidance, at half the cost; None: 1.5, or that
            of a text-to-image pipeline.
        cfg_channels: number of leading channels to guide (3 of 4 in DiT's public code); None: all.
        cfg_interval: lowest and highest teacher time (0 to 999 for DiT, 0 to 1 for flows) with guidance; None: all times.
        cfg_truncation: as in Z-Image's pipeline: no guidance where 1 - sigma is larger, in place of cfg_interval.
        solver: `ddim` for diffusion schedules; `euler` or `heun` (two evaluations a step) for flows; `dpm++2m` (DPM-Solver++
            of second order) for both; None: ddim or euler.
        keep: what to store beside noise and label: `state` (x_t at the grid times), `denoised` (the teacher's predictions of
            x_0 at them) or `both`.
        dtype: dtype of stored states and predictions; noise is always float32. Sidecars record the rounding error.
        seed: random seed of noise and labels, 0 to 2**64 - 1.
        labels: condition numbers, such as classes: `uniform` (drawn), `balanced` (in turn) or a list, taken in turn; None:
            uniform, or as prompt_order says.
        batch_size: samples that the teacher computes together (guidance doubles the rows); None: that of an existing store,
            else 64, or fewer for large text-to-image samples (`default_batch_size`).
        shard_size: samples in a file, a multiple of batch_size; a kill loses at most the unfinished files. None: at most 1024
            samples and 256 MiB, or the store's.
        precision: `bfloat16`: the teacher computes in autocast, which is faster on GPUs, and a text-to-image pipeline's weights
            are read in bfloat16; the solver stays in float32. None: float32, or that of a given teacher.
        compile: compile the teacher with torch.compile, with CUDA graphs on a GPU.
        device: device of a teacher given by name, such as `cuda:1`; None: a GPU if there is one, a different one for each
            process.
        part: k/n with k from 1 to n: of n processes or machines, this one writes the k-th part of the shards; None: the part
            that the environment of torchrun or Accelerate gives, or all. `1/1`: always all.
        progress: show a progress bar with rate, time left and disk use.
        network: package.module:Class of the teacher's backbone, if it is not one of pyard's. In Python also the class itself.
        sample_shape: [C, ...] of the samples, if the teacher takes several sizes; None: its usual one.
        prompts: for a text-to-image pipeline: a `.txt` file with one prompt per line, a `.jsonl` file with `prompt` and
            `negative_prompt`, a folder with `metadata.jsonl`, or a list. Each distinct text is encoded once, into `conditions/`
            of the store; a later call reuses it.
        prompt_order: `in_turn`: sample i has prompt i modulo their number; `uniform`: a random one.
        height: height of a text-to-image pipeline's pictures, in pixels; None: the pipeline's own.
        width: width of a text-to-image pipeline's pictures, in pixels; None: the pipeline's own.
        embedded_guidance: guidance scale that a pipeline such as FLUX.1-dev passes to its transformer; None: its default.
        max_sequence_length: maximum number of text tokens; None: the pipeline's.
        variant: variant of a pipeline's weights, such as `fp16`.
        transformer: a fine-tuned transformer in place of the pipeline's: a folder or a single file.
        lora: a LoRA that is added to the pipeline's transformer.

    Returns:
        The store, complete unless only a `part` was requested.

    Raises:
        InputError: the teacher does not take samples of this shape; the folder has trajectories with another teacher, grid or
            setting; the disk is too small; the teacher returns non-finite numbers; or another process is writing the same
            shards.
    """
    mine = Part.parse(part)
    of_pipeline = {"variant": variant, "transformer": transformer, "lora": lora, "max_sequence_length": max_sequence_length}
    if count < 1:
        raise InputError(f"trajectories: count is {count}; expected at least 1")
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value is not None and value < 1:
            raise InputError(f"trajectories: {name} is {value}; expected at least 1, or None for the default")
    if prompt_order == "uniform" and labels is not None and not (isinstance(labels, str) and labels == "uniform"):
        raise InputError(f"trajectories: prompt_order is 'uniform', but labels is {labels!r}; give one of the two")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"trajectories: {out} is a file; expected a folder or a new path")
    lines = None if prompts is None else read_prompts(prompts)
    if isinstance(teacher, str | Path):
        require_teacher(teacher)
        if pipeline_folder(teacher) is None:  # before the built-in teacher is trained
            check_classes(lines, embedded_guidance)
            if height is not None or width is not None:
                raise InputError(_NO_PIXELS)
        elif max_sequence_length is None:
            of_pipeline["max_sequence_length"] = text_limit(load_conditions(out))
        teacher = load_teacher(teacher, network=network, dtype=precision, **_given(of_pipeline))
        teacher = on_device(teacher, device)
    elif _given(of_pipeline):
        raise InputError(f"trajectories: {', '.join(_given(of_pipeline))} is for a teacher given by its folder")
    shape = _shape(teacher, sample_shape, height, width)
    if grid is None:
        grid = grid_of(teacher, num_steps, teacher_steps, shape)
    if cfg_truncation is not None:
        cfg_interval = guided_interval(cfg_truncation, cfg_interval, teacher, grid)
    there = read_manifest(out)
    to_encode = lines if isinstance(teacher, PipelineTeacher) else None
    if to_encode is None:
        teacher = with_prompts(teacher, lines, out, embedded_guidance=embedded_guidance, progress=progress)
    if labels is None:
        labels = "balanced" if isinstance(teacher, PipelineTeacher) and prompt_order == "in_turn" else "uniform"
    batch_size = batch_size or (there.batch_size if there else _default_batch_size(teacher, shape))
    manifest = TrajectoryManifest(
        teacher_fingerprint=teacher.fingerprint,
        solver=solver_of(teacher.schedule, solver or getattr(teacher, "solver", None)),
        schedule=teacher.schedule,
        grid=grid,
        cfg_scale=default_cfg_scale(teacher) if cfg_scale is None else cfg_scale,
        cfg_channels=cfg_channels,
        cfg_interval=cfg_interval,
        precision=precision or cast(Precision, getattr(teacher, "precision", "float32")),
        compiled=compile,
        sample_shape=shape,
        num_classes=len(to_encode) if to_encode else teacher.conditions.count,
        conditions="" if to_encode else teacher.conditions.fingerprint,
        keep=keep,
        dtype=dtype,
        seed=seed,
        labels=labels if isinstance(labels, str) else tuple(labels),
        batch_size=batch_size,
        shard_size=shard_size or (there.shard_size if there else batch_size),
    )
    if shard_size is None and there is None:
        manifest = dataclasses.replace(manifest, shard_size=default_shard_size(manifest))
    # Before anything is written or listed: a count with too many noughts is found at once.
    require_room_for(manifest, out, count, mine)
    if to_encode:
        # Hours of encoding come last: everything else has been found to fit by now.
        if there is not None:
            same_prompts = dataclasses.replace(manifest, conditions=there.conditions, num_classes=there.num_classes)
            there.require_equal(same_prompts, str(out))
        teacher = with_prompts(teacher, to_encode, out, embedded_guidance=embedded_guidance, progress=progress)
        manifest = dataclasses.replace(manifest, conditions=teacher.conditions.fingerprint)

    with compiled(teacher, compile), writing(out, mine, manifest, count) as store:
        save_conditions(teacher.conditions, out)
        for shard in store.shards:
            if mine.owns(shard.first, manifest):
                remove_leftovers(out, shard)
        missing = [(first, end) for first, end in store.missing() if mine.owns(first, manifest)]
        require_disk_space(store, store.missing() if mine.same_folder else missing)
        write_shards(teacher, store, missing, progress, mine)
    if mine.same_folder:
        wait_for_others(out, mine, progress)
    return TrajectoryStore.open(out)


def _default_batch_size(teacher: Teacher, shape: tuple[int, ...]) -> int:
    return default_batch_size(teacher.network.trunk, shape) if isinstance(teacher, PipelineTeacher) else USUAL


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _shape(teacher: Teacher, wanted: tuple[int, ...] | None, height: int | None, width: int | None) -> tuple[int, ...]:
    if height is not None or width is not None:
        if not isinstance(teacher, PipelineTeacher) or wanted is not None:
            raise InputError(_NO_PIXELS)
        return teacher.shape_of(height, width)
    shape = teacher.sample_shape if wanted is None else tuple(wanted)
    if shape != teacher.sample_shape:
        check = getattr(teacher, "check_sample", None)
        if check is None:
            raise InputError(f"trajectories: sample_shape is {shape}; this teacher only makes {teacher.sample_shape}")
        check(shape)
    return shape


def grid_of(teacher: Teacher, num_steps: int, teacher_steps: int | None, shape: tuple[int, ...]) -> TimeGrid:
    """The grid of a student with `num_steps` jumps on a teacher's usual trajectory."""
    if isinstance(teacher, PipelineTeacher):
        return teacher.grid(num_steps, teacher_steps, shape)
    return TimeGrid.build(teacher.schedule, num_steps, DEFAULT_TEACHER_STEPS if teacher_steps is None else teacher_steps)


def default_cfg_scale(teacher: Teacher) -> float:
    """The default guidance: a pipeline's own, or 1.5."""
    return teacher.cfg_scale if isinstance(teacher, PipelineTeacher) else DEFAULT_CFG_SCALE


def write_shards(teacher: Teacher, store: TrajectoryStore, missing: list[tuple[int, int]], progress: bool, part: Part) -> None:
    """Compute and write shards; a thread writes each shard while the next one is computed."""
    manifest = store.manifest
    begins = [begin for first, end in missing for begin in range(first, end, manifest.batch_size)]
    own = [end - first for first, end in shard_ranges(manifest, store.requested_count) if part.owns(first, manifest)]
    samples = sum(end - first for first, end in missing)
    used = sum(shard.num_bytes for shard in store.shards)
    drawn = drawn_ahead(manifest, begins)
    device = device_name(teacher.device)

    def finish(tensors: dict[str, torch.Tensor], first: int) -> int:
        content, record = pack_shard(tensors, manifest, first, device)
        write_shard(store, content, record)
        return len(content)

    bar = tqdm(
        total=sum(own),
        initial=sum(own) - samples,
        desc="trajectories" if part.count == 1 else f"trajectories, part {part}",
        unit=" trajectories",
        position=part.number - 1,
        disable=not progress or not missing,
    )
    with bar, contextlib.closing(drawn), ThreadPoolExecutor(1, "writer") as writer:
        being_written: Future[int] | None = None
        for first, end in missing:
            batches = []
            for begin in range(first, end, manifest.batch_size):
                noise, numbers = next(drawn)
                if begin == begins[0] and progress:
                    warm_up(teacher, manifest, noise, numbers)
                started = time.perf_counter()
                batches.append(compute_batch(teacher, manifest, begin, noise, numbers))
                if begin == begins[0] and progress:
                    announce(store, samples, len(begins) * (time.perf_counter() - started))
                bar.update(min(manifest.batch_size, end - begin))
            # Batches are computed whole, and samples past `end` dropped: last bits must not depend on the count.
            tensors = {name: torch.cat([batch[name] for batch in batches])[: end - first] for name in batches[0]}
            # One shard waits at most, so that memory is bounded and a full disk stops the teacher.
            if being_written is not None:
                used += being_written.result()
                bar.set_postfix_str(f"{format_bytes(used)} on disk")
            being_written = writer.submit(finish, tensors, first)
        if being_written is not None:
            used += being_written.result()
            bar.set_postfix_str(f"{format_bytes(used)} on disk")


def announce(store: TrajectoryStore, samples: int, seconds: float) -> None:
    """Print what the missing trajectories cost, with the time estimated from the first batch."""
    tqdm.write(
        f"{samples} trajectories of {format_bytes(store.manifest.sample_bytes)}: "
        f"{format_bytes(samples * store.manifest.sample_bytes)}, {format_bytes(shutil.disk_usage(store.path).free)} free in "
        f"{store.path}; about {format_seconds(seconds)} ({samples / seconds:.3g} trajectories/s)",
        file=sys.stderr,
    )


def on_device(teacher: NetworkTeacher, device: str | None) -> NetworkTeacher:
    """The teacher on the device that it will compute on: the requested one, or this process's GPU if there is one."""
    if device is None:
        if not torch.cuda.is_available():
            return teacher
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    try:
        return teacher.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"trajectories: device is {device!r}: {str(error).splitlines()[0]}") from None


def default_shard_size(manifest: TrajectoryManifest) -> int:
    """As many whole batches as fit into 1024 samples and 256 MiB, but at least one batch."""
    samples = min(MAX_SHARD_SAMPLES, MAX_SHARD_BYTES // manifest.sample_bytes)
    return max(1, samples // manifest.batch_size) * manifest.batch_size


def require_room_for(manifest: TrajectoryManifest, out: Path, count: int, part: Part) -> None:
    """Raise an InputError if the count is too large for the names of shards, or its trajectories for the disk."""
    if count > MAX_COUNT:
        raise InputError(f"trajectories: count is {count}; expected at most {MAX_COUNT}")
    begun = read_manifest(out)
    there = sum(shard.count for shard in list_shards(out, begun)[0]) if begun else 0
    missing = max(0, count - there) // (1 if part.same_folder else part.count)
    require_room(
        out,
        missing * manifest.sample_bytes,
        f"{missing} trajectories of {format_bytes(manifest.sample_bytes)}",
        "keep only one of state and denoised, or use dtype=bfloat16",
    )


def require_disk_space(store: TrajectoryStore, missing: list[tuple[int, int]]) -> None:
    """Raise an InputError if the disk has less free space than the missing shards will take."""
    # A header and a sidecar are about a block each.
    needed = sum((end - first) * store.manifest.sample_bytes + 8192 for first, end in missing)
    samples = sum(end - first for first, end in missing)
    require_room(
        store.path,
        needed,
        f"{samples} trajectories of {format_bytes(store.manifest.sample_bytes)}",
        "keep only one of state and denoised, or use dtype=bfloat16",
    )
