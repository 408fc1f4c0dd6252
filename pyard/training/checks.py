"""What settings of a run must be, each alone and all together; checked before anything is computed."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from pyard.errors import InputError
from pyard.ops.masks import check_mask
from pyard.training.adversarial_config import AdversarialConfig

if TYPE_CHECKING:
    from pyard.training.config import TrainConfig

# What a run has that is given neither a value nor a store or student that decides it.
DEFAULTS: dict[str, Any] = {
    "num_steps": 4, "num_trajectories": 8192, "mask": "causal", "target": "state", "heads": "per_step",
    "trajectory_dtype": "float32", "trajectory_keep": "both",
}  # fmt: skip


def check_ranges(config: TrainConfig) -> None:
    """Refuse settings that are out of range or contradict each other.

    Raises:
        InputError: names the setting, what was found and what was expected.
    """
    at_least = {
        **dict.fromkeys(("num_steps", "max_steps", "batch_size", "gradient_accumulation", "num_trajectories"), 1),
        **dict.fromkeys(("save_every", "keep_last", "log_every", "max_skipped_in_a_row", "evaluation_trajectories"), 1),
        **dict.fromkeys(("warmup_steps", "evaluate_every", "rollout_start", "seed"), 0),
    }
    for name, least in at_least.items():
        if getattr(config, name) is not None and getattr(config, name) < least:
            raise InputError(f"training: {name} is {getattr(config, name)}; expected at least {least}")
    for name in ("keep_every", "peak_tflops", "huber_c"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise InputError(f"training: {name} is {getattr(config, name)}; expected more than 0, or none")
    for name in ("learning_rate", "grad_clip", "min_snr_gamma"):
        if not getattr(config, name) > 0:
            raise InputError(f"training: {name} is {getattr(config, name)}; expected more than 0")
    if not config.ema_decays or not all(0 <= decay < 1 for decay in config.ema_decays):
        raise InputError(
            f"training: ema_decay is {config.ema_decay}; expected at least 0 and below 1, or a list of such numbers"
        )
    if len(set(config.ema_decays)) < len(config.ema_decays):
        raise InputError(f"training: ema_decay is {config.ema_decay}; expected decays that differ")
    if not 0 <= config.rollout_probability <= 1:
        raise InputError(f"training: rollout_probability is {config.rollout_probability}; expected 0 to 1")
    # Stores and a student that are given decide what is not: it is checked when they are known.
    is_open = config.trajectories is not None or config.student is not None
    num_steps = config.num_steps or (None if is_open else DEFAULTS["num_steps"])
    if not isinstance(config.step_weights, str):
        count = len(config.step_weights)
        if count != (num_steps or count) or not count or min(config.step_weights) < 0 or sum(config.step_weights) <= 0:
            raise InputError(
                f"training: step_weights is {list(config.step_weights)}; expected {num_steps or count or 'some'} numbers "
                "(num_steps), none of them negative and not all 0"
            )
    target = config.target or (None if is_open else DEFAULTS["target"])
    if target is not None and config.trajectory_keep not in (None, target, "both"):
        raise InputError(
            f"training: trajectory_keep is {config.trajectory_keep!r}, but target is {target!r}; keep that, or both"
        )
    if config.mask is not None or not is_open:
        check_mask(config.mask or DEFAULTS["mask"], config.window)
    if config.output == "jump" and config.target == "denoised":
        raise InputError("training: output 'jump' starts from a state, so it needs target 'state', not 'denoised'")
    for name, least in (("history_layers", 0), ("lora_rank", 1), ("trajectory_batch_size", 1)):
        if getattr(config, name) is not None and getattr(config, name) < least:
            raise InputError(f"training: {name} is {getattr(config, name)}; expected at least {least}, or none")
    if config.steps_per_update is not None:
        _check_steps(config, config.steps_per_update, num_steps)
    if config.weight_decay < 0:
        raise InputError(f"training: weight_decay is {config.weight_decay}; expected at least 0")
    if not all(0 <= beta < 1 for beta in config.adam_betas):
        raise InputError(f"training: adam_betas is {config.adam_betas}; expected two numbers, at least 0 and below 1")
    to_generate = config.num_trajectories or DEFAULTS["num_trajectories"]
    if config.trajectories is None and config.batch_size > to_generate:
        raise InputError(
            f"training: batch_size is {config.batch_size}, more than the {to_generate} trajectories to be "
            "generated (num_trajectories); expected at most as many"
        )
    if config.trackers in ("tensorboard", "wandb") and importlib.util.find_spec(config.trackers) is None:
        raise InputError(
            f"training: trackers is {config.trackers!r}, which is not installed: "
            f"pip install {config.trackers}, or --trackers none"
        )
    if config.stage == "adversarial" and config.student is None:
        raise InputError("training: stage is 'adversarial' and student is None; that stage starts from a student")
    if config.stage == "regression" and config.adversarial != AdversarialConfig():
        raise InputError("training: adversarial has settings, but stage is 'regression'; expected 'adversarial' and a student")
    if config.stage == "adversarial" and (config.gradient_accumulation > 1 or config.rollout_probability):
        raise InputError(
            "training: the adversarial stage supports neither gradient_accumulation (its weight is computed on a whole batch; "
            "use activation_checkpointing or more processes) nor rollout_probability"
        )
    if config.stage == "adversarial" and isinstance(config.trajectories, list) and len(config.trajectories) > 1:
        raise InputError("training: the adversarial stage takes one store of trajectories, of the real data's shape")
    if config.lora_heads is not None and config.lora_rank is None:
        raise InputError(f"training: lora_heads is {config.lora_heads!r}, but lora_rank is none; give both, or neither")
    if config.warmup_steps and config.lr_schedule == "constant":
        raise InputError("training: lr_schedule 'constant' has no warm-up; use 'constant_with_warmup', or warmup_steps 0")


def _check_steps(config: TrainConfig, steps: int, num_steps: int | None) -> None:
    if not 1 <= steps <= (num_steps or steps):
        raise InputError(
            f"training: steps_per_update is {steps}; expected 1 to {num_steps or 'num_steps'}, or none for all of them"
        )
    if config.stage == "adversarial":
        raise InputError(
            "training: steps_per_update is for the regression; the adversarial stage judges the last step, which every update "
            "needs: use activation_checkpointing or more processes"
        )
    if config.rollout_probability and config.rollout_gradient == "backprop":
        raise InputError(
            "training: steps_per_update leaves steps out, but rollout_gradient 'backprop' needs each of them for the next; use "
            "rollout_gradient 'detach', or steps_per_update none"
        )
