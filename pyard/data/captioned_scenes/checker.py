"""Pictures back to objects, and whether they are what a prompt asks for: no network, and no picture it was fitted to.

n pictures · P side in pixels · K connected regions in all pictures together
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyard.data.captioned_scenes.prompt import Prompt
from pyard.data.captioned_scenes.regions import grown, label_regions
from pyard.data.captioned_scenes.render import centroid_offset, coverage
from pyard.data.captioned_scenes.scene import SceneObject, SceneSetting, satisfies
from pyard.data.captioned_scenes.vocabulary import BACKGROUND, COLOURS, MAX_OBJECTS, SHAPES, SIZES
from pyard.errors import InputError

_CHUNK = 512  # pictures at a time, to bound memory
_SPECK = 0.2  # of the smallest object's area: regions below are overlooked
_FAINT = 0.3  # mean opacity of 3 x 3 background pixels from which on they count as something; an object's pixels have 0.5
_MISFIT = 0.25  # largest squared error of an object's outline, relative to the best fitting shape's own square
_OFF_COLOUR = 0.45  # largest distance of an object's mean colour from the nearest named one, RGB in -1 to 1
_ROUGH_BACKGROUND = 0.4  # largest root mean square distance of the background from its colour, all three channels
_TEMPLATES = tuple((shape, size) for shape in SHAPES for size in SIZES)
_BACKGROUND = 2 * np.array(BACKGROUND) - 1  # [3], -1 to 1
_COLOURS = 2 * np.array(tuple(COLOURS.values())) - 1 - _BACKGROUND  # [colours, 3], seen from the background


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Args:
        objects: those that were recognised.
        fault: why the picture is not a scene, whatever the prompt; None: it is one.
    """

    objects: tuple[SceneObject, ...]
    fault: str | None = None


def read_pictures(pictures: np.ndarray, setting: SceneSetting | None = None) -> list[Reading]:
    """Find the objects in pictures.

    A region that fits no shape or no colour, more than three regions, something faint, a background that is not plain, and NaN
    or infinite pixels are faults; so noise gets a fault. A picture without objects, which no prompt asks for, has an empty
    reading. Values outside -1 to 1 are clipped. Regions of less than a fifth of the smallest object's area are overlooked.

    Args:
        pictures: [n, 3, P, P], -1 to 1.
        setting: of the scenes; None: the default one. P is its size.

    Raises:
        InputError: pictures of another shape.
    """
    setting = setting or SceneSetting()
    expected = (3, setting.size, setting.size)
    if pictures.ndim != 4 or pictures.shape[1:] != expected:
        raise InputError(f"pictures of shape {tuple(pictures.shape)}; expected [n, {', '.join(map(str, expected))}]")
    readings: list[Reading] = []
    for start in range(0, len(pictures), _CHUNK):
        readings += _read(np.asarray(pictures[start : start + _CHUNK], dtype=np.float64), setting)
    return readings


def follow_prompts(pictures: np.ndarray, prompts: Sequence[Prompt], setting: SceneSetting | None = None) -> np.ndarray:
    """Whether each picture shows what its prompt asks for and nothing else: bool [n].

    Args:
        pictures: [n, 3, P, P], -1 to 1.
        prompts: n prompts; `parse_caption` makes them from texts.
        setting: of the scenes; None: the default one.

    Raises:
        InputError: pictures of another shape, or another number of prompts.
    """
    setting = setting or SceneSetting()
    readings = read_pictures(pictures, setting)
    if len(readings) != len(prompts):
        raise InputError(f"{len(readings)} pictures and {len(prompts)} prompts; expected the same number of both")
    return np.array([follows(reading, prompt, setting) for reading, prompt in zip(readings, prompts, strict=True)], dtype=bool)


def follows(reading: Reading, prompt: Prompt, setting: SceneSetting) -> bool:
    """Whether a picture that has been read shows what a prompt asks for and nothing else."""
    return reading.fault is None and satisfies(reading.objects, prompt, setting)


def _read(pictures: np.ndarray, setting: SceneSetting) -> list[Reading]:
    finite = np.isfinite(pictures).all(axis=(1, 2, 3))
    faults: list[str | None] = [None if good else "pixels that are not finite" for good in finite]
    shown = np.where(finite[:, None, None, None], pictures.clip(-1, 1), 0)
    away = shown.transpose(0, 2, 3, 1) - _BACKGROUND  # [n, P, P, 3]
    opacity = _opacity(away, _nearest_colour(away))
    regions = _without_specks(label_regions(opacity > 0.5), setting)
    surrounded = grown(regions)
    plain = surrounded == 0
    picture_of = _picture_of(regions)  # [K]

    for row in np.flatnonzero(_roughness(away, plain) > _ROUGH_BACKGROUND):
        faults[row] = faults[row] or "a background that is not plain"
    for row in np.flatnonzero(_strongest_haze(away, plain) > _FAINT):
        faults[row] = faults[row] or "something too faint to be an object"
    for row in np.flatnonzero(np.bincount(picture_of, minlength=len(pictures)) > MAX_OBJECTS):
        faults[row] = faults[row] or f"more than {MAX_OBJECTS} objects"

    found: list[list[SceneObject]] = [[] for _ in pictures]
    readable = np.flatnonzero([faults[row] is None for row in picture_of])
    if readable.size:
        rows = picture_of[readable]
        # An object's edge covers pixels around its region in part.
        numbers = (readable + 1)[:, None, None]
        colours, weights, off_colour = _colour_regions(away[rows], regions[rows] == numbers, surrounded[rows] == numbers)
        templates, misfit, x, y = _fit_shapes(weights, setting)
        for k, row in enumerate(rows):
            if misfit[k] > _MISFIT:
                faults[row] = "something that is none of the shapes"
            elif off_colour[k] > _OFF_COLOUR:
                faults[row] = "an object in none of the colours"
            else:
                shape, size = _TEMPLATES[templates[k]]
                found[row].append(SceneObject(shape, tuple(COLOURS)[colours[k]], size, float(x[k]), float(y[k])))
    return [Reading(tuple(objects), fault) for objects, fault in zip(found, faults, strict=True)]


