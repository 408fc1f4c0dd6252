"""A picture of captioned scenes: prompts down, samplers across, a line of facts below each name."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pyard.storage.files import new_file

_TILE, _GAP, _LEFT, _TOP, _MARGIN = 128, 10, 250, 76, 16  # pixels
_INK, _QUIET = "#1d1f27", "#6b6f7b"


def draw_prompts(
    prompts: Mapping[int, str], pictures: Mapping[str, np.ndarray], facts: Mapping[str, str], path: Path
) -> None:  # fmt: skip
    """Write the picture.

    Args:
        prompts: number of each prompt in the pictures, and its text.
        pictures: by sampler, float32 [n, 3, P, P], about -1 to 1.
        facts: of each sampler, a short line.
        path: the PNG.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = len(pictures)
    width = _LEFT + columns * (_TILE + _GAP) + _MARGIN
    height = _TOP + len(prompts) * (_TILE + _GAP) + _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    for column, name in enumerate(pictures):
        left = _LEFT + column * (_TILE + _GAP)
        title = "\n".join(textwrap.wrap(name, 17)[:2])
        pen.multiline_text((left, 12), title, fill=_INK, font=bold, spacing=2)
        pen.text((left, _TOP - 20), facts[name], fill=_QUIET, font=plain)
    for line, (number, text) in enumerate(prompts.items()):
        top = _TOP + line * (_TILE + _GAP)
        wrapped = "\n".join(textwrap.wrap(text, 30))
        pen.multiline_text((_MARGIN, top + _TILE / 2), wrapped, fill=_INK, font=bold, spacing=4, anchor="lm")
        for column, drawn in enumerate(pictures.values()):
            pixels = np.clip((drawn[number] + 1) * 127.5, 0, 255).round().astype(np.uint8).transpose(1, 2, 0)
            tile = Image.fromarray(pixels).resize((_TILE, _TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (_LEFT + column * (_TILE + _GAP), top))
    with new_file(path) as partial:
        sheet.save(partial, format="PNG")
