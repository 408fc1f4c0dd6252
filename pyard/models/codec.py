"""Between latents and images: a diffusers AutoencoderKL with its scaling and shift, kept beside a teacher or a student."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyard.errors import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

FOLDER = "vae"


class LatentCodec:
    """A VAE that is read when it is first needed; no submodule of the model that it travels with, so it is never trained.

    Args:
        source: the folder of a diffusers `AutoencoderKL`, or one in memory.
    """

    def __init__(self, source: str | Path | AutoencoderKL):
        self._folder = Path(source) if isinstance(source, str | Path) else None
        self._vae: Any = None if isinstance(source, str | Path) else source

    @classmethod
    def beside(cls, *folders: Path) -> LatentCodec | None:
        """The codec in the sub-folder `vae` of the first of these folders that has one."""
        return next((cls(folder / FOLDER) for folder in folders if (folder / FOLDER / "config.json").is_file()), None)

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder.

        Raises:
            InputError: the folder holds none, or one that normalises its latents by channel.
        """
        if self._vae is None:
            from diffusers import AutoencoderKL

            try:
                self._vae = AutoencoderKL.from_pretrained(str(self._folder), torch_dtype=torch.float32)
            except (OSError, ValueError, RuntimeError) as error:
                raise InputError(f"{self._folder}: no AutoencoderKL that diffusers can read: {error}") from None
        config = self._vae.config
        if getattr(config, "latents_mean", None) is not None or getattr(config, "latents_std", None) is not None:
            raise InputError("this VAE normalises each latent channel (latents_mean, latents_std); pyard scales them alone")
        return self._vae.eval().requires_grad_(False)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        """Latents [n, C, h, w] to images [n, 3, H, W] float32, about -1 to 1: z / scaling_factor + shift_factor, decoded."""
        vae = self.vae.to(latents.device)
        scaling, shift = self.scaling()
        parts = [vae.decode((part.float() / scaling + shift).to(vae.dtype)).sample for part in latents.split(batch_size)]
        return torch.cat(parts).float()

    @torch.inference_mode()
    def encode(self, images: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        """Images [n, 3, H, W], -1 to 1, to latents [n, C, h, w] float32: (mode of the posterior - shift_factor) * scaling."""
        vae = self.vae.to(images.device)
        scaling, shift = self.scaling()
        modes = [vae.encode(part.to(vae.dtype)).latent_dist.mode() for part in images.split(batch_size)]
        return (torch.cat(modes).float() - shift) * scaling

    @torch.inference_mode()
    def posterior(self, images: torch.Tensor, batch_size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
        """Images as in `encode` to mean and standard deviation of their latents, each [n, C, h, w] float32, scaled alike."""
        vae = self.vae.to(images.device)
        scaling, shift = self.scaling()
        parts = [vae.encode(part.to(vae.dtype)).latent_dist for part in images.split(batch_size)]
        mean, std = (torch.cat([getattr(part, name) for part in parts]).float() for name in ("mean", "std"))
        return (mean - shift) * scaling, std * scaling

    def save(self, folder: Path) -> None:
        """Write the VAE into the sub-folder `vae`."""
        if self._folder is not None:
            shutil.copytree(self._folder, folder / FOLDER)
        else:
            self.vae.save_pretrained(str(folder / FOLDER))

    def scaling(self) -> tuple[float, float]:
        """(scaling_factor, shift_factor) of the VAE's configuration."""
        config = self.vae.config
        return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentCodec:
        # An average of the student's weights, or its copy in another precision, decodes with the same VAE.
        return self
