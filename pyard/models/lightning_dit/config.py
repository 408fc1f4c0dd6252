"""Sizes of a LightningDiT, and the changes to DiT that it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pyard.errors import InputError
from pyard.models.dit.config import DiTConfig

Norm = Literal["layer", "rms"]
QKNorm = Literal["none", "layer", "rms"]
MLP = Literal["gelu", "swiglu"]


@dataclass(frozen=True)
class LightningDiTConfig(DiTConfig):
    """Sizes as in DiT (`DiTConfig`; `mlp_ratio` is the width of the MLP's hidden layer over D), and what differs from it.

    Args:
        norm: of the blocks and the head: `layer`, without weights, or `rms`, with them.
        qk_norm: of each head's queries and keys: `none`, `layer` (weights and biases, epsilon 1e-5) or `rms`.
        mlp: `gelu`, or `swiglu`, silu(a) b (Shazeer 2020).
        rotary: whether queries and keys are rotated by row and column, in addition to the position embedding.
        shift: whether the blocks' modulations have a shift; the head's always has one.
    """

    norm: Norm = "rms"
    qk_norm: QKNorm = "none"
    mlp: MLP = "swiglu"
    rotary: bool = True
    shift: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("norm", Norm), ("qk_norm", QKNorm), ("mlp", MLP)):
            if getattr(self, name) not in get_args(choices):
                raise InputError(f"LightningDiT: {name} is {getattr(self, name)!r}; expected one of {get_args(choices)}")
        for name in ("rotary", "shift"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"LightningDiT: {name} is {getattr(self, name)!r}; expected true or false")
        if self.rotary and self.head_dim % 4:
            raise InputError(f"LightningDiT: heads of {self.head_dim} numbers cannot be rotated; expected a multiple of 4")
