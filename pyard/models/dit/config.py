"""Sizes of a class-conditional diffusion transformer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pyard.errors import InputError
from pyard.storage.numbers import number, whole_number

# The most that is built, far beyond any DiT: a damaged configuration is one line, not an hour of allocating.
_MOST = {
    "input_size": 2**16, "in_channels": 2**16, "out_channels": 2**17, "patch_size": 2**10, "hidden_size": 2**17, "depth": 10**4,
    "num_heads": 2**12, "num_classes": 10**8, "frequency_size": 2**16,
}  # fmt: skip


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a diffusion transformer.

    Args:
        input_size: height and width of the (latent) image; square.
        in_channels: C.
        out_channels: channels of the network's output; more than C if the teacher also predicts a variance, which is dropped.
        patch_size: P; T = (input_size / P)^2 tokens.
        hidden_size: D.
        depth: L.
        num_heads: H.
        num_classes: classes; the label table has one more row, for "no class", if `has_null_label`.
        has_null_label: whether the network knows the unconditional label `num_classes`.
        mlp_ratio: hidden units of the MLP, over D.
        frequency_size: width of the sinusoidal time embedding.
        freq_shift: frequency shift of that embedding: 0 in DiT, 1 in diffusers.
        time_scale, time_offset: the embedding sees time_scale * time + time_offset: 1000 t for a diffusers flow, 1 - t for SiT,
            which counts from noise to data.
        norm_eps: epsilon of every LayerNorm.
        mlp_norm_eps: epsilon of the LayerNorm before an MLP, if it differs, as in diffusers; None: the same.
    """

    input_size: int
    in_channels: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    out_channels: int | None = None
    has_null_label: bool = True
    mlp_ratio: float = 4.0
    frequency_size: int = 256
    freq_shift: float = 0.0
    time_scale: float = 1.0
    time_offset: float = 0.0
    norm_eps: float = 1e-6
    mlp_norm_eps: float | None = None

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(f"DiT: {name}", getattr(self, name), 1, most))
        for name, low, high in (("mlp_ratio", 1e-3, 1e3), ("freq_shift", -1e3, 1e3), ("time_scale", -1e6, 1e6),
                                ("time_offset", -1e6, 1e6), ("norm_eps", 0, 1), ("mlp_norm_eps", 0, 1)):  # fmt: skip
            if getattr(self, name) is not None:
                object.__setattr__(self, name, number(f"DiT: {name}", getattr(self, name), low, high))
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        if self.mlp_norm_eps is None:
            object.__setattr__(self, "mlp_norm_eps", self.norm_eps)
        if self.input_size % self.patch_size:
            raise InputError(f"DiT: input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise InputError(f"DiT: hidden_size {self.hidden_size} must be a multiple of 4 and of num_heads ({self.num_heads})")

    @property
    def tokens_per_step(self) -> int:
        """T."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        """Dh."""
        return self.hidden_size // self.num_heads

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        return self.in_channels, self.input_size, self.input_size

    def to_json(self) -> dict[str, Any]:
        """A dictionary for JSON; `DiTConfig(**dictionary)` equals this object."""
        return dataclasses.asdict(self)
