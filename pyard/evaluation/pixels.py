"""From what a model draws to what a feature network sees: bytes, and their resizing."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch.nn import functional as F

from pyard.errors import InputError

Quantise = Literal["adm", "rounded"]
ResizeMode = Literal["bilinear", "antialias", "tf1"]


def to_bytes(images: np.ndarray, quantise: Quantise = "adm") -> np.ndarray:
    """Images float [n, C, H, W], -1 black to 1 white, as uint8; what is uint8 already is returned as it is.

    Args:
        images: the images.
        quantise: `adm`: floor(clip((x + 1) 127.5, 0, 255)), as ADM's sampling script does; `rounded`: floor(clip(127.5 x +
            128, 0, 255)), as DiT's, StyleGAN's and EDM's do. The first is darker by half a grey level on average, and the
            two give different distances; a number is only comparable under one of them.

    Raises:
        InputError: NaN or infinity, or another formula.
    """
    if images.dtype == np.uint8:
        return images
    if quantise not in get_args(Quantise):
        raise InputError(f"quantise is {quantise!r}; expected one of {get_args(Quantise)}")
    if not np.isfinite(images).all():
        raise InputError("images contain NaN or infinity, which cannot be converted to uint8")
    scaled = (images + 1) * 127.5 if quantise == "adm" else images * 127.5 + 128
    return np.clip(scaled, 0, 255).astype(np.uint8)


def resized(images: torch.Tensor, size: int, mode: ResizeMode) -> torch.Tensor:
    """Float images [n, C, H, W] resized to [n, C, size, size], bilinear.

    Args:
        images: the images, in any range.
        size: side of the result in pixels.
        mode: `bilinear`: pixels are squares (half-pixel centres), no filter when shrinking, as `F.interpolate`; `antialias`:
            with the filter, about what Pillow does; `tf1`: TensorFlow 1's, where pixel i of the result is at i H / size, which
            the Inception of FID was used with.
    """
    if mode != "tf1":
        return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=mode == "antialias")
    for dim in (2, 3):
        length = images.shape[dim]
        place = torch.arange(size, device=images.device) * (length / size)
        below = place.floor().long().clamp(max=length - 1)
        above = (below + 1).clamp(max=length - 1)
        weight = (place - below).to(images.dtype)
        weight = weight[:, None] if dim == 2 else weight
        images = torch.lerp(images.index_select(dim, below), images.index_select(dim, above), weight)
    return images
