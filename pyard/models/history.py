"""The keys and values that a student's lowest layers remember: an explicit cache, passed in and returned.

N history layers · B batch · H heads · S steps · T tokens per step · Dh head dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class HistoryCache(Protocol):
    """What a cached step needs: room for its own keys and values behind those of the earlier steps."""

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [B, H, T, Dh] twice -> [B, H, steps*T, Dh] twice
        """Append one step's keys and values to a layer; return all of that layer's so far."""
        ...

    def advance(self, tokens: int) -> HistoryCache:
        """The cache after a step of `tokens` tokens, ready for the next."""
        ...


@dataclass
class PreallocatedCache:
    """One buffer for all steps, written in place: for sampling.

    Args:
        keys, values: [N, B, H, S*T, Dh].
        length: tokens that earlier steps have filled.
    """

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> PreallocatedCache:
        return PreallocatedCache(self.keys, self.values, self.length + tokens)


class ConcatenatingCache:
    """Tensors grown by concatenation: for autograd through a rollout and for export, which dislike writes in place."""

    def __init__(self, past: list[tuple[torch.Tensor, torch.Tensor]] | None = None):
        self.past = past or []  # per layer: keys and values of the earlier steps, [B, H, steps*T, Dh]
        self.present: list[tuple[torch.Tensor, torch.Tensor]] = []

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.past:
            k = torch.cat([self.past[layer][0], k], dim=2)
            v = torch.cat([self.past[layer][1], v], dim=2)
        self.present.append((k, v))
        return k, v

    def advance(self, tokens: int) -> ConcatenatingCache:
        return ConcatenatingCache(self.present)
