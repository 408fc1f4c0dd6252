"""The built-in teacher: a small class-conditional DiT of scikit-learn's handwritten digits, real data without a download."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from pyard.errors import InputError
from pyard.models.dit import DiT, DiTConfig
from pyard.noise_schedule import NoiseSchedule
from pyard.teachers.dit import DiTTeacher

NUM_CLASSES = 10
_SETTINGS_NAME = "teach.json"
# Raised whenever the defaults of `teach` or its arithmetic change, so that nobody's cached teacher is an older one.
_CACHED_NAME = "digits-teacher-1"


@dataclass(frozen=True)
class TeachConfig:
    """Settings of a teacher's training; the arguments of `teach` by the same names say what they mean."""

    max_steps: int
    hidden_size: int
    depth: int
    num_heads: int
    batch_size: int
    learning_rate: float
    label_dropout: float
    ema_decay: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("max_steps", "hidden_size", "depth", "num_heads", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"teach: {name} is {getattr(self, name)}; expected at least 1")
        if not self.learning_rate > 0:
            raise InputError(f"teach: learning_rate is {self.learning_rate}; expected more than 0")
        for name in ("label_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"teach: {name} is {getattr(self, name)}; expected 0 to 1, 1 excluded")


def digits_data() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 handwritten digits that scikit-learn ships (UCI, Alpaydin & Kaynak 1998).

    Returns:
        (images float32 [1797, 1, 8, 8], -1 paper to 1 ink; labels int64 [1797], 0 to 9).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images / 8 - 1).astype(np.float32)  # 17 grey levels, 0 to 16
    return images[:, None], bunch.target.astype(np.int64)


