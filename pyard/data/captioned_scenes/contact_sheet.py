"""A picture of pictures with their captions, to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyard.data.pictures import save_picture
from pyard.errors import InputError

_TILE = 192  # pixels
_TEXT_HEIGHT = 44
_MARGIN = 6


def save_contact_sheet(pictures: np.ndarray, captions: Sequence[str], path: str | Path, columns: int = 8) -> None:
    """Write pictures as one PNG, enlarged without smoothing, each above its caption.

    Args:
        pictures: [n, 3, P, P], -1 to 1.
        captions: n texts.
        path: the PNG.
        columns: pictures in a row.
    """
    from PIL import Image, ImageDraw, ImageFont

    if pictures.ndim != 4 or pictures.shape[1] != 3 or len(pictures) != len(captions):
        raise InputError(
            f"contact sheet: pictures {tuple(pictures.shape)} with {len(captions)} captions; expected [n, 3, P, P] with n"
        )
    rows = -(-len(captions) // columns)
    width, height = _TILE + _MARGIN, _TILE + _TEXT_HEIGHT
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    pixels = np.clip((pictures + 1) * 127.5, 0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    for number, (tile, text) in enumerate(zip(pixels, captions, strict=True)):
        left, top = _MARGIN + number % columns * width, _MARGIN + number // columns * height
        sheet.paste(Image.fromarray(tile).resize((_TILE, _TILE), Image.Resampling.NEAREST), (left, top))
        lines = textwrap.wrap(text, 28)[: _TEXT_HEIGHT // 14]
        pen.multiline_text((left, top + _TILE + 1), "\n".join(lines), fill="black", font=font, spacing=0)
    save_picture(sheet, Path(path))
