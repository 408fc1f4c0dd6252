"""Real images of the adversarial stage: a folder of pictures, cropped as ADM does, encoded once and kept in shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file

from pyard.data.pictures import PICTURE_SUFFIXES, centre_crop
from pyard.errors import InputError
from pyard.storage.files import new_file, write_text

if TYPE_CHECKING:
    from pyard.models.codec import Codec

SHARD_IMAGES = 512
_ABOUT_NAME = "images.json"


def is_image_folder(path: Path) -> bool:
    """Whether a folder has sub-folders with pictures: one class each, in the order of their names, as ImageNet is unpacked."""
    return path.is_dir() and next(_pictures(path), None) is not None


def cached_images(
    path: Path,
    cache: Path,
    sample_shape: tuple[int, ...],
    codec: Codec | None,
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Path:
    """Encode the pictures of a folder into shards that `RealData` reads; what is there already is kept.

    Each shard appears complete or not at all, so a stopped run goes on where it was; processes share the shards among them,
    and each must have returned before any of them reads.

    Args:
        path: sub-folders of pictures, one a class.
        cache: folder of the shards; of one folder of pictures, one size and one VAE.
        sample_shape: that the student draws; its pictures have to be square, as the crop is.
        codec: the VAE of a student of latents, whose posteriors are kept, of the mirror image as well; None: pixels, -1 to 1.
        device: where the VAE computes.
        rank: which of world_size processes this is.
        world_size: how many share the work.

    Returns:
        `cache`.

    Raises:
        InputError: pictures that cannot be read, channels that do not fit, or a cache of something else.
    """
    files = list(_pictures(path))
    shape = tuple(sample_shape) if codec is None else codec.image_shape(sample_shape)
    channels, size = shape[0], shape[-1]
    if codec is None and (len(shape) != 3 or channels not in (1, 3)):
        raise InputError(
            f"real data {path}: pictures for a student of samples {shape}; latents need a VAE: give a teacher's folder "
            "with vae/ in it (load_teacher(..., vae=...).save_pretrained writes one)"
        )
    if shape[1] != size:
        raise InputError(f"real data {path}: pictures are cropped to squares; this student draws {shape[1]} x {size}")
    vae = None if codec is None else codec.fingerprint()
    about = {"images": _digest(path, files), "size": size, "channels": channels, "vae": vae}
    file = cache / _ABOUT_NAME
    if file.exists() and json.loads(file.read_text()) != about:
        raise InputError(
            f"{cache} holds other images than {path} in {size} x {size}: found {json.loads(file.read_text())}, expected "
            f"{about}; remove it, or give another real_cache"
        )
    cache.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_text(file, json.dumps(about))
    for number, first in enumerate(range(0, len(files), SHARD_IMAGES)):
        shard = cache / f"{number:06d}.safetensors"
        if number % world_size != rank or shard.exists():
            continue
        part = files[first : first + SHARD_IMAGES]
        images = torch.stack([_read(picture, size, channels) for picture, _ in part])
        tensors = {"labels": torch.tensor([label for _, label in part])}
        if codec is None:
            tensors["images"] = images
        else:
            for mirrored, names in ((False, ("images", "std")), (True, ("flipped", "flipped_std"))):
                posterior = codec.posterior((images.flip(-1) if mirrored else images).to(device), sample_shape=sample_shape)
                tensors |= {name: part.half().cpu().contiguous() for name, part in zip(names, posterior, strict=True)}
        with new_file(shard) as partial:
            save_file(tensors, partial)
    return cache


def _pictures(path: Path) -> Iterator[tuple[Path, int]]:
    """Pictures and labels, sorted by class and name."""
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for label, folder in enumerate(classes):
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in PICTURE_SUFFIXES:
                yield file, label


def _digest(path: Path, files: list[tuple[Path, int]]) -> str:
    """sha256 of names and sizes: enough to notice other pictures without reading them."""
    digest = hashlib.sha256()
    for file, label in files:
        digest.update(f"{file.relative_to(path)} {file.stat().st_size} {label}\n".encode())
    return digest.hexdigest()


def _read(file: Path, size: int, channels: int) -> torch.Tensor:  # [C, size, size], -1 to 1
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            pixels = centre_crop(picture.convert("L" if channels == 1 else "RGB"), size)
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"real data: {file} cannot be read as a picture: {error}") from None
    return torch.from_numpy(pixels.reshape(size, size, channels).transpose(2, 0, 1) / np.float32(127.5) - 1)
