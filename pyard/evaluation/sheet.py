"""A side-by-side sheet: prompts down, the teacher and its students across."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyard.data.pictures import save_picture
from pyard.evaluation.pixels import to_bytes

if TYPE_CHECKING:
    from PIL import Image

_TILE, _TEXT_WIDTH, _HEADER, _GAP, _FONT = 256, 224, 28, 4, 13


def save_sheet(path: Path, prompts: Sequence[str], columns: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Write a sheet as a PNG.

    Args:
        path: of the file.
        prompts: of the rows, from the top.
        columns: by name, the picture of each prompt: [C, H, W], uint8 or float from -1 to 1; the longer side becomes 256
            pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    tiles = {name: [_tile(picture) for picture in pictures] for name, pictures in columns.items()}
    wide = max(tile.width for row in tiles.values() for tile in row)
    high = max(tile.height for row in tiles.values() for tile in row)
    size = (_TEXT_WIDTH + len(tiles) * (wide + _GAP), _HEADER + len(prompts) * (high + _GAP))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for row, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, width=30, max_lines=high // (_FONT + 4), placeholder=" ...")
        draw.multiline_text((_GAP, _HEADER + row * (high + _GAP)), "\n".join(lines), fill="black", font=font)
    for column, (name, pictures) in enumerate(tiles.items()):
        left = _TEXT_WIDTH + column * (wide + _GAP)
        shown = name if len(name) <= wide // 7 else "..." + name[-(wide // 7 - 3) :]  # the end of a path tells runs apart
        draw.text((left, _GAP), shown, fill="black", font=font)
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (left, _HEADER + row * (high + _GAP)))
    save_picture(sheet, path)


def _tile(picture: np.ndarray) -> Image.Image:  # [C, H, W]
    from PIL import Image

    pixels = to_bytes(picture[None], "rounded")[0, :3]
    if len(pixels) < 3:
        pixels = np.repeat(pixels[:1], 3, axis=0)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    scale = _TILE / max(image.size)
    resample = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)
