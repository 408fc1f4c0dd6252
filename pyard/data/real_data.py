"""Real data of the adversarial stage: digits, tensors or encoded images, in an order that does not depend on the processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyard.diffusion.noise import epoch_order, standard_normal
from pyard.errors import InputError
from pyard.storage.arrays import read_npz
from pyard.storage.files import stand_in
from pyard.storage.reading import reading
from pyard.storage.tensor_files import read_safetensors

_FLIP_STREAM = 3  # of Philox; noise, labels and the order of an epoch have 0, 1 and 2


@dataclass(frozen=True)
class RealData:
    """Images, or latents as distributions, with labels.

    Args:
        shards: each with `images` [n, C, ...] (pixels from -1 to 1, or the means of latents) and `labels` [n]. Latents, whose
            mirror image is not that of the picture, have `flipped` too, and the standard deviations `std` and `flipped_std`.
    """

    shards: tuple[dict[str, torch.Tensor], ...]

    def __post_init__(self) -> None:
        if not self.shards:
            raise InputError("real data: no images")
        for shard in self.shards:
            of_latents = {"flipped", "std", "flipped_std"} & shard.keys()
            if not {"images", "labels"} <= shard.keys() or len(of_latents) not in (0, 3):
                raise InputError(
                    f"real data: found {', '.join(sorted(shard))}; expected images and labels, and for latents flipped, std "
                    "and flipped_std"
                )
            images, labels = shard["images"], shard["labels"]
            whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
            if (
                images.ndim < 2
                or not images.is_floating_point()
                or labels.shape != images.shape[:1]
                or not len(labels)
                or not whole
            ):
                raise InputError(
                    f"real data: images {images.dtype} {list(images.shape)} and labels {list(labels.shape)}; expected floating "
                    "point [n, C, ...] and whole numbers [n], n at least 1"
                )
            if any(shard[name].shape != images.shape or not shard[name].is_floating_point() for name in of_latents):
                raise InputError("real data: flipped, std and flipped_std have different shapes than images; expected the same")

    @property
    def count(self) -> int:
        """Images in all."""
        return sum(len(shard["labels"]) for shard in self.shards)

    @property
    def latent(self) -> bool:
        """Whether these are latents that are drawn from their distributions."""
        return "std" in self.shards[0]

    @classmethod
    def load(cls, source: str | Path, sample_shape: tuple[int, ...], num_classes: int) -> RealData:
        """Real data by name.

        Args:
            source: `digits`; a `.safetensors` or `.npz` with `images` and `labels`; or a folder of such `.safetensors`, which
                `cached_images` makes of pictures.
            sample_shape: [C, ...] that the student draws.
            num_classes: labels are below it: classes, or the numbers of other conditions.
        """
        if str(source) == "digits":
            from pyard.data.digits import digits_data

            images, labels = digits_data()
            data = cls(({"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)},))
        else:
            data = cls(_read(Path(source)))
        for shard in data.shards:
            low, high = int(shard["labels"].min()), int(shard["labels"].max())
            if tuple(shard["images"].shape[1:]) != sample_shape or low < 0 or high >= num_classes:
                raise InputError(
                    f"real data {source}: samples of {list(shard['images'].shape[1:])} with labels {low} to {high}; the "
                    f"student draws {list(sample_shape)} of {num_classes} classes"
                )
        return data

    def fingerprint(self) -> str:
        """sha256 of the labels and each shard's first image: enough to notice other data, and quick for large ones."""
        digest = hashlib.sha256()
        for shard in self.shards:
            for tensor in (shard["labels"].long(), shard["images"][:1].float()):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def gather(self, indices: Sequence[int], flips: Sequence[bool], noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples by number.

        Args:
            indices: B numbers, 0 to count - 1.
            flips: which of them to mirror.
            noise: [B, C, ...] standard normal, for latents.

        Returns:
            float32 [B, C, ...] and labels int64 [B].

        Raises:
            InputError: a sample with NaN or infinity.
        """
        ends = np.cumsum([len(shard["labels"]) for shard in self.shards])
        images, labels = [], []
        for i, (index, flip) in enumerate(zip(indices, flips, strict=True)):
            number = int(np.searchsorted(ends, index, side="right"))
            shard, row = self.shards[number], index - (int(ends[number - 1]) if number else 0)
            labels.append(int(shard["labels"][row]))
            if self.latent:
                mean, std = ("flipped", "flipped_std") if flip else ("images", "std")
                images.append(shard[mean][row].float() + shard[std][row].float() * noise[i])
            else:
                image = shard["images"][row].float()
                images.append(image.flip(-1) if flip else image)
        batch = torch.stack(images)
        sound = torch.isfinite(batch).flatten(1).all(dim=1)
        if not sound.all():  # found here, not when the file is opened: only what is used is read
            raise InputError(f"real data: sample {indices[int(sound.int().argmin())]} holds NaN or infinity; remove it")
        return batch, torch.tensor(labels)


class RealReader:
    """Batches of real data for ever, shuffled anew each epoch.

    What a batch is depends on the seed and on how many samples all processes have taken before, never on how many they are.

    Args:
        data: what to read.
        batch_size: of all processes together.
        seed: of order, mirroring and the latents' noise.
        flips: mirror a random half.
        rank: which of world_size readers this is.
        world_size: how many share each batch.
    """

    def __init__(self, data: RealData, batch_size: int, *, seed: int, flips: bool, rank: int = 0, world_size: int = 1):
        self.data, self.batch_size, self.seed, self.flips = data, batch_size, seed, flips
        self.rank, self.world_size = rank, world_size
        self.position = 0  # samples that all processes have taken
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:  # [B, C, ...] and [B], this rank's
        share = self.batch_size // self.world_size
        first = self.position + self.rank * share
        self.position += self.batch_size
        numbers = range(first, first + share)
        shape = tuple(self.data.shards[0]["images"].shape[1:])
        noise = torch.from_numpy(standard_normal(self.seed, np.asarray(numbers), shape))
        return self.data.gather([self._index(n) for n in numbers], [self._flip(n) for n in numbers], noise)

    def state_dict(self) -> dict[str, Any]:
        """How far it has read."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to where `state_dict` was taken."""
        self.position = int(state_dict["position"])

    def _index(self, number: int) -> int:
        epoch, place = divmod(number, self.data.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.data.count, self.seed, epoch)
        return int(self._order[place])

    def _flip(self, number: int) -> bool:
        if not self.flips:
            return False
        key, counter = np.array([self.seed, number], dtype=np.uint64), np.array([0, 0, 0, _FLIP_STREAM], dtype=np.uint64)
        return bool(int(np.random.Philox(key=key, counter=counter).random_raw()) & 1)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], ...]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(
            f"real data {path}: expected 'digits', a .safetensors or .npz file, a folder of .safetensors, or sub-folders of "
            "pictures"
        )
    for file in files:
        what = stand_in(file)
        if what is not None:
            raise InputError(f"real data {file} cannot be read: {what}")
    try:
        # safetensors maps its files: processes of one machine share the memory, and only what is used is read.
        shards = tuple(_arrays(file) if file.suffix == ".npz" else read_safetensors(file, whole=False) for file in files)
    except InputError as error:
        raise InputError(f"real data {path} cannot be read: {error}") from None
    return shards


def _arrays(file: Path) -> dict[str, torch.Tensor]:
    with reading(file, "expected images and labels as numbers"):
        return {name: torch.from_numpy(array) for name, array in read_npz(file).items()}
