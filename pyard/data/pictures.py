"""Pictures: samples laid out as tiles, and what is taken of a picture file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyard.errors import InputError
from pyard.storage.files import new_file
from pyard.storage.reading import reading, regular_file

if TYPE_CHECKING:
    from PIL import Image

# What pictures of data sets have at most, and how much longer than wide they are; Pillow itself only warns of twice as many.
MOST_PIXELS = 2**27
_MOST_STRETCHED = 100
# Whatever they are called; of others some are programs, such as PostScript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
PICTURE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


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
    save_picture(tiles(samples, columns), path)


def save_picture(picture: np.ndarray | Image.Image, path: Path) -> None:
    """Write a picture, uint8 [height, width, 3], in the format of the name's ending; see `new_file`.

    Raises:
        InputError: an ending that stands for no format; the disk is full.
    """
    from PIL import Image

    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise InputError(f"{path}: cannot write pictures in this format; expected a name that ends in .png or .jpg")
    with new_file(path) as partial:
        image.save(partial, format=kind)


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


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder and its sub-folders, sorted; folders that are links are entered unless they form a circle.

    Hidden files and folders are left out: macOS and notebooks keep notes and copies of pictures there.
    """
    return sorted(file for file in _walk(folder, ()) if file.suffix.lower() in PICTURE_SUFFIXES)


def require_pictures_alone(folder: Path) -> None:
    """Raises InputError if a folder has files and none is a picture: it would count as empty."""
    files = list(_walk(folder, ()))
    if files and not any(file.suffix.lower() in PICTURE_SUFFIXES for file in files):
        raise InputError(
            f"{folder} has {len(files)} files, such as {min(files).name}, and no pictures ({', '.join(PICTURE_SUFFIXES)}); "
            "convert them, or remove them"
        )


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    here = os.path.realpath(folder)
    if here in above:
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        with reading(entry.path):  # a link to itself
            is_folder = entry.is_dir()
        if is_folder:
            yield from _walk(Path(entry.path), (*above, here))
        else:
            yield Path(entry.path)


def read_picture(file: Path, size: int, channels: int) -> np.ndarray:
    """A picture's middle square (`centre_crop`), of 16 bits as well: uint8 [size, size, channels], 1 or 3 channels.

    Raises:
        InputError: it cannot be read, or its numbers have no known range.
    """
    from PIL import Image

    with (
        regular_file(file) as opened,
        reading(file, "", Image.DecompressionBombError, SyntaxError, what="as a picture"),
        Image.open(opened, "r", _FORMATS) as picture,
    ):
        low, high = sorted(picture.size)
        if low < 1 or low * high > MOST_PIXELS or high > _MOST_STRETCHED * low:
            raise InputError(f"{file}: {picture.width} x {picture.height} pixels; expected at most {MOST_PIXELS} in total")
        crop = centre_crop(_eight_bits(picture, file).convert("L" if channels == 1 else "RGB"), size)
    return crop.reshape(size, size, channels)


def _eight_bits(picture: Image.Image, file: Path) -> Image.Image:
    """Pillow clips what has more than 8 bits; here 65535 is white."""
    from PIL import Image

    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture)
    # 32 bits that hold no more than 8 do not say whether 255 or 65535 is white.
    is_unclear = picture.mode == "I" and picture.format != "PNG" and 0 < values.max(initial=0) <= 255
    if picture.mode == "F" or is_unclear or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise InputError(
            f"{file} holds numbers of the kind {picture.mode!r} from {values.min():g} to {values.max():g}; expected 8 or 16 "
            "bits a channel"
        )
    return Image.fromarray((values / 257).round().astype(np.uint8))
