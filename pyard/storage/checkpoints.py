"""What a run needs in order to go on as if it had never stopped: checkpoints that are complete or absent, and the log."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from pyard.errors import InputError
from pyard.storage.files import write_text
from pyard.storage.folders import new_folder
from pyard.storage.trained import load_trained, shareable, sharing, tensors_of


@runtime_checkable
class Stateful(Protocol):
    """Optimizers, schedulers, readers: anything that can say what it must remember."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def ema_of(model: torch.nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average whose decay warms up, min(decay, (1 + n) / (10 + n)): short runs forget their start.

    It averages what is trained, and shares with the model what is frozen (and, where anything is, the buffers).
    """
    with sharing(shareable(model)):
        return _TrainedAverage(model, decay)


class _TrainedAverage(AveragedModel):
    def __init__(self, model: torch.nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay

    def update_parameters(self, model: torch.nn.Module) -> None:
        pairs = [pair for pair in zip(self.module.parameters(), model.parameters(), strict=True) if pair[0].requires_grad]
        averaged, current = ([parameter.detach() for parameter in side] for side in zip(*pairs, strict=True))
        n = int(self.n_averaged)
        if n == 0:
            for mine, theirs in zip(averaged, current, strict=True):
                mine.copy_(theirs)
        else:
            torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + n) / (10 + n)))
        self.n_averaged += 1


class Checkpoints:
    """The folder `checkpoints/` of a run: `step-0000500/` with everything that the run must remember.

    Modules are kept as safetensors, an EMA as the safetensors of what it averages, everything else as torch saves it.

    Args:
        path: the folder; made when first needed.
        keep_last: how many of the newest stay.
        keep_every: checkpoints of steps that are a multiple of it stay as well; None: no others.
    """

    def __init__(self, path: Path, keep_last: int = 2, keep_every: int | None = None):
        self.path = path
        self.keep_last = keep_last
        self.keep_every = keep_every

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        names = (re.fullmatch(r"step-(\d+)", entry.name) for entry in self.path.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)

    def save(self, step: int, parts: Mapping[str, Stateful], state: Mapping[str, Any] | None = None) -> None:
        """Write the checkpoint of a step, then drop those that are not to be kept.

        Args:
            step: updates done.
            parts: what remembers, by name.
            state: JSON-able values beside them.

        Raises:
            InputError: it cannot be written; earlier checkpoints are as they were.
        """
        try:
            with new_folder(self.folder(step)) as folder:
                self._write(folder, parts)
                counts = {name: int(part.n_averaged) for name, part in parts.items() if isinstance(part, AveragedModel)}
                write_text(folder / "state.json", json.dumps({"step": step, "averaged": counts, **(state or {})}))
        except Exception as error:
            raise self.unwritable(step, error) from error
        self.drop_old()

    def load(self, step: int, parts: Mapping[str, Stateful]) -> dict[str, Any]:
        """Restore every part that `save` was given; returns the `state` it was given."""
        folder = self.folder(step)
        try:
            state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            self._read(folder, parts)
            for name, part in parts.items():
                if isinstance(part, AveragedModel):
                    part.n_averaged.fill_(state["averaged"][name])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise InputError(
                f"checkpoint {folder} cannot be read ({error}); remove that folder to go on from the one before"
            ) from error
        return state

    def drop_old(self) -> None:
        """Remove the checkpoints that are neither among the newest nor a multiple of `keep_every`."""
        for old in self.steps()[: -self.keep_last]:
            if self.keep_every is None or old % self.keep_every:
                # By another name first: a run that is killed meanwhile leaves no checkpoint with files missing.
                going = self.path / f".{self.folder(old).name}.old"
                shutil.rmtree(going, ignore_errors=True)
                self.folder(old).rename(going)
                shutil.rmtree(going)

    def drop_unfinished(self) -> None:
        """Remove what runs that were killed while saving have left; nobody may be saving."""
        for entry in self.path.glob(".step-*"):
            shutil.rmtree(entry)

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.path / f"step-{step:07d}"

    def unwritable(self, step: int, error: Exception) -> InputError:
        """What to say of a checkpoint that could not be written."""
        steps = self.steps()
        intact = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier checkpoint"
        free = shutil.disk_usage(self.path).free if self.path.exists() else 0
        # safetensors and torch wrap the system's error, and torch drops its number; what is left on the disk still tells.
        full = (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in str(error)
        why = "the disk is full" if full or free < 2**20 else str(error).splitlines()[0]
        return InputError(
            f"the checkpoint of step {step} cannot be written to {self.path}: {why} ({free / 2**20:.1f} MiB free); "
            f"{intact}: free some room, or keep fewer with --keep_last, and give the same command again"
        )

    def _write(self, folder: Path, parts: Mapping[str, Stateful]) -> None:
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                save_file(tensors_of(part), folder / f"{name}.safetensors")
            else:
                torch.save(part.state_dict(), folder / f"{name}.pt")

    def _read(self, folder: Path, parts: Mapping[str, Stateful]) -> None:
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                module = part.module if isinstance(part, AveragedModel) else part
                load_trained(module, load_file(folder / f"{name}.safetensors"))
            else:
                # On the CPU first: the device it was saved from may be another, or another process's.
                part.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True, map_location="cpu"))