def _nearest_colour(away: np.ndarray) -> np.ndarray:  # [..., 3] -> int64 [...]
    """The colour in whose direction from the background a pixel lies, however much of it the colour covers."""
    return (away @ (_COLOURS / np.linalg.norm(_COLOURS, axis=1, keepdims=True)).T).argmax(axis=-1)


def _opacity(away: np.ndarray, colours: np.ndarray) -> np.ndarray:  # [..., 3], [...] -> [...]
    """How much of a pixel its colour covers, from 0 to about 1."""
    direction = _COLOURS[colours]
    return (away * direction).sum(-1) / (direction * direction).sum(-1)


def _without_specks(regions: np.ndarray, setting: SceneSetting) -> np.ndarray:
    """Regions too small to be objects removed and the others numbered without gaps."""
    smallest = 0.5 * (setting.diameter("small") * setting.size) ** 2  # a triangle
    areas = np.bincount(regions.ravel())
    kept = areas >= _SPECK * smallest
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0)[regions]


def _picture_of(regions: np.ndarray) -> np.ndarray:  # [n, P, P] -> [K]
    rows = np.zeros(regions.max(initial=0) + 1, dtype=np.int64)
    rows[regions] = np.arange(len(regions))[:, None, None]
    return rows[1:]


def _roughness(away: np.ndarray, plain: np.ndarray) -> np.ndarray:  # [n, P, P, 3], [n, P, P] -> [n]
    """Root mean square distance of what is background from its colour; infinite where there is no background."""
    pixels = plain.sum(axis=(1, 2))
    squares = ((away * away).sum(-1) * plain).sum(axis=(1, 2))
    return np.where(pixels > 0, np.sqrt(squares / np.maximum(pixels, 1)), np.inf)


def _strongest_haze(away: np.ndarray, plain: np.ndarray) -> np.ndarray:  # [n, P, P, 3], [n, P, P] -> [n]
    """The largest mean opacity of 3 x 3 pixels of the background, over which noise averages out."""
    padded = np.pad(away * plain[..., None], ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    mean = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9
    return _opacity(mean, _nearest_colour(mean)).max(axis=(1, 2))


def _colour_regions(
    away: np.ndarray,  # [K, P, P, 3]
    inside: np.ndarray,  # bool [K, P, P], the region
    mine: np.ndarray,  # bool [K, P, P], with the pixels around it
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The colour of each region [K], how much of each pixel it covers [K, P, P], and how far off the colour is [K]."""
    colours = _nearest_colour((away * inside[..., None]).sum(axis=(1, 2)))
    weights = (_opacity(away, colours[:, None, None]) * mine).clip(0, 1)
    # Least squares: away = weight x tint.
    tint = (away * weights[..., None]).sum(axis=(1, 2)) / (weights * weights).sum(axis=(1, 2))[:, None]
    return colours, weights, np.linalg.norm(tint - _COLOURS[colours], axis=1)


def _fit_shapes(weights: np.ndarray, setting: SceneSetting) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which of `_TEMPLATES` fits best when their centres of mass agree, its relative squared error, and its centre's x and y.

    All are [K]; x and y are fractions of the picture's side.
    """
    pixels = np.arange(setting.size) + 0.5
    mass = weights.sum(axis=(1, 2))
    x, y = (weights.sum(axis=1) @ pixels) / mass, (weights.sum(axis=2) @ pixels) / mass
    errors, squares, centres = [], [], []
    for shape, size in _TEMPLATES:
        diameter = np.full(len(weights), setting.diameter(size) * setting.size)
        centre = y - centroid_offset(shape) * diameter
        cover = coverage(shape, x, centre, diameter, setting.size)
        errors.append(((weights - cover) ** 2).sum(axis=(1, 2)))
        squares.append((cover * cover).sum(axis=(1, 2)))
        centres.append(centre)
    best = np.argmin(errors, axis=0)
    error, square, centre = (np.choose(best, values) for values in (errors, squares, centres))
    return best, error / square, x / setting.size, centre.clip(0, setting.size) / setting.size
