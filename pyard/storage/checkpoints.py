"""What a run needs in order to go on as if it had never stopped: checkpoints that are complete or absent, and the log."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from pyard.errors import InputError
from pyard.storage.disk import DiskFullError, did_not_fit, require_room
from pyard.storage.files import file_sha256, sync_directory, write_text
from pyard.storage.folders import new_folder
from pyard.storage.pickles import read_pickle
from pyard.storage.reading import read_json
from pyard.storage.tensor_files import read_safetensors
from pyard.storage.trained import load_trained, shareable, sharing, tensors_of, trained_names
from pyard.storage.units import format_bytes

STATE_NAME = "state.json"


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
    `state.json` has the sha256 of every file, and of itself.

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
            with new_folder(self.folder(step), size=checkpoint_bytes(parts.values())) as folder:
                self._write(folder, parts)
                counts = {name: int(part.n_averaged) for name, part in parts.items() if isinstance(part, AveragedModel)}
                about = {"step": step, "averaged": counts, **(state or {}), "files": _hashes(folder)}
                write_text(folder / STATE_NAME, json.dumps({**about, "sha256": _digest(about)}))
        except Exception as error:
            raise self.unwritable(step, error) from error
        self.drop_old()

    def newest(self) -> int:
        """The newest step whose checkpoint is as it was written, 0 if there are none; damaged ones after it are set aside.

        Raises:
            InputError: all are damaged.
        """
        damaged: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            found = self.damage(step)
            if found is None:
                for number, what in damaged:
                    aside = self.path / f"damaged-{self.folder(number).name}"
                    shutil.rmtree(aside, ignore_errors=True)
                    self.folder(number).rename(aside)
                    sync_directory(self.path)
                    warnings.warn(
                        f"checkpoint {self.folder(number)} is damaged ({what}): it was renamed to {aside.name}, and training "
                        f"continues from step {step}",
                        stacklevel=2,
                    )
                return step
            damaged.append((step, found))
        if damaged:
            step, what = damaged[0]
            raise InputError(
                f"checkpoint {self.folder(step)} is damaged ({what}), and no earlier one is intact; restore it, or "
                f"remove {self.path} to start over"
            )
        return 0

    def damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint; None: nothing, or it is of a pyard that kept no hashes."""
        folder = self.folder(step)
        try:
            state = self.state(step)
            found = _hashes(folder) if "files" in state else {}
        except (OSError, InputError) as error:
            return str(error)
        for name, wanted in state.get("files", {}).items():
            if found.get(name) != wanted:
                return f"{name} is missing" if name not in found else f"{name} is not the file that was written"
        return None

    def state(self, step: int) -> dict[str, Any]:
        """What `state.json` of a checkpoint says.

        Raises:
            InputError: it is missing, was changed, or is another step's.
        """
        file = self.folder(step) / STATE_NAME
        state = read_json(file)
        if not isinstance(state, dict) or state.get("step") != step:
            raise InputError(f"{file}: not the state of step {step}")
        wanted = state.pop("sha256", None)
        if wanted is not None and wanted != _digest(state):
            raise InputError(f"{file}: changed after it was written")
        return state

    def load(self, step: int, parts: Mapping[str, Stateful]) -> dict[str, Any]:
        """Restore every part that `save` was given; returns the `state` it was given."""
        folder = self.folder(step)
        try:
            state = self.state(step)
            self._read(folder, parts)
            for name, part in parts.items():
                if isinstance(part, AveragedModel):
                    part.n_averaged.fill_(state["averaged"][name])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise InputError(
                f"checkpoint {folder} cannot be read ({error}); remove that folder to continue from the previous one"
            ) from error
        return state

    def require_room(self, parts: Mapping[str, Stateful], more: int) -> None:
        """Check the disk before hours of training.

        Args:
            parts: as `save` will be given.
            more: checkpoints that are still to come.

        Raises:
            InputError: those that will be there at once do not fit.
        """
        # A new one is written before an old one goes.
        at_once = min(more, max(1, self.keep_last + 1 - len(self.steps())))
        require_room(
            self.path,
            at_once * checkpoint_bytes(parts.values()),
            f"training: {at_once} more checkpoint{'s' * (at_once > 1)}",
            "or keep fewer with --keep_last",
        )

    def drop_old(self) -> None:
        """Remove the checkpoints that are neither among the newest nor a multiple of `keep_every`."""
        for old in self.steps()[: -self.keep_last]:
            if self.keep_every is None or old % self.keep_every:
                # By another name first: a run that is killed meanwhile leaves no checkpoint with files missing.
                going = self.path / f".{self.folder(old).name}.old"
                shutil.rmtree(going, ignore_errors=True)
                self.folder(old).rename(going)
                sync_directory(self.path)
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
        if isinstance(error, DiskFullError):
            why = error.reason
        elif did_not_fit(error):
            why = f"the disk is full: {format_bytes(free)} free"
        else:
            why = str(error).splitlines()[0]
        return InputError(
            f"the checkpoint of step {step} cannot be written to {self.path}: {why}; "
            f"{intact}: free some space, or keep fewer with --keep_last, and rerun the same command"
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
                load_trained(module, read_safetensors(folder / f"{name}.safetensors"))
            else:
                # On the CPU first: the device it was saved from may be another, or another process's.
                part.load_state_dict(read_pickle(folder / f"{name}.pt"))


def checkpoint_bytes(parts: Iterable[Stateful]) -> int:
    """About what a checkpoint of these takes on the disk; an optimizer counts as AdamW's, two numbers for a weight."""
    total = 0
    for part in parts:
        if isinstance(part, torch.nn.Module):
            module = part.module if isinstance(part, AveragedModel) else part
            state = module.state_dict()
            total += sum(state[name].numel() * state[name].element_size() for name in trained_names(module))
        elif isinstance(part, torch.optim.Optimizer):
            weights = [weight for group in part.param_groups for weight in group["params"]]
            total += 2 * sum(weight.numel() * weight.element_size() for weight in weights)
    return total


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint but its state, by path in it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != STATE_NAME)
    with ThreadPoolExecutor(4) as threads:
        return dict(zip((file.relative_to(folder).as_posix() for file in files), threads.map(file_sha256, files), strict=True))


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
