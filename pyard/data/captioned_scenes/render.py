"""Scenes to pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pyard.data.captioned_scenes.scene import Scene, SceneObject, SceneSetting
from pyard.data.captioned_scenes.vocabulary import BACKGROUND, COLOURS, SHAPES
from pyard.errors import InputError

_ARM = 0.36  # width of a cross's arms, in diameters


def render_scenes(scenes: Sequence[Scene]) -> np.ndarray:
    """Draw scenes of one setting; edges are antialiased.

    Returns:
        float32 [n, 3, P, P], -1 to 1; P is the setting's size.

    Raises:
        InputError: no scenes, or scenes of several settings.
    """
    settings = {scene.setting for scene in scenes}
    if len(settings) != 1:
        raise InputError(f"{len(scenes)} scenes of {len(settings)} settings; expected scenes of one setting")
    return render_objects([scene.objects for scene in scenes], settings.pop())


def render_objects(objects: Sequence[Sequence[SceneObject]], setting: SceneSetting) -> np.ndarray:
    """Draw the objects of n pictures, later ones over earlier ones.

    Returns:
        float32 [n, 3, P, P], -1 to 1.
    """
    pictures = np.empty((len(objects), 3, setting.size, setting.size))
    pictures[:] = np.array(BACKGROUND)[:, None, None]
    for place in range(max(map(len, objects), default=0)):
        for shape in SHAPES:
            rows = [row for row, found in enumerate(objects) if len(found) > place and found[place].shape == shape]
            if rows:
                chosen = [objects[row][place] for row in rows]
                x, y, diameter = np.array([(found.x, found.y, setting.diameter(found.size)) for found in chosen]).T
                cover = coverage(shape, x * setting.size, y * setting.size, diameter * setting.size, setting.size)
                colour = np.array([COLOURS[found.colour] for found in chosen])[:, :, None, None]
                pictures[rows] += cover[:, None] * (colour - pictures[rows])
    return (2 * pictures - 1).astype(np.float32)


def coverage(shape: str, x: np.ndarray, y: np.ndarray, diameter: np.ndarray, size: int) -> np.ndarray:
    """How much of each pixel a shape covers.

    Exact for squares and crosses; for the others the distance from the edge, from half a pixel outside to half a pixel inside.

    Args:
        shape: of `SHAPES`.
        x, y: centres of the bounding boxes, in pixels from the top left, [n].
        diameter: width and height of the bounding boxes, in pixels, [n].
        size: side of the picture in pixels.

    Returns:
        float64 [n, size, size], 0 to 1.
    """
    pixels = np.arange(size) + 0.5
    across, down = pixels - x[:, None], pixels - y[:, None]  # [n, size]
    half = diameter[:, None] / 2

    def overlap(offset: np.ndarray, half_width: np.ndarray) -> np.ndarray:
        """How much of each pixel lies within half_width of the centre, along one axis."""
        ends = np.minimum(offset + 0.5, half_width) - np.maximum(offset - 0.5, -half_width)
        return np.clip(ends, 0, 1)

    def box(half_width: np.ndarray, half_height: np.ndarray) -> np.ndarray:
        return overlap(down, half_height)[:, :, None] * overlap(across, half_width)[:, None, :]

    if shape == "square":
        return box(half, half)
    if shape == "cross":
        return box(half, half * _ARM) + box(half * _ARM, half) - box(half * _ARM, half * _ARM)
    across, down, half = across[:, None, :], down[:, :, None], half[:, :, None]
    if shape == "disc":
        distance = np.sqrt(across * across + down * down) - half
    else:  # a triangle that stands on its base
        slanted = (2 * np.abs(across) - (down + half)) / math.sqrt(5)
        distance = np.maximum(slanted, down - half)
    return np.clip(0.5 - distance, 0, 1)


def centroid_offset(shape: str) -> float:
    """How far below the middle of its bounding box a shape's centre of mass is, in diameters."""
    return 1 / 6 if shape == "triangle" else 0.0
