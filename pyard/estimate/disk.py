"""Bytes that a recipe's trajectories and checkpoints take on disk."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pyard.diffusion.solvers import solver_of
from pyard.diffusion.time_grid import TimeGrid
from pyard.teachers.published import TeacherOutline
from pyard.training.config import TrainConfig, known
from pyard.trajectories.batch_size import USUAL, default_batch_size
from pyard.trajectories.generate import DEFAULT_CFG_SCALE, DEFAULT_TEACHER_STEPS, default_shard_size
from pyard.trajectories.manifest import SAFETENSORS_DTYPES, TrajectoryManifest
from pyard.trajectories.store import shard_ranges


def sample_shape_of(config: TrainConfig, teacher: TeacherOutline) -> tuple[int, ...]:
    """[C, ...] of the samples that a recipe generates."""
    if teacher.pipeline is None:
        return tuple(teacher.network.config.sample_shape)
    return teacher.pipeline.shape_of(config.height, config.width)


def grid_of(config: TrainConfig, teacher: TeacherOutline) -> TimeGrid:
    """The grid of a recipe's student on its teacher's trajectory."""
    if teacher.pipeline is None:
        return TimeGrid.build(teacher.schedule, known(config.num_steps), config.teacher_steps or DEFAULT_TEACHER_STEPS)
    return teacher.pipeline.grid(known(config.num_steps), config.teacher_steps, sample_shape_of(config, teacher))


def manifest_of(config: TrainConfig, teacher: TeacherOutline, conditions: int) -> TrajectoryManifest:
    """The manifest that the recipe's trajectories will have, but for fingerprints.

    Args:
        config: the recipe.
        teacher: its teacher.
        conditions: how many there are.
    """
    pipeline = teacher.pipeline
    usual = DEFAULT_CFG_SCALE if pipeline is None else pipeline.cfg_scale
    shape = sample_shape_of(config, teacher)
    usual_batch = USUAL if pipeline is None else default_batch_size(teacher.network.trunk, shape)
    batch_size = config.trajectory_batch_size or usual_batch
    manifest = TrajectoryManifest(
        teacher_fingerprint="0" * 64,
        solver=solver_of(teacher.schedule, config.solver or (None if pipeline is None else pipeline.solver)),
        schedule=teacher.schedule,
        grid=grid_of(config, teacher),
        cfg_scale=usual if config.cfg_scale is None else config.cfg_scale,
        cfg_channels=config.cfg_channels,
        cfg_interval=None,
        precision=config.trajectory_precision or "float32",
        compiled=False,
        sample_shape=shape,
        num_classes=conditions,
        keep=known(config.trajectory_keep),
        dtype=known(config.trajectory_dtype),
        seed=config.seed,
        labels="uniform" if pipeline is None else "balanced",
        batch_size=batch_size,
        shard_size=batch_size,
    )
    return dataclasses.replace(manifest, shard_size=default_shard_size(manifest))


def store_bytes(manifest: TrajectoryManifest, count: int) -> int:
    """Bytes of all shards: 8 for the header's length, the header, padded to a multiple of 8, and the tensors."""
    total = 0
    for first, end in shard_ranges(manifest, count):
        layout, offset = manifest.layout(end - first), 0
        about = json.dumps({"first": first, "manifest": manifest.digest}, sort_keys=True)
        header: dict[str, Any] = {"__metadata__": {"pyard": about}}
        # safetensors writes the widest numbers first, then by name.
        for name in sorted(layout, key=lambda name: (-SAFETENSORS_DTYPES[layout[name].dtype][1], name)):
            tensor = layout[name]
            span = [offset, offset + tensor.num_bytes]
            header[name] = {"dtype": SAFETENSORS_DTYPES[tensor.dtype][0], "shape": list(tensor.shape), "data_offsets": span}
            offset = span[1]
        total += 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + offset
    return total


def held_out_bytes(config: TrainConfig, manifest: TrajectoryManifest) -> int:
    """Of the trajectories that a run with `evaluate_every` generates to be measured on: targets alone, in float32."""
    if not config.evaluate_every:
        return 0
    like = dataclasses.replace(manifest, keep=known(config.target), dtype="float32")
    return store_bytes(dataclasses.replace(like, shard_size=default_shard_size(like)), config.evaluation_trajectories)


def checkpoints_kept(config: TrainConfig) -> int:
    """How many checkpoints there are at the end of a run."""
    written = set(range(config.save_every, config.max_steps + 1, config.save_every)) | {config.max_steps}
    kept = set(sorted(written)[-config.keep_last :])
    if config.keep_every is not None:
        kept |= {step for step in written if step % config.keep_every == 0}
    return len(kept)
