"""The history of a student's lowest layers: the cache of keys and values, and the attention that uses it.

The cache is explicit: it is passed in and returned.

    A attentions with a history · B batch · H heads · S steps · T tokens per step · Dh head dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from pyard import ops
from pyard.errors import InputError
from pyard.ops.masks import Mask, visible_steps


class HistoryCache(Protocol):
    """The cache that a step needs: it appends the step's keys and values to those of earlier steps."""

    def extend(
        self, attention: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [B, H, T, Dh] twice -> [B, H, steps*T, Dh] twice
        """Append one step's keys and values to those of an attention; return all that this attention has so far."""
        ...

    def advance(self) -> HistoryCache:
        """The cache for the next step."""
        ...


@dataclass
class PreallocatedCache:
    """One buffer for all steps, written in place: for sampling.

    Args:
        keys, values: keys and values of each attention, [B, H, S*T, Dh].
        num_steps: S.
        step: number of steps in the buffers so far.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    num_steps: int
    step: int = 0

    def extend(self, attention: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = k.shape[2]
        begin, end = self.step * tokens, (self.step + 1) * tokens
        self.keys[attention][:, :, begin:end] = k
        self.values[attention][:, :, begin:end] = v
        return self.keys[attention][:, :, :end], self.values[attention][:, :, :end]

    def advance(self) -> PreallocatedCache:
        return PreallocatedCache(self.keys, self.values, self.num_steps, self.step + 1)


class ConcatenatingCache:
    """Tensors that grow by concatenation: for autograd through a rollout and for export, which cannot use in-place writes.

    Args:
        past: keys and values of the earlier steps for each attention, [B, H, steps*T, Dh]; None: there are none yet.
    """

    def __init__(self, past: list[tuple[torch.Tensor, torch.Tensor]] | None = None):
        self.past = past or []
        self.present: list[tuple[torch.Tensor, torch.Tensor]] = []

    def extend(self, attention: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.past:
            k = torch.cat([self.past[attention][0], k], dim=2)
            v = torch.cat([self.past[attention][1], v], dim=2)
        self.present.append((k, v))
        return k, v

    def advance(self) -> ConcatenatingCache:
        return ConcatenatingCache(self.present)


@dataclass(frozen=True)
class History:
    """The attention of a student's lowest layers during one pass. A backbone calls it for each attention, in order of
    execution.

    Args:
        layers: N, the number of lowest blocks with a history.
        steps: number of steps in this pass: S in the parallel pass, 1 in a cached one.
        mask, window: which earlier steps a step sees; see `pyard.ops.masks.visible`.
        bias: [A, H], added to the logits of earlier steps' keys; None: nothing is added.
        cache: keys and values of the earlier steps; None in the parallel pass.
    """

    layers: int
    steps: int
    mask: Mask
    window: int | None = None
    bias: torch.Tensor | None = None
    cache: HistoryCache | None = None

    def attend(
        self,
        attention: int,
        q: torch.Tensor,  # [B, H, steps*T, Dh]
        k: torch.Tensor,  # [B, H, steps*T, Dh]
        v: torch.Tensor,  # [B, H, steps*T, Dh]
    ) -> torch.Tensor:  # [B, H, steps*T, Dh]
        """Attention over the concatenated steps of each sample, by pyard's own operator."""
        tokens = q.shape[2] // self.steps
        if self.cache is not None:
            k, v = self.cache.extend(attention, k, v)
        bias = None if self.bias is None else self.bias[attention]
        return ops.block_attention(q, k, v, tokens, mask=self.mask, window=self.window, bias=bias)

    def attend_rows(
        self,
        attention: int,
        q: torch.Tensor,  # [B*steps, H, Q, Dh]
        k: torch.Tensor,  # [B*steps, Hk, K, Dh], H a multiple of Hk
        v: torch.Tensor,  # [B*steps, Hk, K, Dh]
        *,
        image: slice = slice(None),
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:  # [B*steps, H, Q, Dh]
        """Scaled dot-product attention that also sees the image keys of earlier steps, in front of its own.

        For networks that fold steps into the batch, so that consecutive rows are the steps of one sample. Attention is computed
        step by step, so no mask over steps is needed.

        Args:
            attention: number of the attention with a history, in order of execution.
            q, k, v: as scaled_dot_product_attention takes them, after normalisation and rotary embedding.
            image: position of the image tokens among the keys; other tokens, such as text, are not kept for later steps.
            attn_mask: bool or float, broadcastable to [B*steps, H, Q, K]; earlier keys are visible to all queries.
            scale: factor of the logits; None: 1 / sqrt(Dh).

        Raises:
            InputError: the backbone calls more attentions than it declared.
        """
        if self.bias is not None and attention >= len(self.bias):
            raise InputError(
                f"history: attention {attention} has a history, but the student was made for {len(self.bias)} of them"
            )
        steps = self.steps
        queries, keys, values = (tensor.unflatten(0, (-1, steps)).unbind(1) for tensor in (q, k, v))
        masks = [attn_mask] * steps
        if attn_mask is not None and attn_mask.ndim == 4 and len(attn_mask) == len(q) and steps > 1:
            masks = list(attn_mask.unflatten(0, (-1, steps)).unbind(1))
        bias = None if self.bias is None else self.bias[attention]
        cache = ConcatenatingCache() if self.cache is None else self.cache
        outputs = []
        for step in range(steps):
            image_k, image_v = keys[step][:, :, image], values[step][:, :, image]
            seen_k, seen_v = cache.extend(0 if self.cache is None else attention, image_k, image_v)
            tokens = image_k.shape[2]
            earlier = visible_steps(self.mask, seen_k.shape[2] // tokens - 1, self.window)[:-1]
            key, value = (
                torch.cat([*(seen[:, :, s * tokens : (s + 1) * tokens] for s in earlier), own], dim=2)
                for seen, own in ((seen_k, keys[step]), (seen_v, values[step]))
            )
            added = len(earlier) * tokens
            mask = _with_history(masks[step], added, key.shape[2], bias, queries[step])
            gqa = queries[step].shape[1] != key.shape[1]
            outputs.append(F.scaled_dot_product_attention(queries[step], key, value, mask, scale=scale, enable_gqa=gqa))
            if self.cache is None:
                cache = cache.advance()
        return torch.stack(outputs, dim=1).flatten(0, 1)


def _with_history(
    mask: torch.Tensor | None,  # bool or float, [.., K] of the own keys
    added: int,  # keys in front of them
    total: int,  # added + K
    bias: torch.Tensor | None,  # [H]
    q: torch.Tensor,  # [B, H, Q, Dh], for dtype and device
) -> torch.Tensor | None:
    if not added:
        return mask
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], total - added)  # one entry for all own keys says nothing of the earlier ones
        mask = F.pad(mask, (added, 0), value=True if mask.dtype == torch.bool else 0.0)
    if bias is None:
        return mask
    # Finite, because the bias that switches a history off may be -inf, and a row with only -inf would give NaN.
    finite = bias.clamp(min=torch.finfo(q.dtype).min / 2).to(q.dtype)
    earlier = torch.arange(total, device=q.device) < added
    biased = torch.where(earlier, finite[:, None], finite.new_zeros(()))[None, :, None]  # [1, H, 1, total]
    if mask is None:
        return biased
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return biased + mask
