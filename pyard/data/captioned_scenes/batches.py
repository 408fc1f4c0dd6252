"""Captioned pictures by the batch, as many as one likes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pyard.data.captioned_scenes.draw import draw_scene
from pyard.data.captioned_scenes.prompt import Prompt
from pyard.data.captioned_scenes.render import render_scenes
from pyard.data.captioned_scenes.scene import SceneSetting
from pyard.data.captioned_scenes.vocabulary import Split
from pyard.errors import InputError


@dataclass(frozen=True)
class SceneBatch:
    """Pictures with what they show.

    Args:
        pictures: float32 [B, 3, P, P], -1 to 1.
        captions: B texts.
        prompts: their B meanings.
    """

    pictures: np.ndarray
    captions: tuple[str, ...]
    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        if not self.pictures.shape[:1] == (len(self.captions),) == (len(self.prompts),):
            raise InputError(
                f"{self.pictures.shape} pictures, {len(self.captions)} captions and {len(self.prompts)} prompts; "
                "expected the same number of each"
            )


def scene_batch(
    seed: int, indices: Sequence[int] | np.ndarray, setting: SceneSetting | None = None, split: Split = "train"
) -> SceneBatch:
    """The scenes of these indices, each a function of (seed, index) alone.

    Args:
        seed: 0 to 2**64 - 1.
        indices: at least one; 0 to 2**64 - 1.
        setting: None: the default one.
        split: of `SPLITS`.
    """
    scenes = [draw_scene(seed, int(index), setting, split=split) for index in indices]
    return SceneBatch(
        render_scenes(scenes), tuple(scene.caption for scene in scenes), tuple(scene.prompt for scene in scenes)
    )  # fmt: skip


def scene_batches(
    seed: int, batch_size: int, setting: SceneSetting | None = None, split: Split = "train", start: int = 0
) -> Iterator[SceneBatch]:
    """Batches without end; no scene comes twice.

    Args:
        seed, setting, split: as in `scene_batch`.
        batch_size: B; batch b has the scenes b * B to b * B + B - 1.
        start: number of the first batch, to go on where another iterator stopped.
    """
    if batch_size < 1 or start < 0:
        raise InputError(f"batches of {batch_size} scenes from number {start}; expected at least 1, from 0")
    while True:
        yield scene_batch(seed, range(start * batch_size, (start + 1) * batch_size), setting, split)
        start += 1
