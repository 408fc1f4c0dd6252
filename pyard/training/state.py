"""What a run needs in order to go on as if it had never stopped: checkpoints that are complete or absent, and the log."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from pyard.errors import InputError
from pyard.models.folder import new_folder

KEPT = 2


def ema_of(model: torch.nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average whose decay warms up, min(decay, (1 + n) / (10 + n)): short runs forget their start."""

    def update(averaged: Any, current: Any, count: Any) -> None:
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update)


class Checkpoints:
    """The folder `checkpoints/` of a run: `step-0000500/` with model, EMA, optimizer and position.

    Args:
        path: the folder; made when first needed.
    """

    def __init__(self, path: Path):
        self.path = path

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        names = (re.fullmatch(r"step-(\d+)", entry.name) for entry in self.path.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        ema: AveragedModel,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
    ) -> None:
        """Write the checkpoint of a step and drop all but the newest two."""
        with new_folder(self._folder(step)) as folder:
            save_file(_tensors(model), folder / "model.safetensors")
            save_file(_tensors(ema.module), folder / "ema.safetensors")
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            torch.save(torch.get_rng_state(), folder / "rng.pt")
            (folder / "state.json").write_text(json.dumps({"step": step, "ema_updates": int(ema.n_averaged), **state}))
        for old in self.steps()[:-KEPT]:
            shutil.rmtree(self._folder(old))

    def load(
        self,
        step: int,
        model: torch.nn.Module,
        ema: AveragedModel,
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, Any]:
        """Restore everything that `save` wrote; returns the `state` it was given."""
        folder = self._folder(step)
        try:
            model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
            ema.module.load_state_dict(load_file(folder / "ema.safetensors"), strict=False)
            optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
            torch.set_rng_state(torch.load(folder / "rng.pt", weights_only=True))
            state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        except Exception as error:
            raise InputError(
                f"checkpoint {folder} cannot be read ({error}); remove that folder to go on from the one before"
            ) from error
        ema.n_averaged.fill_(state["ema_updates"])
        return state

    def _folder(self, step: int) -> Path:
        return self.path / f"step-{step:07d}"


class TrainingLog:
    """`log.jsonl` of a run: one JSON object a logged step.

    Args:
        path: the file.
        resume_step: lines of later steps, written after the checkpoint that the run resumes from, are dropped.
    """

    def __init__(self, path: Path, resume_step: int):
        kept = [line for line in read_log(path) if line["step"] <= resume_step]
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
        self._file = open(path, "a", buffering=1)

    def write(self, **values: Any) -> None:
        """Append a line."""
        self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`; a last line that was cut off by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
