"""Pictures: samples laid out as tiles, and what is taken of a picture file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")


def tiles(samples: np.ndarray, columns: int | None = None, pixel: int | None = None) -> np.ndarray:
    """Lay samples out as one picture, separated by thin lines.

    Args:
        samples: [n, C, H, W], -1 black to 1 white; 1 channel is grey, of more the first three are red, green and blue.
        columns: samples a row; None: about square.
        pixel: side of one sample's pixel in the picture; None: tiles of about 64.

    Returns:
        uint8 [rows, columns, 3].
    """
    count, channels, height, width = samples.shape
    columns = columns or max(1, round(count**0.5))
    pixel = pixel or max(1, 64 // height)
    grey = np.clip((samples[:, :3] + 1) * 127.5, 0, 255).round().astype(np.uint8)
    colour = np.repeat(grey[:, :1], 3, axis=1) if channels < 3 else grey
    colour = colour.repeat(pixel, axis=2).repeat(pixel, axis=3)
    gap = 2
    rows = -(-count // columns)
    tile_height, tile_width = height * pixel + gap, width * pixel + gap
    canvas = np.full((rows * tile_height + gap, columns * tile_width + gap, 3), 64, dtype=np.uint8)
    for i, picture in enumerate(colour):
        top, left = gap + i // columns * tile_height, gap + i % columns * tile_width
        canvas[top : top + height * pixel, left : left + width * pixel] = picture.transpose(1, 2, 0)
    return canvas


def save_tiles(samples: np.ndarray, path: Path, columns: int | None = None) -> None:
    """Write `tiles` of samples [n, C, H, W] as a PNG."""
    from PIL import Image

    Image.fromarray(tiles(samples, columns)).save(path)


def centre_crop(picture: Image.Image, size: int) -> np.ndarray:
    """The square in the middle as ADM crops (Dhariwal & Nichol 2021): uint8 [size, size] or [size, size, 3].

    Halved by a box filter while the shorter side is at least twice `size`, which keeps small pictures free of aliasing; then
    resized (bicubic) until it fits, then cut.
    """
    from PIL import Image

    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))
