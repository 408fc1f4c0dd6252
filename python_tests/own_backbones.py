"""Two backbones of somebody else: they share nothing with pyard's DiT, and go through everything that pyard does.

A transformer with cross-attention to a prompt's tokens, QK norm, rotary embedding, grouped-query attention and the time as
a token beside the image's, for pictures of several sizes; and a class-conditional video toy.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pyard.errors import InputError
from pyard.models.backbone import AttentionShape, Backbone, apply_heads


@dataclass(frozen=True)
class TextConfig:
    """Sizes; `height` and `width` are the usual ones, others are taken too."""

    channels: int = 3
    height: int = 4
    width: int = 8
    patch: int = 2
    hidden_size: int = 32
    depth: int = 3
    num_heads: int = 4
    kv_heads: int = 2
    text_size: int = 6

    @property
    def sample_shape(self):
        return self.channels, self.height, self.width

    def to_json(self):
        return dataclasses.asdict(self)


def rotation(rows, columns, head_dim, device):
    """Cosines and sines [T, Dh/2] of a 2-D rotary embedding: the row turns one half of the pairs, the column the other."""
    frequency = 100.0 ** (-torch.arange(head_dim // 4, device=device) / (head_dim // 4))
    y, x = (torch.arange(n, device=device)[:, None] * frequency for n in (rows, columns))
    angle = torch.cat([y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)], dim=-1).flatten(0, 1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):  # [..., 1 + T, Dh]: the time's token has no place
    a, b = x[..., 1:, :].float().chunk(2, dim=-1)
    return torch.cat([x[..., :1, :], torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)], dim=-2)


class TextBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, self.head_dim = c.hidden_size, c.hidden_size // c.num_heads
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(width) for _ in range(3))
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = (nn.Linear(width, c.kv_heads * self.head_dim) for _ in range(2))
        self.query_norm, self.key_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)
        self.cross_query, self.cross_out = nn.Linear(width, width), nn.Linear(width, width)
        self.cross_key, self.cross_value = nn.Linear(c.text_size, width), nn.Linear(c.text_size, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x, *, text, mask, turn, attend):  # [rows, 1 + T, D], [rows, n, text_size], bool [rows, n]
        y = self.norm1(x)
        q = rotate(self.query_norm(self.split(self.query(y))), *turn)
        k = rotate(self.key_norm(self.split(self.key(y))), *turn)
        x = x + self.out(attend(q, k, self.split(self.value(y))).transpose(1, 2).flatten(2))
        q, k, v = map(self.split, (self.cross_query(self.norm2(x)), self.cross_key(text), self.cross_value(text)))
        seen = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        x = x + self.cross_out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm3(x))

    def split(self, x):  # [rows, n, H * Dh] -> [rows, H, n, Dh]
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class TextHead(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(c.hidden_size), nn.Linear(c.hidden_size, c.channels * c.patch**2)

    def forward(self, x):
        return self.linear(self.norm(x))


def waves(times):  # [...] -> [..., 8]
    angle = times[..., None] * 2.0 ** torch.arange(4, device=times.device)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TextBackbone(Backbone):
    config_class = TextConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Conv2d(config.channels, config.hidden_size, config.patch, stride=config.patch)
        self.time = nn.Linear(8, config.hidden_size)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))

    def forward(self, x, times, condition, heads, history=None):
        batch, steps = x.shape[:2]
        rows = condition.repeat(steps)
        text = rows["tokens"].to(self.time.weight.dtype)
        planes = self.embed(x.flatten(0, 1).to(self.time.weight.dtype))  # [rows, D, H/P, W/P]
        time = self.time(waves(times.expand(batch, steps).reshape(-1, 1)).to(planes.dtype))
        tokens = torch.cat([time, planes.flatten(2).transpose(1, 2)], dim=1)
        turn = rotation(*planes.shape[2:], self.blocks[0].head_dim, x.device)
        for i, block in enumerate(self.blocks):

            def attend(q, k, v, i=i):
                if history is None or i >= history.layers:
                    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
                return history.attend_rows(i, q, k, v, image=slice(1, None))

            tokens = block(tokens, text=text, mask=rows["mask"], turn=turn, attend=attend)
        return self.unembed(apply_heads(heads, tokens[:, 1:]), x.shape[2:]).unflatten(0, (batch, steps))

    def new_head(self):
        return TextHead(self.config)

    def check_sample(self, sample_shape):
        c = self.config
        if len(sample_shape) != 3 or sample_shape[0] != c.channels or any(n < 1 or n % c.patch for n in sample_shape[1:]):
            raise InputError(
                f"samples of shape {tuple(sample_shape)}; this network takes ({c.channels}, {c.patch} m, {c.patch} n)"
            )

    def attention_shapes(self, layers, sample_shape):
        self.check_sample(sample_shape)
        tokens = math.prod(sample_shape[1:]) // self.config.patch**2
        return [AttentionShape(self.config.kv_heads, tokens, self.config.hidden_size // self.config.num_heads)] * layers

    def conditioning(self, times, condition):
        mask = condition["mask"][..., None]
        text = (condition["tokens"] * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.cat([waves(times), text], dim=-1)

    def unembed(self, tokens, sample_shape):  # [R, T, C * P * P] -> [R, C, H, W]
        rows = sample_shape[-2] // self.config.patch
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, -1)), self.config.patch)

    def features(self, x, times, condition, head, blocks):
        return [seen[:, 1:] for seen in super().features(x, times, condition, head, blocks)]


@dataclass(frozen=True)
class VideoConfig:
    channels: int = 2
    frames: int = 3
    height: int = 2
    width: int = 4
    hidden_size: int = 16
    depth: int = 2
    num_heads: int = 2
    num_classes: int = 4

    @property
    def sample_shape(self):
        return self.channels, self.frames, self.height, self.width

    def to_json(self):
        return dataclasses.asdict(self)


class VideoBlock(nn.Module):
    """Attention within frames, then between them: two attentions that remember."""

    def __init__(self, c):
        super().__init__()
        self.heads, width = c.num_heads, c.hidden_size
        self.qkv, self.out = (nn.ModuleList(nn.Linear(width, n * width) for _ in range(2)) for n in (3, 1))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, masks, attend):  # [rows, F * H * W, D], two bool [T, T]
        for i in range(2):
            q, k, v = self.qkv[i](self.norms[i](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + self.out[i](attend(i, q, k, v, masks[i]).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[2](x))


class VideoBackbone(Backbone):
    config_class = VideoConfig

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed, self.time = nn.Linear(c.channels, c.hidden_size), nn.Linear(8, c.hidden_size)
        self.label, self.place = (
            nn.Embedding(c.num_classes + 1, c.hidden_size),
            nn.Parameter(torch.randn(self.tokens, c.hidden_size)),
        )
        self.blocks = nn.ModuleList(VideoBlock(c) for _ in range(c.depth))

    @property
    def tokens(self):
        return math.prod(self.config.sample_shape[1:])

    @property
    def num_classes(self):
        return self.config.num_classes

    def forward(self, x, times, condition, heads, history=None):
        batch, steps = x.shape[:2]
        rows = self.conditioning(times.expand(batch, steps).flatten(), condition.repeat(steps))
        tokens = self.embed(x.flatten(0, 1).flatten(2).transpose(1, 2)) + self.place + rows[:, None]
        number = torch.arange(self.tokens, device=x.device)
        frame, place = number // (self.tokens // self.config.frames), number % (self.tokens // self.config.frames)
        masks = [kind[:, None] == kind for kind in (frame, place)]
        for i, block in enumerate(self.blocks):

            def attend(j, q, k, v, mask, i=i):
                if history is None or i >= history.layers:
                    return F.scaled_dot_product_attention(q, k, v, mask)
                return history.attend_rows(2 * i + j, q, k, v, attn_mask=mask)

            tokens = block(tokens, masks, attend)
        return self.unembed(apply_heads(heads, tokens), self.config.sample_shape).unflatten(0, (batch, steps))

    def new_head(self):
        return nn.Linear(self.config.hidden_size, self.config.channels)

    def attention_shapes(self, layers, sample_shape):
        self.check_sample(sample_shape)
        c = self.config
        return [AttentionShape(c.num_heads, self.tokens, c.hidden_size // c.num_heads)] * (2 * layers)

    def conditioning(self, times, condition):
        return self.time(waves(times)) + self.label(condition["label"])

    def unembed(self, tokens, sample_shape):
        return tokens.transpose(1, 2).unflatten(2, sample_shape[1:])
