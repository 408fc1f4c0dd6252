"""Tiny autoencoders of diffusers with random weights: each turns latents [B, 2, h, w] into images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan
from factories import randomise

MEAN, STD = (0.3, -0.2), (0.7, 1.5)


def _random(autoencoder: type[Any], **settings: Any) -> Any:
    vae = autoencoder(**settings)
    randomise(vae, 5, std=0.2)
    return vae.eval()


def plain_vae(**changes: Any) -> Any:
    """Images of 2h x 2w pixels, scaled by 0.3."""
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    sizes = dict(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=2, layers_per_block=1, scaling_factor=0.3)
    return _random(AutoencoderKL, **{**blocks, **sizes, **changes})


def flux2_vae() -> Any:
    """Images of 2h x 2w pixels, scaled by the batch norm's statistics of latents packed 2 x 2."""
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    vae = _random(
        AutoencoderKLFlux2, **blocks, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=2, layers_per_block=1
    )
    generator = torch.Generator().manual_seed(6)
    vae.bn.running_mean.copy_(torch.randn(8, generator=generator))
    vae.bn.running_var.copy_(0.5 + torch.rand(8, generator=generator))
    return vae


def qwen_vae(**changes: Any) -> Any:
    """Videos; an image is one of one frame, of 2h x 2w pixels."""
    sizes = dict(base_dim=8, z_dim=2, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
    return _random(AutoencoderKLQwenImage, **{**sizes, "latents_mean": MEAN, "latents_std": STD, **changes})


def wan_vae(**changes: Any) -> Any:
    """Likewise; with `patched_wan_vae`, of 4h x 4w pixels."""
    sizes = dict(base_dim=8, z_dim=2, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
    return _random(AutoencoderKLWan, **{**sizes, "latents_mean": MEAN, "latents_std": STD, **changes})


def patched_wan_vae() -> Any:
    """As Wan 2.2's: its first layer sees squares of 2 x 2 pixels."""
    return wan_vae(dim_mult=[1, 1], patch_size=2, in_channels=12, out_channels=12, is_residual=True)


def of_channels(values: tuple[float, ...]) -> torch.Tensor:
    """[1, C, 1, 1, 1], as the pipelines of videos write it."""
    return torch.tensor(values).view(1, len(values), 1, 1, 1)
