"""What the built-in teachers share: a network for small widths, a training loop, and a folder that is finished or absent."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from pyard.conditions import Condition
from pyard.errors import InputError
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import DiT
from pyard.storage.checkpoints import Checkpoints, Stateful, ema_of
from pyard.storage.files import sync_directory, write_text
from pyard.storage.folders import sync_tree, with_a_name
from pyard.storage.freed_memory import keep_freed_memory
from pyard.storage.reading import read_object

_SETTINGS_NAME = "teach.json"
_WARM_UP_STEPS = 100


class Saveable(Protocol):
    """Something that can write itself into a folder."""

    def save_pretrained(self, path: str | Path) -> Any: ...


_Teacher = TypeVar("_Teacher", bound=Saveable)
_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True)
class TrainingSettings:
    """Settings that every teacher's training has, kept beside it; `digits.teach` says what they mean."""

    max_steps: int
    hidden_size: int
    depth: int
    num_heads: int
    batch_size: int
    learning_rate: float
    ema_decay: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("max_steps", "hidden_size", "depth", "num_heads", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"teach: {name} is {getattr(self, name)}; expected at least 1")
        if not self.learning_rate > 0:
            raise InputError(f"teach: learning_rate is {self.learning_rate}; expected more than 0")
        check_share("ema_decay", self.ema_decay)


@dataclass(frozen=True)
class TeachConfig(TrainingSettings):
    """Settings of a class-conditional teacher's training."""

    label_dropout: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("label_dropout", self.label_dropout)


def check_share(name: str, value: float) -> None:
    """Raise an InputError if a setting is not in [0, 1)."""
    if not 0 <= value < 1:
        raise InputError(f"teach: {name} is {value}; expected at least 0 and below 1")


class TeachBatch(NamedTuple):
    """What a network sees in one update, and what it should say."""

    noisy: torch.Tensor  # [B, C, H, W], x_t
    times: torch.Tensor  # [B], the schedule's times
    labels: torch.Tensor  # [B] int64
    target: torch.Tensor  # [B, C, H, W]