def cache_folder() -> Path:
    """Where pyard keeps what it computes once: $PYARD_CACHE, else $XDG_CACHE_HOME/pyard, else ~/.cache/pyard."""
    if own := os.environ.get("PYARD_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "pyard"


def digits_teacher(progress: bool = True) -> DiTTeacher:
    """The built-in teacher of the digits, trained into the cache folder (a minute or two) if it is not there yet."""
    return teach(cache_folder() / _CACHED_NAME, progress=progress)


def teach(
    out: str | Path,
    *,
    max_steps: int = 3000,
    hidden_size: int = 64,
    depth: int = 4,
    num_heads: int = 4,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    label_dropout: float = 0.1,
    ema_decay: float = 0.998,
    seed: int = 0,
    save_every: int = 500,
    progress: bool = True,
) -> DiTTeacher:
    """Train a class-conditional diffusion transformer on handwritten digits: the built-in teacher.

    It predicts eps in pixel space (1x8x8, patch 2) under the linear schedule of 1000 noise levels (Ho et al. 2020) and knows an
    unconditional label for classifier-free guidance. A run that was stopped resumes from its last checkpoint and ends with the
    same weights as one that was not; a finished one is loaded.

    Example: pyard teach --out runs/teacher

    Args:
        out: the teacher's folder; while it trains, checkpoints are in the folder of the same name + `.training`.
        max_steps: updates.
        hidden_size: D, width of the transformer.
        depth: L, its layers.
        num_heads: H, attention heads.
        batch_size: images an update.
        learning_rate: of AdamW; it warms up over 100 updates and falls to zero along a cosine.
        label_dropout: share of the images whose label is hidden, so that the network can be guided.
        ema_decay: of the average of the weights that is the result; it warms up as (1 + n) / (10 + n).
        seed: of the weights, the images' order and the noise.
        save_every: updates between checkpoints.
        progress: show a progress bar.

    Returns:
        The teacher with its averaged weights.

    Raises:
        InputError: a setting out of range, or `out` holds a teacher trained with other settings.
    """
    config = TeachConfig(
        max_steps=max_steps,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        batch_size=batch_size,
        learning_rate=learning_rate,
        label_dropout=label_dropout,
        ema_decay=ema_decay,
        seed=seed,
    )
    out = Path(out)
    working = out.with_name(out.name + ".training")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Processes of one run, or two runs on a machine, want the same teacher: one trains, the others wait and load.
    with FileLock(out.with_name(out.name + ".lock")):
        if out.exists():
            _check_same_settings(out, config)
            return DiTTeacher.from_pretrained(out)
        if working.exists():
            _check_same_settings(working, config)
        else:
            _write_settings(working, config)
        teacher = _train(config, working, save_every, progress)
        # The settings go in first, then the folder appears under its name: a teacher without settings is never seen.
        teacher.save_pretrained(working / "teacher")
        _write_settings(working / "teacher", config)
        (working / "teacher").rename(out)
        shutil.rmtree(working)
        return teacher


def _train(config: TeachConfig, working: Path, save_every: int, progress: bool) -> DiTTeacher:
    from pyard.training.state import Checkpoints, Stateful, ema_of

    schedule = NoiseSchedule()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = (torch.from_numpy(array) for array in digits_data())
    alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod).float()
    network = _new_network(config).to(device)
    ema = ema_of(network, config.ema_decay)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    checkpoints = Checkpoints(working / "checkpoints")
    parts: dict[str, Stateful] = {"model": network, "ema": ema, "optimizer": optimizer}
    begin = max(checkpoints.steps(), default=0)
    if begin:
        checkpoints.load(begin, parts)

    bar = tqdm(total=config.max_steps, initial=begin, desc="training the teacher", unit="step", disable=not progress)
    for step in range(begin + 1, config.max_steps + 1):
        # Drawn from the step's number alone, so that a resumed run sees what an unbroken one sees.
        random = torch.Generator().manual_seed(config.seed << 32 | step)
        index = torch.randint(len(images), (config.batch_size,), generator=random)
        level = torch.randint(schedule.num_train_timesteps, (config.batch_size,), generator=random)
        hidden = torch.rand(config.batch_size, generator=random) < config.label_dropout
        clean = images[index]  # [B, 1, 8, 8]
        noise = torch.randn(clean.shape, generator=random)
        weight = alphas_cumprod[level][:, None, None, None]
        noisy = weight.sqrt() * clean + (1 - weight).sqrt() * noise  # Ho et al. 2020, equation 4
        seen = labels[index].masked_fill(hidden, NUM_CLASSES)

        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))
        prediction = network(noisy.to(device), level.float().to(device), seen.to(device))
        loss = F.mse_loss(prediction, noise.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_parameters(network)
        if step % save_every == 0 and step < config.max_steps:
            checkpoints.save(step, parts)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        bar.update()
    bar.close()
    averaged = ema.module
    assert isinstance(averaged, DiT)
    return DiTTeacher(averaged, schedule)


def digits_network(hidden_size: int = 64, depth: int = 4, num_heads: int = 4) -> DiTConfig:
    """Sizes of a teacher of the digits; the defaults are the built-in one's."""
    return DiTConfig(
        input_size=8,
        in_channels=1,
        patch_size=2,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=NUM_CLASSES,
    )


def _new_network(config: TeachConfig) -> DiT:
    # Reproducible without touching the caller's random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = DiT(digits_network(config.hidden_size, config.depth, config.num_heads))
        # DiT's embeddings (std 0.02) suit its width of 384 and more. At 64 the conditioning would be so faint that a run of
        # a few thousand updates ends before the network has learnt its classes.
        nn.init.normal_(network.trunk.label_embed.weight)
        for layer in (network.trunk.time_embed.fc1, network.trunk.time_embed.fc2):
            nn.init.xavier_uniform_(layer.weight, gain=2.0)
    return network


def _write_settings(folder: Path, config: TeachConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (_SETTINGS_NAME + ".tmp")
    partial.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    partial.replace(folder / _SETTINGS_NAME)


def _check_same_settings(folder: Path, config: TeachConfig) -> None:
    file = folder / _SETTINGS_NAME
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} exists, but holds no training of the built-in teacher ({error}); use another out") from None
    wanted = dataclasses.asdict(config)
    differing = [f"{key}: {found.get(key)!r} there, {value!r} now" for key, value in wanted.items() if found.get(key) != value]
    if differing:
        raise InputError(
            f"{folder} holds a teacher of other settings ({'; '.join(differing)}); use another out, or remove it to start over"
        )
