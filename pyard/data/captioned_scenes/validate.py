"""How far the checker can be trusted, measured on drawn pictures: right pictures, noisy ones, wrong captions and garbage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pyard.data.captioned_scenes.changes import CHANGES, changed_prompts
from pyard.data.captioned_scenes.checker import follow_prompts, follows, read_pictures
from pyard.data.captioned_scenes.draw import draw_scene
from pyard.data.captioned_scenes.proportions import Proportion
from pyard.data.captioned_scenes.render import render_objects, render_scenes
from pyard.data.captioned_scenes.scene import Scene, SceneObject, SceneSetting
from pyard.data.captioned_scenes.vocabulary import CATEGORIES, COLOURS, SHAPES

_RIGHT, _NOISY, _WRONG = 0.995, 0.99, 0.99  # what the checker must reach
_NOISE = 0.05  # standard deviation, in -1 to 1


@dataclass(frozen=True)
class Finding:
    """One line of the validation.

    Args:
        name: what was tried.
        correct: how often the checker's answer was right.
        required: the least proportion that will do.
    """

    name: str
    correct: Proportion
    required: float

    @property
    def reached(self) -> bool:
        """Whether it will do."""
        return self.correct.value >= self.required


def validate_checker(setting: SceneSetting | None = None, count: int = 2000, seed: int = 0) -> list[Finding]:
    """Try the checker on drawn pictures.

    Args:
        setting: of the scenes; None: the default one.
        count: scenes of every category.
        seed: of scenes and noise.

    Returns:
        Yes to right pictures, by category, without and with noise; no to captions with one thing changed, by kind of change;
        no to pictures with an object more or fewer, and to garbage.
    """
    setting = setting or SceneSetting()
    random = np.random.default_rng(seed)
    findings, everything = [], []
    for category in CATEGORIES:
        scenes = [draw_scene(seed, index, setting, category=category) for index in range(count)]
        everything += scenes
        prompts, pictures = [scene.prompt for scene in scenes], render_scenes(scenes)
        noisy = pictures + _NOISE * random.standard_normal(pictures.shape)
        findings.append(_finding(f"yes to {category}", follow_prompts(pictures, prompts, setting), _RIGHT))
        findings.append(_finding(f"yes to {category}, noise {_NOISE}", follow_prompts(noisy, prompts, setting), _NOISY))

    pictures = render_scenes(everything)
    readings = read_pictures(pictures, setting)
    for kind in CHANGES:
        wrong = [
            not follows(reading, changed, setting)
            for scene, reading in zip(everything, readings, strict=True)
            for changed in changed_prompts(scene.prompt, kind)
        ]
        findings.append(_finding(f"no to another {kind}", np.array(wrong), _WRONG))

    prompts = [scene.prompt for scene in everything]
    altered: dict[str, Callable[[Scene, int], tuple[SceneObject, ...]]] = {
        "an extra object": with_extra_object,
        "a missing object": lambda scene, number: scene.objects[1:],
    }
    for name, alter in altered.items():
        wrong_pictures = render_objects([alter(scene, number) for number, scene in enumerate(everything)], setting)
        findings.append(_finding(f"no to {name}", ~follow_prompts(wrong_pictures, prompts, setting), _WRONG))
    for name, garbage in garbage_pictures(pictures, random).items():
        findings.append(_finding(f"no to {name}", ~follow_prompts(garbage, prompts, setting), _WRONG))
    return findings


def with_extra_object(scene: Scene, number: int) -> tuple[SceneObject, ...]:
    """A scene's objects and a small one in one of the free cells; kinds and cells go round with `number`."""
    setting = scene.setting
    taken = {(int(found.y * setting.cells), int(found.x * setting.cells)) for found in scene.objects}
    free = [(row, column) for row in range(setting.cells) for column in range(setting.cells) if (row, column) not in taken]
    row, column = free[number % len(free)]
    # Every other one is as an object that is there, which is what a network that repeats itself draws.
    kind = (scene.objects[0].shape, scene.objects[0].colour)
    if number % 2:
        kind = SHAPES[number % len(SHAPES)], list(COLOURS)[number % len(COLOURS)]
    x, y = (setting.coordinate(place, "small", 0.5) for place in (column, row))
    return (*scene.objects, SceneObject(*kind, "small", x, y))


def garbage_pictures(pictures: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Arrays of the pictures' shape that show no scene, by name."""
    squeezed = pictures.reshape(*pictures.shape[:2], -1)
    background = render_objects([()] * len(pictures), SceneSetting(pictures.shape[-1]))
    not_finite = pictures.copy()
    not_finite[:, 1, 3, 5] = np.nan
    return {
        "Gaussian noise": random.standard_normal(pictures.shape),
        "uniform noise": random.uniform(-1, 1, pictures.shape),
        "one random colour": np.broadcast_to(random.uniform(-1, 1, (*pictures.shape[:2], 1, 1)), pictures.shape),
        "the plain background": background,
        "a faded picture": background + 0.4 * (pictures - background),
        "shuffled pixels": random.permuted(squeezed, axis=2).reshape(pictures.shape),
        "a NaN": not_finite,
    }


def findings_table(findings: Sequence[Finding]) -> str:
    """The findings as lines of Markdown."""
    rows = [
        f"| {finding.name} | {finding.correct} | {finding.correct.total} | {100 * finding.required:.1f} % "
        f"| {'yes' if finding.reached else '**no**'} |"
        for finding in findings
    ]
    return "\n".join(
        ["| the checker's answer | correct (95 % interval) | of | required | reached |", "|---|---|---|---|---|", *rows]
    )


def _finding(name: str, correct: np.ndarray, required: float) -> Finding:
    return Finding(name, Proportion(int(correct.sum()), correct.size), required)
