"""Procedurally drawn 32 x 32 colour scenes of sixteen classes, as many distinct ones as one likes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pyard.diffusion.noise import check_labels, sample_generator

SIZE = 32
SHAPES = ("disc", "square", "triangle", "cross")
COLOURS = {"red": 0.0, "yellow": 0.15, "green": 0.36, "blue": 0.61}  # hues
CLASS_NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
NUM_CLASSES = len(CLASS_NAMES)

_STREAM = 4  # of `sample_generator`
_UNIFORMS = 23  # random numbers a scene


def scenes_data(
    seed: int, indices: Sequence[int] | np.ndarray, labels: Sequence[int] | np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw scenes; scene i of a seed depends on (seed, i) and its label alone.

    Args:
        seed: 0 to 2**64 - 1.
        indices: n scene indices.
        labels: n classes; None draws them uniformly.

    Returns:
        (images float32 [n, 3, 32, 32], -1 to 1; labels int64 [n], see `CLASS_NAMES`).
    """
    uniform = scene_uniforms(seed, indices)
    drawn = (uniform[:, 0] * NUM_CLASSES).astype(np.int64) if labels is None else check_labels(labels, NUM_CLASSES)
    return draw_scenes(torch.from_numpy(uniform).float(), torch.from_numpy(drawn)).numpy(), drawn


def scene_uniforms(seed: int, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """The random numbers of n scenes, 0 to 1: float64 [n, 23]; the first one is for the label."""
    return np.stack([sample_generator(seed, int(index), _STREAM).random(_UNIFORMS) for index in indices])


def draw_scenes(uniform: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Random numbers to pictures, on the tensors' device.

    A textured shape of any position, size, rotation and shade stands before a textured, duller gradient. Edges are one pixel
    wide, so that no pixel jumps while a shape moves.

    Args:
        uniform: float32 [B, 23], 0 to 1.
        labels: int64 [B].

    Returns:
        float32 [B, 3, 32, 32], -1 to 1.
    """
    u = iter(uniform[:, 1:].T[..., None, None])  # each [B, 1, 1]

    def between(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * next(u)

    # Lengths are in units of the picture's side, the origin is its middle.
    axis = (torch.arange(SIZE, device=uniform.device) + 0.5) / SIZE - 0.5
    rows, columns = axis[:, None], axis[None, :]

    radius = between(0.16, 0.34)
    x, y = columns - between(-0.25, 0.25), rows - between(-0.25, 0.25)  # [B, 32, 32]
    turn = between(0, 2 * math.pi)
    x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    shape = labels[:, None, None].div(len(COLOURS), rounding_mode="floor")
    coverage = (0.5 - _signed_distance(shape, x, y, radius) * SIZE).clamp(0, 1)

    hues = torch.tensor(list(COLOURS.values()), device=uniform.device)[labels % len(COLOURS), None, None]
    colour = _rgb(hues + between(-0.03, 0.03), between(0.7, 1), between(0.75, 1))  # [B, 3, 1, 1]
    shade = 1 - between(0.2, 0.6) * _texture(next(u), x, y, between(4, 7), between(0, 2 * math.pi))
    foreground = colour * shade[:, None]

    slope = between(0, 2 * math.pi)
    along, across = columns * slope.cos() + rows * slope.sin(), rows * slope.cos() - columns * slope.sin()
    ends = [_rgb(next(u), between(0, 0.35), between(0.1, 0.7)) for _ in range(2)]
    position = (along / math.sqrt(2) + 0.5)[:, None]  # 0 to 1 from corner to corner
    dim = 1 - between(0, 0.4) * _texture(next(u), along, across, between(2, 6), between(0, 2 * math.pi))
    background = (ends[0] + (ends[1] - ends[0]) * position) * dim[:, None]

    return 2 * (background + (foreground - background) * coverage[:, None]) - 1


def _signed_distance(shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """How far outside its shape every pixel is, negative within; all shapes have about the area of the disc: [B, 32, 32]."""

    def box(half_width: torch.Tensor, half_height: torch.Tensor) -> torch.Tensor:
        return torch.maximum(x.abs() - half_width, y.abs() - half_height)

    disc = torch.hypot(x, y) - radius
    side = radius * (math.sqrt(math.pi) / 2)
    # The three sides of a triangle are at the same distance from its middle.
    triangle = torch.maximum((math.sqrt(3) * x.abs() - y) / 2, y) - radius * 0.75
    long, short = radius * 1.1, radius * 0.42
    cross = torch.minimum(box(long, short), box(short, long))
    distance = disc
    for number, other in enumerate((box(side, side), triangle, cross), start=1):
        distance = torch.where(shape == number, other, distance)
    return distance


def _texture(
    kind: torch.Tensor, x: torch.Tensor, y: torch.Tensor, waves: torch.Tensor, phase: torch.Tensor
) -> torch.Tensor:  # [B, 32, 32], 0 to 1
    """Nothing for a third of the kinds, waves along x for a third, checks for the rest; `waves` of them a picture."""
    angle = 2 * math.pi * waves
    along = torch.sin(angle * x + phase)
    checks = along * torch.sin(angle * y + phase)
    return torch.where(kind < 1 / 3, 0.0, torch.where(kind < 2 / 3, along, checks) / 2 + 0.5)


def _rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:  # [B, 1, 1] each -> [B, 3, 1, 1]
    """HSV, each 0 to 1 (the hue is cyclic), to RGB."""
    offset = torch.tensor([5.0, 3.0, 1.0], device=hue.device)[:, None, None]
    k = (offset + 6 * hue[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))
