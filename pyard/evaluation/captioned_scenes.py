"""How well pictures follow prompts of captioned scenes, and how close they are to the scenes themselves."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pyard.data.captioned_scenes import (
    SPLITS,
    Prompt,
    Proportion,
    SceneSetting,
    adherence,
    follow_prompts,
    scene_batch,
)
from pyard.evaluation.frechet import GaussianStatistics, frechet_distance
from pyard.evaluation.scene_features import ObjectCounter, object_counter

_COMPARED = 4096  # scenes that the Fréchet distance is to
# Seeds of scenes, apart from the small ones that teachers and students see, and from the one that features are trained with.
PROMPT_SEED, DATA_SEED = 2**62 + 1, 2**62 + 2


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
        frechet: distance to scenes of the split `train`.
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
    features: ObjectCounter | None = None,
) -> TextQuality:
    """Measure pictures of prompts.

    Args:
        name: of the sampler.
        pictures: float32 [n, 3, P, P], about -1 to 1.
        prompts: the n prompts.
        passes, milliseconds: of a picture.
        teacher: its pictures from the same noise; None: these are the teacher's.
        setting: of the scenes.
        features: that the Fréchet distance is taken in; None: of `object_counter`.
    """
    features = features or object_counter(setting)
    followed = follow_prompts(pictures, prompts.prompts, setting)
    splits = np.array(prompts.splits)
    seen = splits == "train"
    kept = [prompt for prompt, is_seen in zip(prompts.prompts, seen, strict=True) if is_seen]
    by_split: dict[str, Proportion] = {
        split: Proportion(int(followed[splits == split].sum()), int((splits == split).sum()))
        for split in SPLITS
        if (splits == split).any()
    }
    return TextQuality(
        name,
        passes,
        milliseconds,
        adherence(followed[seen], kept),
        by_split,
        frechet_distance(GaussianStatistics.of(features.features(pictures[seen])), scene_statistics(features, setting)),
        None if teacher is None else float(np.sqrt(np.mean((pictures - teacher) ** 2))),
    )


@functools.cache
def scene_statistics(
    features: ObjectCounter, setting: SceneSetting | None = None, count: int = _COMPARED
) -> GaussianStatistics:
    """Of the features of drawn scenes, of the split `train`."""
    return GaussianStatistics.of(features.features(scene_batch(DATA_SEED, range(count), setting).pictures))


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
