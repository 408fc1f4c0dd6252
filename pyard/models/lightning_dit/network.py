"""LightningDiT (Yao et al. 2025, arXiv 2501.01423): a DiT with RMSNorm, SwiGLU, rotary embeddings, and optional QK norm.

R rows, which are B samples times S steps · T tokens · D hidden · H heads · Dh head size · P patch · C channels
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from pyard.conditions import Condition
from pyard.models.backbone import AttentionShape, Backbone, apply_heads
from pyard.models.dit.network import TimeEmbedding, patchify, sincos_position_embedding, unpatchify, without_variance
from pyard.models.history import History
from pyard.models.lightning_dit.config import LightningDiTConfig

# (q, k, v), each [R, H, T, Dh], to [R, H, T, Dh]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_THETA = 10000.0  # of the rotary embedding


def rotation(side: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Angles [T, Dh/2] for a head's pairs of channels: the row rotates the first half of the pairs, the column the second."""
    frequency = _THETA ** (-torch.arange(0, head_dim // 2, 2, dtype=torch.float64, device=device) / (head_dim // 2))
    angle = torch.arange(side, dtype=torch.float64, device=device)[:, None] * frequency  # [side, Dh/4]
    rows, columns = angle[:, None].expand(-1, side, -1), angle[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:  # [R, H, T, Dh], [T, Dh/2] -> [R, H, T, Dh]
    """Rotate pairs of neighbouring channels as points in the plane (Su et al. 2021, equation 34)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    a, b = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def _norm(config: LightningDiTConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, elementwise_affine=False)


def _head_norm(config: LightningDiTConfig) -> nn.Module:
    if config.qk_norm == "none":
        return nn.Identity()
    return nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm == "rms" else nn.LayerNorm(config.head_dim)


class Block(nn.Module):
    """adaLN-Zero block: modulated norm, attention, gate; modulated norm, MLP, gate."""

    def __init__(self, config: LightningDiTConfig):
        super().__init__()
        self.num_heads, self.has_shift, self.is_gated = config.num_heads, config.shift, config.mlp == "swiglu"
        width, mlp_size = config.hidden_size, round(config.hidden_size * config.mlp_ratio)
        self.modulation = nn.Linear(width, (6 if config.shift else 4) * width)
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = _head_norm(config), _head_norm(config)
        self.fc1 = nn.Linear(width, mlp_size * (2 if self.is_gated else 1))
        self.fc2 = nn.Linear(mlp_size, width)

    def forward(
        self,
        x: torch.Tensor,  # [R, T, D]
        vector: torch.Tensor,  # [R, D], after SiLU
        angle: torch.Tensor | None,  # [T, Dh/2]; None: nothing is rotated
        attend: Attend,
    ) -> torch.Tensor:  # [R, T, D]
        parts = self.modulation(vector)[:, None].chunk(6 if self.has_shift else 4, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts if self.has_shift else (None, *parts[:2], None, *parts[2:])
        q, k, v = (
            self.qkv(modulate(self.norm1(x), shift1, scale1)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if angle is not None:
            q, k = rotate(q, angle), rotate(k, angle)
        x = x + gate1 * self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.fc2(self._activate(self.fc1(modulate(self.norm2(x), shift2, scale2))))

    def _activate(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.is_gated:
            return F.gelu(hidden, approximate="tanh")
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value


class Head(nn.Module):
    """Final layer: modulated norm and a linear map to patches."""

    def __init__(self, config: LightningDiTConfig):
        super().__init__()
        assert config.out_channels is not None
        self.norm = _norm(config)
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)

    def forward(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:  # [R, T, D], [R, D] -> [R, T, P*P*C_out]
        shift, scale = self.modulation(vector)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


def modulate(x: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    """`x * (1 + scale) + shift`; without a shift, `x * (1 + scale)`."""
    return x * (1 + scale) if shift is None else x * (1 + scale) + shift


class LightningDiT(Backbone):
    """All of a LightningDiT below its head, for any number of steps."""

    config_class = LightningDiTConfig
    config: LightningDiTConfig
    pos_embed: torch.Tensor

    def __init__(self, config: LightningDiTConfig):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.in_channels * config.patch_size**2, config.hidden_size)
        self.register_buffer("pos_embed", sincos_position_embedding(self.side, config.hidden_size))
        self.time_embed = TimeEmbedding(config)
        self.label_embed = nn.Embedding(config.num_classes + config.has_null_label, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    @property
    def side(self) -> int:
        """Tokens in a row."""
        return self.config.input_size // self.config.patch_size

    def forward(
        self,
        x: torch.Tensor,  # [B, S, C, H, W]
        times: torch.Tensor,  # [B or 1, S]
        condition: Condition,  # label int64 [B]
        heads: Sequence[nn.Module],  # S of them, or one
        history: History | None = None,
    ) -> torch.Tensor:  # [B, S, C_out, H, W]
        batch, steps = x.shape[:2]
        dtype = self.patch_embed.weight.dtype
        vectors = self.conditioning(times.expand(batch, steps).flatten(), condition.repeat(steps))  # [R, D]
        tokens = self.patch_embed(patchify(x.flatten(0, 1).to(dtype), self.config.patch_size)) + self.pos_embed
        angle = rotation(self.side, self.config.head_dim, x.device) if self.config.rotary else None
        for i, block in enumerate(self.blocks):
            attend: Attend = F.scaled_dot_product_attention
            if history is not None and i < history.layers:
                attend = functools.partial(history.attend_rows, i)
            tokens = block(tokens, vectors, angle, attend)
        return self.unembed(apply_heads(heads, tokens, vectors), x.shape[2:]).unflatten(0, (batch, steps))

    def conditioning(self, times: torch.Tensor, condition: Condition) -> torch.Tensor:  # [B], B rows -> [B, D]
        return F.silu(self.time_embed(times) + self.label_embed(condition["label"]))

    def unembed(self, tokens: torch.Tensor, sample_shape: tuple[int, ...]) -> torch.Tensor:  # [R, T, P*P*C] -> [R, C, H, W]
        return unpatchify(tokens, self.config.patch_size, tokens.shape[-1] // self.config.patch_size**2)

    def attention_shapes(self, layers: int, sample_shape: tuple[int, ...]) -> list[AttentionShape]:
        self.check_sample(sample_shape)
        return [AttentionShape(self.config.num_heads, self.config.tokens_per_step, self.config.head_dim)] * layers

    def new_head(self) -> Head:
        return Head(self.config)

    @classmethod
    def without_weights(cls) -> torch.device:
        return torch.device("meta")

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def has_null_class(self) -> bool:
        return self.config.has_null_label

    def for_student(self, head: nn.Module) -> tuple[LightningDiT, nn.Module]:
        """Copies of trunk and head without the variance that a teacher may predict: a student's head has C output channels."""
        trunk, config = copy.deepcopy(self), self.config
        if config.out_channels == config.in_channels:
            return trunk, copy.deepcopy(head)
        trunk.config = dataclasses.replace(config, out_channels=config.in_channels)
        with torch.device(next(head.parameters()).device):
            narrow = Head(trunk.config)
        narrow.load_state_dict(without_variance(head.state_dict(), config.patch_size, config.in_channels))
        return trunk, narrow
