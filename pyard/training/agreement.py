"""Settings beside a store or a student that is given: what was given must agree with it, and what was not comes from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pyard.conditions import PromptTable
from pyard.conditions.prompt_file import read_prompts
from pyard.diffusion.time_grid import Target
from pyard.errors import InputError
from pyard.models.student_config import StudentConfig
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.teachers.text_to_image.teacher import PipelineTeacher
from pyard.training.config import TrainConfig
from pyard.trajectories import TrajectoryManifest, TrajectoryStore
from pyard.trajectories.manifest import IMPORTED

_OF_A_PIPELINE = ("prompts", "height", "width", "embedded_guidance")


def agree_with_stores(config: TrainConfig, stores: Sequence[TrajectoryStore], counts: Sequence[int]) -> TrainConfig:
    """The configuration with what stores decide.

    Args:
        config: as it was given.
        stores: to train on; stores of several sizes share all that counts here.
        counts: trajectories that are read of each.

    Raises:
        InputError: a setting was given that differs from the stores', or they cannot be trained on; names both.
    """
    each = [_settings_of(store.manifest) for store in stores]
    for store, theirs in zip(stores, each, strict=True):
        _check(config, theirs, f"the trajectories in {store.path}")
    _check(config, {"num_trajectories": sum(counts)}, f"the trajectories in {', '.join(str(s.path) for s in stores)}")
    target = config.target
    if target is None and config.student is None:
        target = "denoised" if {theirs["trajectory_keep"] for theirs in each} == {"denoised"} else "state"
    if target is not None:
        check_target(target, stores)
    shared = {name: value for name, value in each[0].items() if all(theirs[name] == value for theirs in each)}
    if shared["solver"] == IMPORTED:
        shared["solver"] = None
    config = dataclasses.replace(config, **shared, target=target, num_trajectories=sum(counts))
    for store, count in zip(stores, counts, strict=True):
        if count < config.batch_size:
            raise InputError(
                f"training: batch_size is {config.batch_size}, more than the {count} trajectories in {store.path}; expected at "
                "most as many"
            )
    return config


def check_target(target: Target, stores: Sequence[TrajectoryStore]) -> None:
    """Raises InputError if a store does not keep what a student is to predict."""
    for store in stores:
        store.manifest.require_target(target, str(store.path))


def _settings_of(manifest: TrajectoryManifest) -> dict[str, Any]:
    """The settings of a run that would generate such trajectories."""
    return {
        "num_steps": manifest.grid.num_steps,
        "teacher_steps": manifest.grid.teacher_steps,
        "solver": manifest.solver,
        "cfg_scale": manifest.cfg_scale,
        "cfg_channels": manifest.cfg_channels,
        "trajectory_precision": manifest.precision,
        "trajectory_batch_size": manifest.batch_size,
        "trajectory_dtype": manifest.dtype,
        "trajectory_keep": manifest.keep,
    }


def agree_with_student(config: TrainConfig, student: StudentConfig) -> TrainConfig:
    """The configuration with what a student that training starts from decides.

    Raises:
        InputError: a setting was given that differs from the student's; names both.
    """
    names = ("history_layers", "mask", "window", "target", "output", "heads", "history_bias")
    theirs: dict[str, Any] = {name: getattr(student, name) for name in names}
    theirs["num_steps"] = student.grid.num_steps
    if student.base is not None:
        theirs |= {"lora_rank": student.base.rank, "lora_heads": student.base.heads}
    _check(config, theirs, f"the student {config.student}")
    return dataclasses.replace(config, **theirs)


def agree_with_pipeline(
    config: TrainConfig, stores: Sequence[TrajectoryStore], teacher: NetworkTeacher, *, given: bool
) -> TrainConfig:
    """The configuration with what the stores of a text-to-image pipeline decide of pictures and prompts.

    Args:
        config: as it was given.
        stores: to train on.
        teacher: that made them.
        given: whether they are; else they were made by this configuration.

    Raises:
        InputError: a setting was given that differs from theirs, or that is for pipelines, and the teacher is none.
    """
    if not isinstance(teacher, PipelineTeacher):
        wrong = [name for name in _OF_A_PIPELINE if getattr(config, name) is not None]
        if wrong:
            raise InputError(f"training: {wrong[0]} is for text-to-image pipelines of diffusers; the teacher is not one")
        return config
    table = stores[0].conditions
    assert isinstance(table, PromptTable)
    where = f"the trajectories in {', '.join(str(store.path) for store in stores)}"
    shapes = [store.manifest.sample_shape for store in stores]
    factor = teacher.configs.vae_factor
    theirs: dict[str, Any] = {"embedded_guidance": table.record.constants.get("guidance")}
    if len(shapes) == 1:
        theirs |= {"height": shapes[0][1] * factor, "width": shapes[0][2] * factor}
        wanted = teacher.shape_of(
            theirs["height"] if config.height is None else config.height,
            theirs["width"] if config.width is None else config.width,
        )
        if wanted == shapes[0]:  # sizes are rounded down to what the transformer takes
            config = dataclasses.replace(config, height=None, width=None)
    elif config.height is not None or config.width is not None:
        raise InputError(f"training: height and width are for one size, but {where} have several; leave them out")
    if given and config.prompts is not None:
        _check_prompts(config.prompts, table, teacher.family.negative_prompt, where)
    _check(config, theirs, where)
    return dataclasses.replace(config, **theirs)


def _check_prompts(source: str, table: PromptTable, default_negative: str, where: str) -> None:
    lines = read_prompts(source)
    wanted = [(prompt, default_negative if negative is None else negative) for prompt, negative in lines]
    found = list(zip(table.prompts, table.negative_prompts, strict=True))
    if wanted == found:
        return
    both = zip(wanted, found, strict=False)
    first = next((i for i, (mine, theirs) in enumerate(both) if mine != theirs), min(len(wanted), len(found)))
    mine, theirs = (repr(texts[first][0]) if first < len(texts) else "nothing" for texts in (wanted, found))
    raise InputError(
        f"training: prompts is {source}, with {len(wanted)} prompts, but {where} have {len(found)} others: prompt {first} is "
        f"{mine} in the file and {theirs} there; leave it out, or give the file that they were made with"
    )


def _check(config: TrainConfig, theirs: Mapping[str, Any], where: str) -> None:
    """Raises InputError at the first setting that was given and differs."""
    for name, value in theirs.items():
        mine = getattr(config, name)
        if mine not in (None, "auto") and mine != value:
            has = "none" if value is None else value
            raise InputError(
                f"training: {name} is {mine}, but {has} in {where}; leave it out (write none if a file has it), or give "
                "that value"
            )
