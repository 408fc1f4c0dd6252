"""The built-in teacher: a small class-conditional DiT of scikit-learn's handwritten digits, real data without a download."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pyard.data.digits import NUM_CLASSES, digits_data
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.dit.config import DiTConfig
from pyard.storage.typed import checked
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.teachers.teaching import TeachBatch, TeachConfig, new_network, taught_once, teaching_device, train_network

# Raised whenever the defaults of `teach` or its arithmetic change, so that nobody's cached teacher is an older one.
_CACHED_NAME = "digits-teacher-1"


def cache_folder() -> Path:
    """Where pyard keeps what it computes once: $PYARD_CACHE, else $XDG_CACHE_HOME/pyard, else ~/.cache/pyard."""
    if own := os.environ.get("PYARD_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "pyard"
    try:
        return Path.home() / ".cache" / "pyard"
    except RuntimeError:  # a container's user without a home folder
        raise InputError("there is no home folder to keep the built-in teachers in; choose a folder: PYARD_CACHE=DIR") from None


def digits_teacher(progress: bool = True) -> NetworkTeacher:
    """The built-in teacher of the digits, trained into the cache folder (a minute or two) if it is not there yet."""
    return teach(cache_folder() / _CACHED_NAME, progress=progress)


@checked("teach")
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
) -> NetworkTeacher:
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
        batch_size: images per update.
        learning_rate: AdamW's learning rate; it warms up over 100 updates and falls to zero along a cosine.
        label_dropout: share of the images whose label is hidden, so that the network can be guided.
        ema_decay: decay of the average of the weights that is the result; at update n it is at most
            (1 + n) / (10 + n).
        seed: random seed of the weights, the images' order and the noise.
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
    return taught_once(
        out, config, lambda working: _train(config, working, save_every, progress), NetworkTeacher.from_pretrained
    )


def _train(config: TeachConfig, working: Path, save_every: int, progress: bool) -> NetworkTeacher:
    schedule = NoiseSchedule()
    images, labels = (torch.from_numpy(array) for array in digits_data())
    alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod).float()
    sizes = digits_network(config.hidden_size, config.depth, config.num_heads)

    def draw(random: torch.Generator) -> TeachBatch:
        index = torch.randint(len(images), (config.batch_size,), generator=random)
        level = torch.randint(schedule.num_train_timesteps, (config.batch_size,), generator=random)
        hidden = torch.rand(config.batch_size, generator=random) < config.label_dropout
        clean = images[index]  # [B, 1, 8, 8]
        noise = torch.randn(clean.shape, generator=random)
        weight = alphas_cumprod[level][:, None, None, None]
        noisy = weight.sqrt() * clean + (1 - weight).sqrt() * noise  # Ho et al. 2020, equation 4
        return TeachBatch(noisy, level.float(), labels[index].masked_fill(hidden, NUM_CLASSES), noise)

    network = new_network(sizes, config.seed).to(teaching_device())
    network = train_network(network, draw, config, working, save_every=save_every, progress=progress)
    return NetworkTeacher(network, schedule)


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