def teaching_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def taught_once(
    out: str | Path, config: TrainingSettings, train: Callable[[Path], _Teacher], load: Callable[[Path], _Teacher]
) -> _Teacher:
    """The teacher in a folder, trained into it if it is not there yet.

    Args:
        out: the teacher's folder; while it trains, its work is in the folder of the same name + `.training`.
        config: its settings; a folder of other settings is refused.
        train: trains a teacher; keeps its checkpoints in the folder it is given, and goes on from those it finds there.
        load: reads a finished teacher's folder.

    Raises:
        InputError: `out` holds something else, or a teacher trained with other settings.
    """
    out = with_a_name(Path(out))
    working = out.with_name(out.name + ".training")
    if out.exists() and not working.exists():  # it appears whole, so the folder above may be read-only
        _check_same_settings(out, config)
        return load(out)
    # Processes of one run, or two runs on a machine, want the same teacher: one trains, the others wait and load.
    lock = FileLock(out.with_name(out.name + ".lock"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        held = lock.acquire()
    except OSError as error:
        raise InputError(
            f"{out.parent} cannot be written to ({error.strerror}), and has no teacher {out.name}; choose "
            "another out, or another cache folder: PYARD_CACHE=DIR"
        ) from None
    with held:
        if out.exists():
            _check_same_settings(out, config)
            shutil.rmtree(working, ignore_errors=True)  # a kill may have come while it went
            return load(out)
        if (working / "checkpoints").exists() or (working / _SETTINGS_NAME).exists():
            _check_same_settings(working, config)
        else:
            _write_settings(working, config)
        teacher = train(working)
        # The settings go in first, then the folder appears under its name: a teacher without settings is never seen.
        teacher.save_pretrained(working / "teacher")
        _write_settings(working / "teacher", config)
        sync_tree(working / "teacher")
        (working / "teacher").rename(out)
        sync_directory(out.parent)
        shutil.rmtree(working)
        sync_directory(out.parent)
        return teacher


def new_network(sizes: DiTConfig, seed: int) -> DiT:
    """A fresh network from a seed, for widths below DiT's own; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DiT(sizes)
        # DiT's embeddings (std 0.02) suit its width of 384 and more. At 64 the conditioning would be so faint that a run of
        # a few thousand updates ends before the network has learnt its classes.
        nn.init.normal_(network.trunk.label_embed.weight)
        for layer in (network.trunk.time_embed.fc1, network.trunk.time_embed.fc2):
            nn.init.xavier_uniform_(layer.weight, gain=2.0)
    return network


def train_network(
    network: DiT,
    draw: Callable[[torch.Generator], TeachBatch],
    config: TeachConfig,
    working: Path,
    *,
    save_every: int,
    progress: bool,
    mixed_precision: bool = False,
) -> DiT:
    """Regress a network on its targets; the learning rate warms up, then falls to zero along a cosine.

    Args:
        network: on the device it trains on.
        draw: makes the batch of an update from a generator that knows the update's number alone, so that a resumed run sees
            what an unbroken one sees.
        config: `max_steps`, `learning_rate`, `ema_decay` and `seed` count here.
        working: checkpoints are in its `checkpoints/`; the newest one is where training goes on.
        save_every: updates between checkpoints.
        progress: show a progress bar.
        mixed_precision: bfloat16 autocast.

    Returns:
        The network with its averaged weights.
    """
    device = next(network.parameters()).device

    def loss_of(random: torch.Generator) -> torch.Tensor:
        batch = draw(random)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
            prediction = network(batch.noisy.to(device), batch.times.to(device), Condition({"label": batch.labels.to(device)}))
        return F.mse_loss(prediction.float(), batch.target.to(device))

    def rate(peak: float, step: int) -> float:
        return peak * min(1.0, step / _WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))

    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    return minimise(network, loss_of, {"optimizer": optimizer}, rate, config, working, save_every=save_every, progress=progress)


def minimise(
    network: _Network,
    loss_of: Callable[[torch.Generator], torch.Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    rate: Callable[[float, int], float],
    config: TrainingSettings,
    working: Path,
    *,
    save_every: int,
    progress: bool,
    max_gradient_norm: float | None = None,
) -> _Network:
    """Train a network; a run that was stopped goes on from its newest checkpoint, as if it had not been.

    Args:
        network: on the device it trains on.
        loss_of: the loss of an update, from a generator that knows the update's number alone, so that a resumed run sees what
            an unbroken one sees.
        optimizers: by their names in a checkpoint; together they have all of the network's parameters.
        rate: the learning rate of an update, given the one that the optimizer was made with and the update's number, from 1.
        config: `max_steps`, `ema_decay` and `seed` count here.
        working: checkpoints are in its `checkpoints/`.
        save_every: updates between checkpoints.
        progress: show a progress bar.
        max_gradient_norm: longer gradients are shortened to it; None: none are.

    Returns:
        The network with its averaged weights.
    """
    if next(network.parameters()).device.type == "cpu":
        keep_freed_memory()
    ema = ema_of(network, config.ema_decay)
    peaks = {name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in optimizers.items()}
    checkpoints = Checkpoints(working / "checkpoints")
    parts: dict[str, Stateful] = {"model": network, "ema": ema, **optimizers}
    checkpoints.drop_unfinished()
    begin = checkpoints.newest()
    if begin:
        checkpoints.load(begin, parts)
    checkpoints.require_room(parts, (config.max_steps - 1 - begin) // save_every)

    bar = tqdm(total=config.max_steps, initial=begin, desc="training the teacher", unit="step", disable=not progress)
    for step in range(begin + 1, config.max_steps + 1):
        for name, optimizer in optimizers.items():
            for group, peak in zip(optimizer.param_groups, peaks[name], strict=True):
                group["lr"] = rate(peak, step)
        loss = loss_of(torch.Generator().manual_seed(config.seed << 32 | step))
        network.zero_grad()
        loss.backward()
        if max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), max_gradient_norm)
        for optimizer in optimizers.values():
            optimizer.step()
        ema.update_parameters(network)
        if step % save_every == 0 and step < config.max_steps:
            checkpoints.save(step, parts)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        bar.update()
    bar.close()
    return cast(_Network, ema.module)


def _write_settings(folder: Path, config: TrainingSettings) -> None:
    write_text(folder / _SETTINGS_NAME, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def _check_same_settings(folder: Path, config: TrainingSettings) -> None:
    file = folder / _SETTINGS_NAME
    try:
        found = read_object(file, "the settings of a training run")
    except InputError as error:
        raise InputError(f"{folder} exists, but holds no training of the built-in teacher ({error}); use another out") from None
    wanted = dataclasses.asdict(config)
    differing = [f"{key}: was {found.get(key)!r}, now {value!r}" for key, value in wanted.items() if found.get(key) != value]
    if differing:
        raise InputError(
            f"{folder} holds a teacher with different settings ({'; '.join(differing)}); use another out, or remove it to "
            "start over"
        )
