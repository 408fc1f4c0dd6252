"""Backbones that are not pyard's, to be traced: one with cross-attention to any number of tokens, and a video toy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pyard.conditions import Condition
from pyard.models.backbone import AttentionShape, Backbone, apply_heads


@dataclasses.dataclass(frozen=True)
class MyConfig:
    height: int = 8
    width: int = 4
    hidden_size: int = 16
    depth: int = 3
    num_heads: int = 2

    @property
    def sample_shape(self):
        return (1, self.height, self.width)

    def to_json(self):
        return dataclasses.asdict(self)


class MyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, width = config.num_heads, config.hidden_size
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.context = nn.Linear(width, width), nn.Linear(8, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width))

    def forward(self, x, text, mask, attend):  # x [rows, T, D]
        q, k, v = self.split(self.qkv(self.norm1(x)), 3)
        x = x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        (q,), (k, v) = self.split(self.query(self.norm2(x)), 1), self.split(self.context(text), 2)
        x = x + F.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2).flatten(2)
        return x + self.mlp(self.norm3(x))

    def split(self, x, parts):  # [rows, n, parts * D] -> parts times [rows, H, n, Dh]
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)


class MyHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(config.hidden_size), nn.Linear(config.hidden_size, 1)

    def forward(self, x):
        return self.linear(self.norm(x))


class MyBackbone(Backbone):
    """The backbone of docs/own-teacher.md, in a module so that a command can import it."""

    config_class = MyConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(1, config.hidden_size)
        self.place = nn.Parameter(torch.randn(config.height * config.width, config.hidden_size))
        self.time = nn.Linear(1, config.hidden_size)
        self.blocks = nn.ModuleList(MyBlock(config) for _ in range(config.depth))

    def forward(self, x, times, condition, heads, history=None):
        batch, steps = x.shape[:2]
        rows = condition.repeat(steps)  # each row S times, as x.flatten(0, 1) has them
        times = times.expand(batch, steps).reshape(-1, 1, 1).to(x.dtype)
        tokens = self.embed(x.flatten(0, 1).flatten(2).transpose(1, 2)) + self.place + self.time(times)
        for i, block in enumerate(self.blocks):
            attend = F.scaled_dot_product_attention
            if history is not None and i < history.layers:
                attend = lambda q, k, v, i=i: history.attend_rows(i, q, k, v)  # noqa: E731
            tokens = block(tokens, rows["tokens"], rows["mask"], attend)
        return self.unembed(apply_heads(heads, tokens), self.config.sample_shape).unflatten(0, (batch, steps))

    def new_head(self):
        return MyHead(self.config)

    def unembed(self, tokens, sample_shape):
        return tokens.transpose(1, 2).unflatten(2, sample_shape[1:])

    def attention_shapes(self, layers, sample_shape):
        self.check_sample(sample_shape)
        head_dim = self.config.hidden_size // self.config.num_heads
        return [AttentionShape(self.config.num_heads, self.config.height * self.config.width, head_dim)] * layers

    def conditioning(self, times, condition):
        weights = condition["mask"] / condition["mask"].sum(dim=1, keepdim=True)
        text = (condition["tokens"] * weights[..., None]).sum(dim=1)
        return torch.cat([times[:, None], text], dim=1)


class SpecialisingBackbone(MyBackbone):
    """len() of a tensor makes a constant of its size."""

    def forward(self, x, times, condition, heads, history=None):
        count = len(condition["mask"][0])
        shorter = Condition({"tokens": condition["tokens"][:, :count], "mask": condition["mask"][:, :count]})
        return super().forward(x, times, shorter, heads, history)


class BesselBackbone(MyBackbone):
    """ONNX has no Bessel functions."""

    def forward(self, x, times, condition, heads, history=None):
        return super().forward(torch.special.bessel_j0(x), times, condition, heads, history)


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    frames: int = 2
    hidden_size: int = 16
    depth: int = 2
    num_heads: int = 4
    kv_heads: int = 2

    @property
    def sample_shape(self):
        return (2, self.frames, 2, 4)

    def to_json(self):
        return dataclasses.asdict(self)


class VideoBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_heads
        self.norm, self.query = nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, config.hidden_size)
        self.key, self.value = (nn.Linear(config.hidden_size, config.kv_heads * self.head_dim) for _ in range(2))
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, mask, attend):  # [rows, 1 + T, D]
        q, k, v = (
            layer(self.norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return x + self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class VideoBackbone(Backbone):
    """Class-conditional, samples [C, F, H, W]: grouped-query attention, a token of the condition in front, a mask."""

    config_class = VideoConfig
    num_classes: Any = 4

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed, self.time = nn.Linear(2, config.hidden_size), nn.Linear(1, config.hidden_size)
        self.label = nn.Embedding(5, config.hidden_size)
        self.place = nn.Parameter(torch.randn(math.prod(config.sample_shape[1:]), config.hidden_size))
        self.blocks = nn.ModuleList(VideoBlock(config) for _ in range(config.depth))

    def forward(self, x, times, condition, heads, history=None):
        batch, steps = x.shape[:2]
        first = self.conditioning(times.expand(batch, steps).flatten(), condition.repeat(steps))
        tokens = self.embed(x.flatten(0, 1).flatten(2).transpose(1, 2)) + self.place
        tokens = torch.cat([first[:, None].to(tokens.dtype), tokens], dim=1)
        number = torch.arange(tokens.shape[1], device=x.device)
        mask = (number[:, None] >= number).to(tokens.dtype) - 1  # float: an earlier token is less visible to a later one

        def attend_within(q, k, v, mask):
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

        for i, block in enumerate(self.blocks):
            attend = attend_within
            if history is not None and i < history.layers:

                def attend(q, k, v, mask, i=i):
                    return history.attend_rows(i, q, k, v, image=slice(1, None), attn_mask=mask)

            tokens = block(tokens, mask, attend)
        return self.unembed(apply_heads(heads, tokens[:, 1:]), self.config.sample_shape).unflatten(0, (batch, steps))

    def new_head(self):
        return nn.Linear(self.config.hidden_size, 2)

    def unembed(self, tokens, sample_shape):
        return tokens.transpose(1, 2).unflatten(2, sample_shape[1:])

    def attention_shapes(self, layers, sample_shape):
        self.check_sample(sample_shape)
        head_dim = self.config.hidden_size // self.config.num_heads
        return [AttentionShape(self.config.kv_heads, math.prod(sample_shape[1:]), head_dim)] * layers

    def conditioning(self, times, condition):
        return self.time(times[:, None]) + self.label(condition["label"])  # float32, whatever the weights are
