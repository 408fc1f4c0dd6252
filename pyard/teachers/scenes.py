"""A teacher for a GPU: procedurally drawn 32 x 32 colour scenes, as many distinct ones as one likes, and a DiT-S of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pyard.data.scenes import CLASS_NAMES, NUM_CLASSES, SIZE, draw_scenes, scene_uniforms
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.models.dit.config import DiTConfig
from pyard.storage.typed import checked
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.teachers.teaching import TeachBatch, TeachConfig, new_network, taught_once, teaching_device, train_network


@dataclass(frozen=True)
class ScenesConfig(TeachConfig):
    """Settings of `teach`."""

    patch_size: int


@checked("teach")
def teach(
    out: str | Path,
    *,
    max_steps: int = 8000,
    hidden_size: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    patch_size: int = 4,
    batch_size: int = 256,
    learning_rate: float = 4e-4,
    label_dropout: float = 0.1,
    ema_decay: float = 0.999,
    seed: int = 0,
    save_every: int = 2000,
    progress: bool = True,
) -> NetworkTeacher:
    """Train a class-conditional DiT on scenes, each of which it sees once.

    It predicts the velocity of a flow in pixel space (3x32x32) and knows an unconditional label for classifier-free guidance.
    The defaults, DiT-S/4's, are for a GPU, where it trains in bfloat16 autocast; a CPU takes days. A run that was stopped
    resumes from its last checkpoint; a finished one is loaded.

    Args:
        out: the teacher's folder.
        patch_size: P of the network.
        max_steps, hidden_size, depth, num_heads, batch_size, learning_rate, label_dropout, ema_decay, seed, save_every,
            progress: as in `pyard.teachers.digits.teach`.

    Returns:
        The teacher with its averaged weights.

    Raises:
        InputError: a setting out of range, or `out` holds a teacher trained with other settings.
    """
    config = ScenesConfig(
        max_steps=max_steps,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        batch_size=batch_size,
        learning_rate=learning_rate,
        label_dropout=label_dropout,
        ema_decay=ema_decay,
        seed=seed,
        patch_size=patch_size,
    )
    return taught_once(
        out, config, lambda working: _train(config, working, save_every, progress), NetworkTeacher.from_pretrained
    )


def _train(config: ScenesConfig, working: Path, save_every: int, progress: bool) -> NetworkTeacher:
    device = teaching_device()
    sizes = DiTConfig(
        input_size=SIZE,
        in_channels=3,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=NUM_CLASSES,
        time_scale=1000.0,  # the time embedding tells whole numbers apart
    )
    batch = config.batch_size

    def draw(random: torch.Generator) -> TeachBatch:
        # Scenes of a seed that is a function of the update; what is large is drawn on the device.
        number = int(torch.randint(2**62, (), generator=random))
        on_device = torch.Generator(device).manual_seed(number)
        uniform = torch.from_numpy(scene_uniforms(number, range(batch))).float().to(device)
        labels = (uniform[:, 0] * NUM_CLASSES).long().clamp(max=NUM_CLASSES - 1)
        clean = draw_scenes(uniform, labels)
        noise = torch.randn(clean.shape, generator=on_device, device=device)
        times = torch.rand(batch, generator=on_device, device=device)
        hidden = torch.rand(batch, generator=on_device, device=device) < config.label_dropout
        noisy = torch.lerp(clean, noise, times[:, None, None, None])
        return TeachBatch(noisy, times, labels.masked_fill(hidden, NUM_CLASSES), noise - clean)

    network = train_network(
        new_network(sizes, config.seed).to(device),
        draw,
        config,
        working,
        save_every=save_every,
        progress=progress,
        mixed_precision=device.type == "cuda",
    )
    return NetworkTeacher(network, NoiseSchedule(kind="flow", prediction="velocity"), class_names=CLASS_NAMES)
