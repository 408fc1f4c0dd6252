"""Mean and standard deviation of each latent channel, which some checkpoints bring along for their VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyard.errors import InputError
from pyard.models.dit.checkpoint_file import Tensors
from pyard.storage.pickles import read_pickle


class LatentStatistics(NamedTuple):
    """The network works on (z - mean) / std of a VAE's latents z, without any other scaling.

    Args:
        mean: of each channel.
        std: likewise.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def in_tensors(cls, tensors: Tensors, path: Path) -> LatentStatistics | None:
        """The running statistics of REPA-E's BatchNorm of latents (Leng et al. 2025, section 3.2), if they are there.

        Its sampling multiplies by the root of the variance without BatchNorm's epsilon, and so does this.
        """
        if "bn.running_mean" not in tensors and "bn.running_var" not in tensors:
            return None
        try:
            mean, variance = tensors["bn.running_mean"].double(), tensors["bn.running_var"].double()
            channels = tensors["x_embedder.proj.weight"].shape[1]
        except (KeyError, IndexError) as error:
            raise InputError(f"{path}: it has statistics of latents, but no tensor {error}") from None
        if variance.shape != (channels,) or not bool((variance > 0).all()):
            raise InputError(f"{path}: bn.running_var is not a variance of {channels} channels")
        return cls._checked(mean.tolist(), torch.sqrt(variance).tolist(), channels, path)

    @classmethod
    def beside(cls, path: Path, channels: int) -> LatentStatistics | None:
        """Those in `latents_stats.pt` beside a checkpoint of LightningDiT, which normalises latents by it, if there is one."""
        file = path.with_name("latents_stats.pt")
        if not file.exists():
            return None
        try:
            found = read_pickle(file)
            mean, std = (found[name].double().flatten().tolist() for name in ("mean", "std"))
        except Exception as error:  # whatever torch raises for what is no such file
            what = str(error).strip().splitlines()[:1]
            raise InputError(f"{file}: expected the mean and std of {channels} channels ({' '.join(what)[:200]})") from None
        return cls._checked(mean, std, channels, file)

    @classmethod
    def from_json(cls, config: Any, path: Path) -> LatentStatistics | None:
        """From `_asdict` as JSON keeps it, or None of None."""
        if config is None:
            return None
        try:
            return cls._checked(config["mean"], config["std"], len(config["mean"]), path)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: latent_statistics is {config!r}; expected mean and std ({error})") from None

    def on(self, vae: Any) -> Any:
        """A diffusers autoencoder that is told the statistics, in place of the scaling that it had; returns it."""
        scaling = {"scaling_factor": 1.0, "shift_factor": None}
        vae.register_to_config(latents_mean=list(self.mean), latents_std=list(self.std), **scaling)
        return vae

    @classmethod
    def _checked(cls, mean: list[float], std: list[float], channels: int, path: Path) -> LatentStatistics:
        values = torch.tensor([mean, std], dtype=torch.float64) if len(mean) == len(std) == channels else torch.empty(0)
        if values.numel() == 0 or not bool(values.isfinite().all()) or not bool((values[1] > 0).all()):
            raise InputError(
                f"{path}: its statistics of latents are not the mean and standard deviation of {channels} channels"
            )
        return cls(tuple(values[0].tolist()), tuple(values[1].tolist()))
