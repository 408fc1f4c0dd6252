"""A diffusers autoencoder's decoder as a part of the graph: latents in, 8-bit pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import nn

from pyard.errors import InputError
from pyard.export.parts import TracedPart, run_exporter

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Decoder(nn.Module):
    """Latents [B, C, h, w], as the diffusion model knows them, to uint8 pictures [B, H, W, 3]."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae.to("cpu", torch.float32).eval().requires_grad_(False)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        unscaled = latent / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        picture = self.vae.decode(unscaled, return_dict=False)[0]  # [B, 3, H, W], -1 to 1
        # 128, not 127.5: the conversion cuts off the fraction, so this rounds to the nearest.
        return (127.5 * picture + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def load_decoder(vae: str | Path | AutoencoderKL, sample_shape: tuple[int, ...]) -> Decoder:
    """The decoder of an AutoencoderKL, or of its folder.

    Raises:
        InputError: no autoencoder there, or one of another number of channels.
    """
    from diffusers import AutoencoderKL

    if isinstance(vae, str | Path):
        try:
            vae = AutoencoderKL.from_pretrained(vae, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"--vae {vae}: expected a folder with diffusers' AutoencoderKL: {error}") from None
    channels = vae.config.latent_channels
    if channels != sample_shape[0]:
        raise InputError(f"the autoencoder decodes latents of {channels} channels; the student draws {sample_shape[0]}")
    return Decoder(vae)


def trace_decoder(decoder: Decoder, sample_shape: tuple[int, ...], opset: int) -> tuple[TracedPart, dict[str, ir.Value]]:
    """The decoder as a part, and its weights by name."""
    batch = torch.export.Dim("batch")
    graph = run_exporter(decoder, {"latent": (torch.zeros(2, *sample_shape), {0: batch})}, ["image"], opset)
    part = TracedPart(tuple(graph.inputs), tuple(graph.outputs), tuple(graph))
    return part, {str(name): value for name, value in graph.initializers.items()}
