"""How well pictures follow prompts of captioned scenes, and how close they are to the scenes themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pyard.data.captioned_scenes import (
    SPLITS,
    Prompt,
    Proportion,
    SceneSetting,
    adherence,
    follow_prompts,
    read_pictures,
    scene_batch,
)
from pyard.data.captioned_scenes.vocabulary import COLOURS, SHAPES
from pyard.evaluation.frechet import GaussianStatistics, frechet_distance

FEATURE_SIZE = 64
_TRAINING_STEPS = 500
_BATCH_SIZE = 128
# Seeds of scenes, apart from the small ones that teachers and students see.
_TRAINING_SEED, PROMPT_SEED, DATA_SEED = 2**62, 2**62 + 1, 2**62 + 2


@dataclass(frozen=True)
class PromptSet:
    """Prompts with what they mean, the split of combinations that each is of, and noise numbers 0, 1, ...

    Args:
        captions: texts.
        prompts: their meanings.
        splits: of `SPLITS`.
    """

    captions: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    splits: tuple[str, ...]

    @classmethod
    def draw(cls, count: int, setting: SceneSetting | None = None) -> PromptSet:
        """`count` prompts: half of combinations that training showed, a quarter of each that it never did."""
        sizes = {"train": count - 2 * (count // 4), "unseen pair": count // 4, "unseen relation": count // 4}
        captions: list[str] = []
        prompts: list[Prompt] = []
        splits: list[str] = []
        for number, split in enumerate(SPLITS):
            if sizes[split]:
                batch = scene_batch(PROMPT_SEED + number, range(sizes[split]), setting, split)
                captions += batch.captions
                prompts += batch.prompts
                splits += [split] * sizes[split]
        return cls(tuple(captions), tuple(prompts), tuple(splits))


@dataclass(frozen=True)
class TextQuality:
    """What one sampler does with the prompts.

    Args:
        name: of the sampler.
        passes: of the network for a picture.
        milliseconds: for a picture, in batches.
        by_category: adherence to prompts of combinations that training showed, by GenEval's categories, then `all`.
        by_split: adherence by split of combinations.
        frechet: distance to scenes in the features of `scene_features`.
        error: root mean square difference to the teacher's pictures from the same noise; None: the teacher itself.
    """

    name: str
    passes: int
    milliseconds: float
    by_category: dict[str, Proportion]
    by_split: dict[str, Proportion]
    frechet: float
    error: float | None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; proportions with their 95 % intervals."""

        def told(found: dict[str, Proportion]) -> dict[str, Any]:
            return {
                name: {"share": p.value, "interval": list(p.interval), "yes": p.yes, "total": p.total}
                for name, p in found.items()
            }

        return {**asdict(self), "by_category": told(self.by_category), "by_split": told(self.by_split)}


def judge(
    name: str,
    pictures: np.ndarray,
    prompts: PromptSet,
    *,
    passes: int,
    milliseconds: float,
    teacher: np.ndarray | None,
    setting: SceneSetting | None = None,
) -> TextQuality:
    """Measure pictures of prompts.

    Args:
        name: of the sampler.
        pictures: float32 [n, 3, P, P], about -1 to 1.
        prompts: the n prompts.
        passes, milliseconds: of a picture.
        teacher: its pictures from the same noise; None: these are the teacher's.
        setting: of the scenes.
    """
    followed = follow_prompts(pictures, prompts.prompts, setting)
    splits = np.array(prompts.splits)
    seen = splits == "train"
    kept = [prompt for prompt, is_seen in zip(prompts.prompts, seen, strict=True) if is_seen]
    by_split: dict[str, Proportion] = {
        split: Proportion(int(followed[splits == split].sum()), int((splits == split).sum()))
        for split in SPLITS
        if (splits == split).any()
    }
    features = scene_features(setting)
    return TextQuality(
        name,
        passes,
        milliseconds,
        adherence(followed[seen], kept),
        by_split,
        frechet_distance(GaussianStatistics.of(features(pictures[seen])), scene_statistics(setting)),
        None if teacher is None else float(np.sqrt(np.mean((pictures - teacher) ** 2))),
    )


@functools.cache
def scene_statistics(setting: SceneSetting | None = None, count: int = 4096) -> GaussianStatistics:
    """Of the features of drawn scenes, of the split `train`."""
    return GaussianStatistics.of(scene_features(setting)(scene_batch(DATA_SEED, range(count), setting).pictures))


@functools.cache
def scene_features(setting: SceneSetting | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A network's features of pictures, float32 [n, 3, P, P] to float64 [n, 64], trained from a fixed seed, once a process.

    The network learns how many objects of each shape and colour a picture has: half a minute on a CPU.
    """
    random = torch.Generator().manual_seed(0)
    side = (setting or SceneSetting()).size // 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * side * side, FEATURE_SIZE),
            nn.SiLU(),
        )
        network = nn.Sequential(body, nn.Linear(FEATURE_SIZE, len(SHAPES) * len(COLOURS)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=_TRAINING_STEPS)
    for step in range(_TRAINING_STEPS):
        batch = scene_batch(_TRAINING_SEED, range(step * _BATCH_SIZE, (step + 1) * _BATCH_SIZE), setting)
        # A little noise, so that features do not hang on edges that are sharper than any sample's.
        noisy = torch.from_numpy(batch.pictures) + 0.1 * torch.randn(batch.pictures.shape, generator=random)
        loss = F.mse_loss(network(noisy), _counts(batch.pictures, setting))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    body.eval().requires_grad_(False)

    def features(pictures: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(np.ascontiguousarray(pictures, dtype=np.float32)).split(1024)
        return torch.cat([body(part) for part in parts]).double().numpy()

    return features


def _counts(pictures: np.ndarray, setting: SceneSetting | None) -> torch.Tensor:
    """How many objects of each shape and colour: float32 [n, shapes x colours]."""
    shapes, colours = list(SHAPES), list(COLOURS)
    counts = torch.zeros(len(pictures), len(shapes) * len(colours))
    for row, reading in enumerate(read_pictures(pictures, setting)):
        for found in reading.objects:
            counts[row, shapes.index(found.shape) * len(colours) + colours.index(found.colour)] += 1
    return counts


def quality_table(rows: Sequence[TextQuality]) -> str:
    """The rows side by side, as text."""
    categories = list(rows[0].by_category)
    splits = [split for split in rows[0].by_split if split != "train"]
    header = ["sampler", "passes", "ms", *categories, *splits, "Fréchet", "error to teacher"]
    lines = [header]
    for row in rows:
        shares = [f"{100 * row.by_category[name].value:.1f} %" for name in categories]
        shares += [f"{100 * row.by_split[split].value:.1f} %" for split in splits]
        error = "" if row.error is None else f"{row.error:.3f}"
        lines.append([row.name, str(row.passes), f"{row.milliseconds:.1f}", *shares, f"{row.frechet:.3f}", error])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)
