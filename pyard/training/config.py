"""Everything that decides what a training run computes, in one frozen dataclass that is stored beside its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyard.errors import InputError
from pyard.models.student import Heads, Output
from pyard.ops.masks import Mask
from pyard.time_grid import Target

CONFIG_NAME = "train.json"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a regression run; the arguments of `pyard.train` by the same names say what they mean."""

    history_layers: int
    mask: Mask
    window: int | None
    target: Target
    output: Output
    heads: Heads
    history_bias: float | None
    lora_rank: int | None
    max_steps: int
    batch_size: int
    learning_rate: float
    lr_schedule: Literal["constant", "cosine"]
    warmup_steps: int
    weight_decay: float
    grad_clip: float
    ema_decay: float
    mixed_precision: Literal["no", "bf16", "fp16"]
    seed: int
    teacher_fingerprint: str
    trajectories: dict[str, Any]  # the store's manifest: what the student is trained on

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"training: {name} is {getattr(self, name)}; expected at least 1")
        if not self.learning_rate > 0:
            raise InputError(f"training: learning_rate is {self.learning_rate}; expected more than 0")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"training: ema_decay is {self.ema_decay}; expected 0 to 1")

    def resume_or_begin(self, out: Path) -> None:
        """Store the configuration in a run folder; refuse a folder whose run was another one.

        Raises:
            InputError: names every setting that differs.
        """
        file = out / CONFIG_NAME
        mine = json.loads(json.dumps(dataclasses.asdict(self)))
        if file.exists():
            try:
                theirs = json.loads(file.read_text())
            except ValueError as error:
                raise InputError(f"{file} is not JSON ({error}); use another --out") from None
            differing = [
                f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} now"
                for key in sorted({*mine, *theirs})
                if mine.get(key) != theirs.get(key)
            ]
            if differing:
                raise InputError(
                    f"{out} holds a run with other settings ({'; '.join(differing)}); use another --out, or remove it"
                )
            return
        out.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps(mine, indent=2) + "\n")
        partial.replace(file)
