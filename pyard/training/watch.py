"""What is watched while a student trains: its samples from fixed noise, and the exposure-bias curve, in TensorBoard or W&B.

The curve is what ARD is about: the error to the teacher at each step when the student reads the teacher's history (teacher
forcing) and when it reads its own (rollout). The gap between the two is the exposure bias.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pyard.conditions import PromptTable
from pyard.data.pictures import save_picture, tiles
from pyard.diffusion.noise import standard_normal
from pyard.errors import InputError
from pyard.models.codec import LatentCodec
from pyard.models.history import ConcatenatingCache
from pyard.models.student import Student
from pyard.sampling.exposure_bias import exposure_bias
from pyard.storage.files import write_text
from pyard.storage.log import TrainingLog
from pyard.training.checks import DEFAULTS
from pyard.training.config import TrainConfig
from pyard.training.regression import Measured
from pyard.trajectories import TrajectoryBatch, TrajectoryReader, TrajectoryStore

CURVES_NAME = "exposure_bias.jsonl"
GRIDS_NAME = "grids"
_GRID_SAMPLES = 20
# Of large pictures fewer are drawn, one after the other, and shown smaller.
_GRID_PROMPTS, _SHOWN_PIXELS = 8, 256


class Watcher:
    """Sends the log's numbers to trackers and, every `evaluate_every` updates, draws and measures the averaged student.

    Args:
        config: settings.
        student: the averaged one.
        held_out: trajectories that are not trained on, a store for each size; none: no curve.
        resume_step: what was recorded of later steps is dropped.
        records: False: compute all, for a student in shards needs it, and record nothing.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Student,
        held_out: Sequence[TrajectoryStore],
        resume_step: int,
        *,
        records: bool = True,
    ):
        self.config, self.student, self.held_out = config, student, held_out
        self.trackers = _trackers(config, resume_step) if records else []
        self.curves = TrainingLog(config.out / CURVES_NAME, resume_step) if held_out and records else None
        self.grids = config.out / GRIDS_NAME if config.evaluate_every and records else None
        table = student.require_conditions()
        self._of_prompts = isinstance(table, PromptTable)
        if isinstance(table, PromptTable):
            numbers = _first_of_each_prompt(table)
            if self.grids is not None:
                texts = (" ".join(table.prompts[number].split()) for number in numbers)
                write_text(self.grids / "prompts.txt", "".join(f"{text}\n" for text in texts))
        else:
            numbers = np.arange(_GRID_SAMPLES) % student.num_conditions
        self._together = 1 if self._of_prompts else _GRID_SAMPLES
        noise = standard_normal(config.seed, np.arange(len(numbers)), student.sample_shape)
        if self.grids is not None and student.codec is not None:
            student.codec.check(student.sample_shape)  # now, not at the first picture
        self._noise, self._condition = torch.from_numpy(noise), table.take(numbers)

    def __call__(self, step: int, measured: Measured) -> None:
        """Look at the run after an update."""
        last = step == self.config.max_steps
        # As in log.jsonl, without updates that were skipped.
        if self.trackers and (step % self.config.log_every == 0 or last) and measured.finite():
            values = {"loss": float(measured.loss), "grad_norm": float(measured.grad_norm)}
            losses = enumerate(measured.per_step.tolist())
            values |= {f"loss_step/{s}": loss for s, loss in losses if math.isfinite(loss)}  # NaN: left out of the update
            values |= {name: float(value) for name, value in measured.more.items()}
            self._log(values, step)
        if self.config.evaluate_every and (step % self.config.evaluate_every == 0 or last):
            self._evaluate(step)

    def flush(self) -> None:
        """Make the curves so far durable, before a checkpoint appears."""
        if self.curves is not None:
            self.curves.flush()

    def finish(self) -> None:
        """Close the trackers' files."""
        for tracker in self.trackers:
            tracker.finish()
        if self.curves is not None:
            self.curves.close()

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        student = self.student.eval()
        samples = self._drawn()
        if self.trackers or self.grids:
            samples = self._decoded(samples)
            if samples.ndim == 4:  # else they are no pictures
                self._show(samples.float().cpu(), step)
        if self.held_out:
            batches = itertools.chain.from_iterable(in_order(store, self.config) for store in self.held_out)
            curve = exposure_bias(student, batches)
            if self.curves is not None:
                self.curves.write(step=step, **asdict(curve))
            values = {f"teacher_forced/{s}": error for s, error in enumerate(curve.teacher_forced)}
            values |= {f"rollout/{s}": error for s, error in enumerate(curve.rollout)}
            self._log({f"exposure_bias/{name}": value for name, value in values.items()}, step)

    def _drawn(self) -> torch.Tensor:
        device, drawn = self.student.embed_times.device, []
        for first in range(0, len(self._noise), self._together):
            some = slice(first, first + self._together)
            noise, condition = self._noise[some].to(device), self._condition.index(some).to(device)
            *_, last = self.student.rollout(noise, condition, ConcatenatingCache())
            drawn.append(last)
        return torch.cat(drawn)

    def _show(self, pictures: torch.Tensor, step: int) -> None:  # [n, C, H, W]
        scale = _SHOWN_PIXELS / max(pictures.shape[2:])
        if self._of_prompts and scale < 1:
            pictures = F.interpolate(pictures, scale_factor=scale, mode="bilinear", antialias=True)
        columns = (_GRID_PROMPTS if self._of_prompts else _GRID_SAMPLES) // 2
        picture = tiles(pictures.numpy(), columns=columns)  # [rows, columns, 3]
        if self.grids is not None:
            save_picture(picture, self.grids / f"step-{step:07d}.png")
        for tracker in self.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": picture[None]}, step=step, **options)

    def _decoded(self, samples: torch.Tensor) -> torch.Tensor:
        codec = self.student.codec
        if codec is None:
            return samples
        images = codec.decode(samples.float(), batch_size=1)
        if isinstance(codec, LatentCodec):
            codec.vae.to("cpu")  # until the next look, its memory is the training's
        return images

    def _log(self, values: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(values, step=step)


def _first_of_each_prompt(table: PromptTable) -> np.ndarray:
    """Rows of the first distinct prompts, int64."""
    rows: dict[str, int] = {}
    for number, text in enumerate(table.prompts):
        rows.setdefault(text, number)
        if len(rows) == _GRID_PROMPTS:
            break
    return np.array(list(rows.values()), np.int64)


def in_order(store: TrajectoryStore, config: TrainConfig) -> Iterable[TrajectoryBatch]:
    """All trajectories of a store once, in their order, in batches of the training's size."""
    size = min(config.batch_size, store.count)
    reader = TrajectoryReader(store, size, target=config.target or DEFAULTS["target"])
    for first in range(0, store.count, size):
        yield reader.gather(np.arange(first, min(first + size, store.count)))


def _trackers(config: TrainConfig, resume_step: int) -> list[Any]:
    wanted = config.trackers
    if wanted == "auto":
        wanted = "tensorboard" if config.evaluate_every and importlib.util.find_spec("tensorboard") else "none"
    if wanted == "none":
        return []
    if importlib.util.find_spec(wanted) is None:
        raise InputError(f"training: trackers is {wanted!r}, which is not installed: pip install {wanted}, or --trackers none")
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    folder = str(Path(config.out).resolve())
    tracker: Any
    if wanted == "tensorboard":
        # Points after the checkpoint that a run resumes from are hidden, for they come again.
        tracker = TensorBoardTracker(wanted, folder, purge_step=resume_step + 1)
    else:
        tracker = WandBTracker(
            "pyard", dir=folder, name=config.out.name, config=json.loads(json.dumps(asdict(config), default=str))
        )
    tracker.start()
    return [tracker]
