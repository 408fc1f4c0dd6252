"""Real images of the adversarial stage: a folder of pictures, cropped as ADM does, encoded once and kept in shards."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from pyard.conditions import ClassConditions, Conditions
from pyard.data.pictures import picture_files, read_picture, require_pictures_alone
from pyard.errors import InputError
from pyard.storage.files import new_file, write_text
from pyard.storage.reading import read_object

if TYPE_CHECKING:
    from pyard.models.codec import Codec

SHARD_IMAGES = 512
_ABOUT_NAME = "images.json"


def is_image_folder(path: Path) -> bool:
    """Whether a folder has sub-folders with pictures: one class each, in the order of their names, as ImageNet is unpacked."""
    return path.is_dir() and any(picture_files(folder) for folder in _sub_folders(path))


def cached_images(
    path: Path,
    cache: Path,
    sample_shape: tuple[int, ...],
    codec: Codec | None,
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    conditions: Conditions | None = None,
    progress: bool = False,
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
        conditions: of the student, whose classes the folders are; None: as many as there are folders.
        progress: show a progress bar, and print which folder is which class.

    Returns:
        `cache`.

    Raises:
        InputError: pictures that cannot be read, channels that do not fit, folders that are not the student's classes, or a
            cache of something else.
    """
    folders = class_folders(path, conditions if isinstance(conditions, ClassConditions) else None)
    for _, folder in folders:
        require_pictures_alone(folder)
    files = [(file, label) for label, folder in folders for file in picture_files(folder)]
    if progress and rank == 0:
        names = conditions.names if isinstance(conditions, ClassConditions) else None
        print(f"{path}: {len(files)} pictures; class and folder: {_map(folders, names)}", file=sys.stderr)
    return cached_pictures(
        path, files, cache, sample_shape, codec, device=device, rank=rank, world_size=world_size, progress=progress
    )


