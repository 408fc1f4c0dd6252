"""What tells a run from another: the settings and inputs that it was begun with, which it must have when it is resumed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pyard.errors import InputError
from pyard.storage.checkpoints import Checkpoints
from pyard.storage.files import write_text
from pyard.storage.reading import MOST_LABELLED_BYTES, read_object
from pyard.training.config import SETTINGS_NAME, TrainConfig

IDENTITY_NAME = "train.json"

# Two runs that differ in these alone compute the same, to rounding: a run may resume with others.
_NOT_OF_THE_RESULT = (
    "teacher", "trajectories", "out", "student", "network", "save_every", "keep_last", "keep_every",
    "log_every", "evaluate_every",
    "evaluation_trajectories", "max_skipped_in_a_row", "trackers", "peak_tflops", "progress",
    "gradient_accumulation", "activation_checkpointing", "compile",
    "num_trajectories", "teacher_steps", "solver", "cfg_scale", "cfg_channels", "trajectory_dtype", "trajectory_keep",
    "trajectory_precision", "trajectory_batch_size", "prompts", "height", "width", "embedded_guidance",
    "variant", "transformer", "lora",
)  # fmt: skip  # the last three lines are in the manifest of the trajectories, which is compared

# Schedules of the learning rate that do not depend on how many updates there will be.
ENDLESS = ("constant", "constant_with_warmup")


def resume_or_begin(config: TrainConfig, **inputs: Any) -> None:
    """Store a configuration in its run folder; refuse a folder whose run computes something else.

    Args:
        config: resolved.
        inputs: what tells teacher, trajectories and other inputs from others, wherever they lie; JSON-able.

    Raises:
        InputError: names every setting that differs.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_OF_THE_RESULT}
    if config.stage == "regression":
        settings.pop("adversarial")
    else:
        settings["adversarial"].pop("real_cache")
    mine = json.loads(json.dumps({**settings, **inputs}))
    theirs = begun(config)
    if theirs is not None:
        names = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
        if names == ["max_steps"]:
            _check_other_length(config, theirs["max_steps"])
        elif names:
            differing = [f"{key}: was {theirs.get(key)!r}, now {mine.get(key)!r}" for key in names]
            raise InputError(
                f"{config.out} holds a run with different settings ({'; '.join(differing)}); use another --out, or remove it"
            )
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(config.out / SETTINGS_NAME, config.to_yaml())
    write_text(config.out / IDENTITY_NAME, json.dumps(mine, indent=2) + "\n")


def _check_other_length(config: TrainConfig, begun_with: int) -> None:
    """Raises InputError if a run of so many updates would have computed other things than one of `max_steps`."""
    if config.lr_schedule not in ENDLESS:
        raise InputError(
            f"{config.out} holds a run with max_steps {begun_with}, now {config.max_steps}, and lr_schedule "
            f"{config.lr_schedule!r} depends on it ({' and '.join(ENDLESS)} do not, and such runs can be extended); to train "
            f"its student further, give --student {config.out} and another --out"
        )
    done = max(Checkpoints(config.out / "checkpoints").steps(), default=0)
    if config.max_steps < done:
        raise InputError(
            f"training: max_steps is {config.max_steps}, but the run in {config.out} has done {done} updates; expected at "
            "least as many"
        )


def begun(config: TrainConfig) -> dict[str, Any] | None:
    """What the run in `out` was begun with: its settings and inputs; None if there is none."""
    file = config.out / IDENTITY_NAME
    if not file.exists():
        return None
    return read_object(file, "the settings recorded when the run started; use another --out", MOST_LABELLED_BYTES)


def is_finished(config: TrainConfig) -> bool:
    """Whether the run in `out` has done all its updates and written its student."""
    done = max(Checkpoints(config.out / "checkpoints").steps(), default=0)
    return done == config.max_steps and (config.out / "student" / "config.json").is_file()
