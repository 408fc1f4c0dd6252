"""What would be found wrong after trajectories were generated, found before: they may take days."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path

from pyard.conditions import ClassConditions
from pyard.errors import InputError
from pyard.models.folder import require_replaceable
from pyard.models.student import Student
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.teachers.text_to_image.teacher import PipelineTeacher
from pyard.training.config import SETTINGS_NAME, TrainConfig, known
from pyard.trajectories.generate import grid_of
from pyard.trajectories.manifest import IMPORTED

_FOLDERS, _FILES = ("checkpoints", "trajectories", "held-out", "tensorboard", "grids"), ("log.jsonl", SETTINGS_NAME)


def names_of_results(config: TrainConfig) -> list[str]:
    """The folders that the averages are written to, in `out`."""
    return ["student", *(f"student-ema-{decay:g}" for decay in config.ema_decays[1:])]


def require_run_folder(config: TrainConfig) -> None:
    """Raises InputError if something is in the way of what a run writes into `out`, some of it in its last second."""
    for name in names_of_results(config):
        require_replaceable(config.out / name, "Student")
    for name in _FOLDERS:
        path = config.out / name
        if os.path.lexists(path) and not path.is_dir():
            raise InputError(
                f"{path} is {'a dangling link' if path.is_symlink() else 'a file'}; expected a folder or a new path"
            )
    for name in _FILES:
        if (config.out / name).is_dir():
            raise InputError(f"{config.out / name} is a folder; expected a file or a new path")


def check_before_generating(config: TrainConfig, teacher: NetworkTeacher, earlier: Student | None, world: int) -> TrainConfig:
    """The configuration of a run that generates its trajectories, as the student that it starts from saw its own.

    Args:
        config: resolved.
        teacher: that will generate them.
        earlier: the student that training starts from, if it does.
        world: processes.

    Raises:
        InputError: a student, VAE or real data that cannot be trained with these trajectories.
    """
    if config.lora_rank is not None and importlib.util.find_spec("peft") is None:
        raise InputError("training: lora_rank needs PEFT, which is not installed: pip install 'peft>=0.17'")
    if config.lora_rank is not None and config.lora_rank > teacher.network.trunk.hidden_size:
        raise InputError(
            f"training: lora_rank is {config.lora_rank}; the teacher's layers are {teacher.network.trunk.hidden_size} wide: "
            "expected less, or none to train all weights"
        )
    shape = teacher.sample_shape
    if isinstance(teacher, PipelineTeacher):
        shape = teacher.shape_of(config.height, config.width)
    if config.evaluate_every and teacher.codec is not None:
        teacher.codec.check(shape)
    if earlier is None:
        return config
    require_own_teacher(config, earlier, teacher)
    config = _like_before(config, earlier)
    grid = grid_of(teacher, known(config.num_steps), config.teacher_steps, shape)
    if not earlier.config.grid_of(earlier.trained_shape(shape)).same_trajectory(grid):
        theirs = earlier.config.grid.teacher_steps
        raise InputError(
            f"student {config.student} was trained on trajectories of other times than those that {grid.teacher_steps} teacher "
            f"steps give; give --teacher_steps {theirs}, or the trajectories that it learnt from: --trajectories"
        )
    if config.stage == "adversarial":
        _check_real(config, teacher, earlier, shape)
        if config.batch_size // world % config.adversarial.virtual_batch:
            raise InputError(
                f"training: a process's share of batch_size is {config.batch_size // world}; expected a multiple of "
                f"adversarial.virtual_batch, {config.adversarial.virtual_batch}"
            )
    return config


def require_own_teacher(config: TrainConfig, student: Student, teacher: NetworkTeacher) -> None:
    """Raises InputError if the student that training starts from was made from another teacher."""
    made_from = student.config.teacher_fingerprint
    if made_from != teacher.fingerprint:
        raise InputError(
            f"student {config.student} was made from teacher {made_from[:12]}, but this is teacher {teacher.fingerprint[:12]}; "
            "give its own"
        )


def _like_before(config: TrainConfig, earlier: Student) -> TrainConfig:
    """The configuration with what it leaves open of the teacher's sampler decided as for the student's own trajectories."""
    theirs = earlier.config.teacher_settings
    if theirs is None:
        return config
    interval = theirs.pop("cfg_interval")
    if interval is not None:
        raise InputError(
            f"student {config.student} was trained on trajectories that were guided at times {interval[0]:g} to "
            f"{interval[1]:g} alone, which train does not generate; give them: --trajectories (pyard trajectories "
            f"--cfg_interval {interval[0]:g} {interval[1]:g} writes them)"
        )
    if theirs["solver"] == IMPORTED:
        theirs["solver"] = None
    if config.cfg_scale is not None:  # channels belong to a scale
        theirs.pop("cfg_channels")
    return dataclasses.replace(config, **{name: value for name, value in theirs.items() if getattr(config, name) is None})


def _check_real(config: TrainConfig, teacher: NetworkTeacher, student: Student, shape: tuple[int, ...]) -> None:
    from pyard.data.real_data import RealData
    from pyard.data.real_images import class_folders, is_image_folder

    source, folder = config.adversarial.real, Path(config.adversarial.real)
    if source != "digits" and not folder.exists():
        raise InputError(f"real data {source}: no such file or folder")
    if isinstance(teacher, PipelineTeacher):
        return
    conditions = student.conditions or teacher.conditions
    if source != "digits" and is_image_folder(folder):
        class_folders(folder, conditions if isinstance(conditions, ClassConditions) else None)
    else:
        RealData.load(source, shape, conditions.count)
