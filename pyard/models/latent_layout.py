"""How a diffusion model's latents differ from those of its VAE: scaled, perhaps by channel, and perhaps packed 2 x 2.

C channels of the VAE's latents · h, w their height and width · T = h/2 * w/2 packed tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pyard.errors import InputError

PACK = 2  # side of the squares that become one token or pixel
Layout = Literal["plain", "frame", "packed", "tokens"]


@dataclass(frozen=True)
class Scaling:
    """Latents of the VAE, z, to those of the diffusion model, and back, as diffusers' pipelines compute it.

    Without statistics (SD3, Flux, Z-Image, PixArt): (z - shift) * scaling. With them (Qwen-Image, Wan, and SDXL's, which has a
    scaling as well): (z - mean) * scaling / std. FLUX.2 has statistics of each of the 4C channels of latents packed 2 x 2.

    Args:
        scaling: `scaling_factor` of the VAE's configuration; 1 where it has none.
        shift: `shift_factor`; 0 where it has none.
        mean: `latents_mean`, of each of C or 4C channels; None: there are no statistics.
        std: `latents_std`, likewise.
    """

    scaling: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], channels: int) -> Scaling:
        """The scaling of a VAE's configuration.

        Raises:
            InputError: one of the two statistics without the other, of another number of channels, or beside a shift.
        """
        statistics = {name: config.get(name) for name in ("latents_mean", "latents_std")}
        scaling = config.get("scaling_factor")
        scaling = 1.0 if scaling is None else float(scaling)
        shift = float(config.get("shift_factor") or 0.0)
        if all(values is None for values in statistics.values()):
            return cls(scaling, shift)
        for name, values in statistics.items():
            found = "none" if values is None else f"{len(values)} values"
            if values is None or len(values) != channels:
                raise InputError(f"VAE: {name} has {found}; expected one for each of {channels} channels, in both statistics")
        if shift:
            raise InputError(f"VAE: found both latents_mean and a shift_factor ({shift:g}); expected one of the two")
        mean, std = (tuple(map(float, values)) for values in statistics.values() if values is not None)
        return cls(scaling, 0.0, mean, std)

    @classmethod
    def of_batch_norm(cls, mean: torch.Tensor, var: torch.Tensor, eps: float, channels: int) -> Scaling:
        """The scaling of a batch norm over packed latents; an InputError if it has another number of channels than 4C."""
        if len(mean) != channels * PACK**2:
            raise InputError(f"VAE: its batch norm has {len(mean)} channels; expected {channels * PACK**2}, packed 2 x 2")
        return cls(1.0, 0.0, tuple(mean.double().tolist()), tuple((var.double() + eps).sqrt().tolist()))

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:  # [B, C, h, w] -> [B, C, h, w]
        """Latents of the diffusion model to those of the VAE."""
        if self.mean is None or self.std is None:
            return latents / self.scaling + self.shift
        return latents * _of_channels(self.std, latents) / self.scaling + _of_channels(self.mean, latents)

    def from_vae(self, latents: torch.Tensor) -> torch.Tensor:  # [B, C, h, w] -> [B, C, h, w]
        """The reverse of `to_vae`."""
        if self.mean is None or self.std is None:
            return (latents - self.shift) * self.scaling
        return self.spread(latents - _of_channels(self.mean, latents))

    def spread(self, deviations: torch.Tensor) -> torch.Tensor:  # [B, C, h, w] -> [B, C, h, w]
        """Differences or standard deviations of the VAE's latents to those of the diffusion model."""
        return deviations * self.scaling if self.std is None else deviations * self.scaling / _of_channels(self.std, deviations)


def layout_of(sample_shape: tuple[int, ...], channels: int) -> Layout:
    """How samples of this shape hold latents [C, h, w] of `channels` channels.

    `plain` [C, h, w]; `frame` [C, 1, h, w]; `packed` [4C, h/2, w/2]; `tokens` [T, 4C], as Flux packs them.

    Raises:
        InputError: a shape that is none of these.
    """
    packed = channels * PACK**2
    if len(sample_shape) == 3 and sample_shape[0] in (channels, packed):
        return "plain" if sample_shape[0] == channels else "packed"
    if len(sample_shape) == 4 and sample_shape[:2] == (channels, 1):
        return "frame"
    if len(sample_shape) == 2 and sample_shape[1] == packed:
        return "tokens"
    raise InputError(
        f"this VAE makes latents of {channels} channels; found samples of shape {sample_shape}, expected [{channels}, h, w], "
        f"[{channels}, 1, h, w], or packed 2 x 2 [{packed}, h, w] or [tokens, {packed}]"
    )


def unpack(
    latents: torch.Tensor,  # [B, *sample_shape]
    channels: int,
    grid: tuple[int, int] | None = None,
) -> torch.Tensor:  # [B, C, h, w]
    """Samples to the latents that they hold.

    Args:
        latents: of any of the layouts of `layout_of`.
        channels: C.
        grid: rows and columns of packed tokens; None: as many of each.
    """
    layout = layout_of(tuple(latents.shape[1:]), channels)
    if layout == "plain":
        return latents
    if layout == "frame":
        return latents[:, :, 0]
    if layout == "tokens":  # [B, T, 4C] -> [B, 4C, h/2, w/2]
        latents = latents.transpose(1, 2).unflatten(2, token_grid(latents.shape[1], grid))
    # A channel holds its square in the order (row, column) in Flux's packing and in PyTorch's alike.
    return pixel_shuffle(latents, PACK)


def pack(latents: torch.Tensor, layout: Layout) -> torch.Tensor:  # [B, C, h, w] -> [B, *sample_shape]
    """The reverse of `unpack`."""
    if layout == "plain":
        return latents
    if layout == "frame":
        return latents[:, :, None]
    if any(size % PACK for size in latents.shape[2:]):
        raise InputError(f"latents of shape {tuple(latents.shape)} cannot be packed 2 x 2; expected an even height and width")
    packed = pixel_unshuffle(latents, PACK)
    return packed if layout == "packed" else packed.flatten(2).transpose(1, 2)


def latent_size(sample_shape: tuple[int, ...], channels: int, grid: tuple[int, int] | None = None) -> tuple[int, int]:
    """(h, w) of the latents in a sample of this shape; arguments as of `unpack`."""
    layout = layout_of(sample_shape, channels)
    if layout in ("plain", "frame"):
        height, width = sample_shape[-2:]
        return height, width
    rows, columns = token_grid(sample_shape[0], grid) if layout == "tokens" else sample_shape[1:]
    return rows * PACK, columns * PACK


def token_grid(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of packed tokens.

    Raises:
        InputError: tokens that make up no square without a grid, or another number of tokens than the grid has.
    """
    if grid is None:
        side = round(tokens**0.5)
        if side * side != tokens:
            raise InputError(f"{tokens} packed tokens do not form a square; give LatentCodec(…, grid=(rows, columns))")
        return side, side
    if grid[0] * grid[1] != tokens:
        raise InputError(f"found {tokens} packed tokens; this codec's grid is {grid[0]} x {grid[1]}")
    return grid


def _of_channels(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:  # [C, 1, 1], or [C, h, w] for 4C values
    channels, height, width = like.shape[-3:]
    by_channel = torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
    if len(values) == channels:
        return by_channel
    return pixel_shuffle(by_channel, PACK).repeat(1, height // PACK, width // PACK)