def cached_pictures(
    path: Path,
    files: Sequence[tuple[Path, int]],
    cache: Path,
    sample_shape: tuple[int, ...],
    codec: Codec | None,
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> Path:
    """`cached_images` of given files in a folder, each with the number of what it shows."""
    shape = tuple(sample_shape) if codec is None else codec.image_shape(sample_shape)
    channels, size = shape[0], shape[-1]
    if codec is None and (len(shape) != 3 or channels not in (1, 3)):
        raise InputError(
            f"real data {path}: found pictures, but the student's samples have shape {shape}; encoding pictures as latents "
            "needs a VAE: give a teacher's folder with vae/ in it (`pyard convert ... --vae FOLDER` writes one)"
        )
    if shape[1] != size:
        raise InputError(f"real data {path}: pictures are cropped to squares; this student draws {shape[1]} x {size}")
    vae = None if codec is None else codec.fingerprint()
    about = {"images": _digest(path, files), "size": size, "channels": channels, "vae": vae}
    file = cache / _ABOUT_NAME
    there = read_object(file, "the description of a cache of pictures") if file.exists() else about
    if there != about:
        raise InputError(
            f"{cache} does not hold the images of {path} at {size} x {size}: found {there}, expected {about}; remove it, or "
            "give another real_cache"
        )
    cache.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_text(file, json.dumps(about))
    shards = [cache / f"{number:06d}.safetensors" for number in range(-(-len(files) // SHARD_IMAGES))]
    mine = [number for number, shard in enumerate(shards) if number % world_size == rank and not shard.exists()]
    parts = {number: files[number * SHARD_IMAGES : (number + 1) * SHARD_IMAGES] for number in mine}
    bar = tqdm(
        total=sum(map(len, parts.values())), desc="encoding pictures", unit=" pictures", disable=not progress or not mine
    )
    for number, part in parts.items():
        shard = shards[number]
        images = torch.stack([_read(picture, size, channels, bar) for picture, _ in part])
        tensors = {"labels": torch.tensor([label for _, label in part])}
        if codec is None:
            tensors["images"] = images
        else:
            for mirrored, names in ((False, ("images", "std")), (True, ("flipped", "flipped_std"))):
                posterior = codec.posterior((images.flip(-1) if mirrored else images).to(device), sample_shape=sample_shape)
                tensors |= {name: part.half().cpu().contiguous() for name, part in zip(names, posterior, strict=True)}
        with new_file(shard) as partial:
            save_file(tensors, partial)
    bar.close()
    return cache


def class_folders(path: Path, classes: ClassConditions | None) -> list[tuple[int, Path]]:
    """The sub-folders of pictures with the number of their class, in its order.

    Folders that are all named by names of the classes, or by numbers, are those classes; others are numbered in the order of
    their names, as ImageNet's are.

    Args:
        path: of the sub-folders.
        classes: that the student knows; None: as many as there are folders.

    Raises:
        InputError: another number of folders than of classes, or names that contradict the order.
    """
    found = _sub_folders(path)
    names = () if classes is None or classes.names is None else classes.names
    named = [_named(classes, folder.name) if classes is not None and names else None for folder in found]
    numbers = [number for number in named if number is not None]
    if len(numbers) < len(found) and all(folder.name.isdecimal() for folder in found):
        numbers = [int(folder.name) for folder in found]
    elif len(numbers) < len(found):
        moved = [(i, number) for i, number in enumerate(named) if number is not None and number != i]
        if moved:
            place, number = moved[0]
            raise InputError(
                f"real data {path}: folder {found[place].name!r} is number {place} in the order of names, but its name is that "
                f"of class {number} of the student ({names[number]}), and {found[named.index(None)].name!r} is not the "
                "name of a class; name all folders by their classes, or by numbers"
            )
        numbers = list(range(len(found)))
    folders = sorted(zip(numbers, found, strict=True))
    numbers.sort()
    if len(set(numbers)) < len(numbers):
        raise InputError(f"real data {path}: several folders for one class ({_map(folders)}); expected one for each")
    if classes is not None and numbers != list(range(classes.count)):
        raise InputError(
            f"real data {path}: {len(found)} class folders for {classes.count} classes ({_map(folders)}); expected one for "
            "each in the order of the labels, or all named by class or by number from 0; a class without pictures needs an "
            "empty folder"
        )
    return folders


def _sub_folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _named(classes: ClassConditions, name: str) -> int | None:
    for label in (name, name.replace("_", " ")):
        try:
            return classes.find([label])[0]
        except InputError:
            continue
    return None


def _map(folders: list[tuple[int, Path]], names: Sequence[str] | None = None) -> str:
    """Which folder is which class, of many the first and last ones; with the class's name where the folder has another."""
    pairs = [f"{number} {folder.name}" for number, folder in folders]
    if names is not None:
        for i, (number, folder) in enumerate(folders):
            pairs[i] += (
                "" if names[number].split(",")[0].strip() == folder.name else f" ({names[number].split(',')[0].strip()})"
            )
    return ", ".join(pairs if len(pairs) <= 24 else [*pairs[:12], "...", *pairs[-4:]])


def _digest(path: Path, files: Sequence[tuple[Path, int]]) -> str:
    """sha256 of names and sizes: enough to notice other pictures without reading them."""
    digest = hashlib.sha256()
    for file, label in files:
        try:
            digest.update(f"{file.relative_to(path)} {file.stat().st_size} {label}\n".encode())
        except OSError as error:  # a link that leads nowhere
            raise InputError(f"real data: {file} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _read(file: Path, size: int, channels: int, bar: tqdm[Any]) -> torch.Tensor:  # [C, size, size], -1 to 1
    try:
        pixels = read_picture(file, size, channels)
    except InputError as error:
        raise InputError(f"real data: {error}") from None
    bar.update()
    return torch.from_numpy(pixels.transpose(2, 0, 1) / np.float32(127.5) - 1)
