"""A codec's decoder as a part of the graph, from the student's samples to 8-bit pictures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from pyard.errors import InputError
from pyard.export.files import IR_VERSION
from pyard.export.parts import TracedPart, run_exporter
from pyard.models.codec import LatentCodec, require_latent_codec
from pyard.models.student import Student
from pyard.version import __version__

if TYPE_CHECKING:
    from diffusers import ModelMixin


class Decoder(nn.Module):
    """Decodes samples [B, *sample_shape] of the diffusion model to uint8 pictures [B, H, W, 3].

    Args:
        codec: the codec whose decoding is traced; its VAE is not changed, but copied to the CPU in float32.
    """

    def __init__(self, codec: LatentCodec):
        super().__init__()
        vae = copy.deepcopy(codec.vae).to("cpu")
        self.vae = vae if vae.dtype == torch.float32 else vae.float()
        self.codec = LatentCodec(self.vae)
        assert self.codec.vae is self.vae  # prepared here, not while it is traced

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        picture = self.codec.decode_batch(latent)  # [B, 3, H, W], -1 to 1
        # 128, not 127.5: the conversion truncates, so this rounds to the nearest level.
        return (127.5 * picture + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def load_decoder(vae: str | Path | ModelMixin | None, student: Student) -> Decoder | None:
    """The decoder for an exported student; None: the student draws samples.

    Args:
        vae: `own`, the student's VAE, if it has one; `none` or None: no decoder; the folder of a diffusers autoencoder, or one
            in memory.
        student: the student to export.

    Raises:
        InputError: there is no autoencoder, or it cannot decode the student's samples.
    """
    if vae is None or str(vae) == "none":
        return None
    if isinstance(vae, str | Path) and str(vae) == "own":
        if student.codec is None:
            return None
        codec = require_latent_codec(student.codec, "an export with pictures")
    else:
        codec = LatentCodec(vae)
    try:
        codec.check(student.sample_shape)
    except InputError as error:
        raise InputError(f"--vae {vae if isinstance(vae, str | Path) else type(vae).__name__}: {error}") from None
    return Decoder(codec)


def expected_pictures(codec: LatentCodec, samples: torch.Tensor) -> np.ndarray:  # uint8 [B, H, W, 3]
    """The pictures that an exported student should draw: samples [B, *sample_shape], decoded and rounded to 8 bits."""
    images = codec.decode(samples).cpu().numpy()
    levels = np.clip(np.rint((images.astype(np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)
    return levels.transpose(0, 2, 3, 1)


def trace_decoder(decoder: Decoder, sample_shape: tuple[int, ...], opset: int) -> tuple[TracedPart, dict[str, ir.Value]]:
    """The traced decoder, and its weights by name."""
    graph = _trace(decoder, sample_shape, opset)
    part = TracedPart(tuple(graph.inputs), tuple(graph.outputs), tuple(graph))
    return part, {str(name): value for name, value in graph.initializers.items()}


def decoder_model(decoder: Decoder, sample_shape: tuple[int, ...], opset: int) -> ir.Model:
    """The decoder as a separate graph: latent [B, *sample_shape] -> image uint8 [B, H, W, 3]."""
    graph = _trace(decoder, sample_shape, opset)
    graph.name = "pyard_vae_decoder"
    return ir.Model(graph, ir_version=IR_VERSION[opset], producer_name="pyard", producer_version=__version__)


def _trace(decoder: Decoder, sample_shape: tuple[int, ...], opset: int) -> ir.Graph:
    batch = torch.export.Dim("batch")
    return run_exporter(decoder, {"latent": (torch.zeros(2, *sample_shape), {0: batch})}, ["image"], opset)
