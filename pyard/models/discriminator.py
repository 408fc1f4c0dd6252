"""Discriminators of features: small 1-D convolutional heads, one for each chosen block of a frozen transformer.

Spectral norm (Miyato et al. 2018) on every convolution, batch norm over virtual batches, projection on the conditioning
(Miyato & Koyama 2018): the heads of ARD's adversarial stage, which are those of StyleGAN-T (Sauer et al. 2023, section 3.2)
on a DiT.

    B batch · K heads · T tokens · D hidden of the frozen network · W width of the heads
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from pyard.errors import InputError


class VirtualBatchNorm(nn.Module):
    """Batch norm over consecutive groups of samples: statistics that depend on neither the batch size nor the processes.

    There are no running statistics: a discriminator is of no use outside its training.

    Args:
        width: W.
        group: samples that are normalised together.
    """

    def __init__(self, width: int, group: int, eps: float = 1e-5):
        super().__init__()
        self.group, self.eps = group, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, W, T] -> [B, W, T]
        if len(x) % self.group:
            raise InputError(f"virtual batches of {self.group} samples do not fit a batch of {len(x)}; expected a multiple")
        groups = x.unflatten(0, (-1, self.group))  # [G, group, W, T]
        variance, mean = torch.var_mean(groups, dim=(1, 3), keepdim=True, correction=0)
        normal = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(0, 1)
        return normal * self.weight[:, None] + self.bias[:, None]


class _Layer(nn.Module):
    """Spectral-norm convolution along the tokens, which are a ring, then virtual batch norm and a leaky ReLU."""

    def __init__(self, channels: int, width: int, kernel_size: int, group: int):
        super().__init__()
        padding = kernel_size // 2
        self.conv = spectral_norm(nn.Conv1d(channels, width, kernel_size, padding=padding, padding_mode="circular"))
        self.norm = VirtualBatchNorm(width, group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, channels, T] -> [B, W, T]
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


class DiscriminatorHead(nn.Module):
    """One head: k = 1, residual layers of k = `kernel_size`, and logits projected on the conditioning.

    Args:
        hidden_size: D of the features.
        width: W.
        depth: residual layers.
        kernel_size: odd.
        group: samples of a virtual batch.
        condition_size: E of the conditioning; None: D.
    """

    def __init__(
        self, hidden_size: int, width: int, depth: int, kernel_size: int, group: int, condition_size: int | None = None
    ):
        super().__init__()
        self.first = _Layer(hidden_size, width, 1, group)
        self.residual = nn.ModuleList(_Layer(width, width, kernel_size, group) for _ in range(depth))
        self.last = spectral_norm(nn.Conv1d(width, width, 1))
        self.project = nn.Linear(condition_size or hidden_size, width)

    def forward(
        self,
        features: torch.Tensor,  # [B, T, D]
        condition: torch.Tensor,  # [B, E]
    ) -> tuple[torch.Tensor, torch.Tensor]:  # logits [B, T] and hidden features [B, W, T]
        x = self.first(features.transpose(1, 2))
        for layer in self.residual:
            x = (x + layer(x)) / math.sqrt(2)
        projection = self.project(condition) / math.sqrt(x.shape[1])  # [B, W]
        return (self.last(x) * projection[:, :, None]).sum(dim=1), x


class Discriminator(nn.Module):
    """K heads for the features of K blocks.

    Args:
        count: K.
        hidden_size, condition_size, width, depth, kernel_size, group: see `DiscriminatorHead`.
    """

    def __init__(
        self,
        count: int,
        hidden_size: int,
        *,
        condition_size: int | None = None,
        width: int,
        depth: int,
        kernel_size: int,
        group: int,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise InputError(f"discriminator: kernel_size is {kernel_size}; expected an odd number")
        self.heads = nn.ModuleList(
            DiscriminatorHead(hidden_size, width, depth, kernel_size, group, condition_size) for _ in range(count)
        )

    def forward(
        self,
        features: Sequence[torch.Tensor],  # K times [B, T, D]
        condition: torch.Tensor,  # [B, E]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:  # logits [B, K, T] and K times [B, W, T]
        pairs = [head(x, condition) for head, x in zip(self.heads, features, strict=True)]
        return torch.stack([logits for logits, _ in pairs], dim=1), [hidden for _, hidden in pairs]
