"""The history of networks that fold steps into the batch: sliced attention against one dense mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pyard.models.history import ConcatenatingCache, History
from pyard.ops.masks import visible

B, H, S, T, TEXT, WIDTH = 2, 4, 3, 5, 2, 8
IMAGE = slice(TEXT, TEXT + T)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: torch.Tensor, history: History) -> torch.Tensor:
    """Every step's queries over the image keys of all steps and its own keys, with one float mask."""
    rows = []
    for b in range(B):
        for s in range(S):
            row = b * S + s
            earlier = [p for p in range(s) if visible(history.mask, s, p, history.window)]
            keys = torch.cat([*(k[b * S + p, :, IMAGE] for p in earlier), k[row]], dim=1)
            values = torch.cat([*(v[b * S + p, :, IMAGE] for p in earlier), v[row]], dim=1)
            mask = torch.zeros(H, q.shape[2], keys.shape[1])
            mask[:, :, -k.shape[2] :] += torch.where(own[row], 0.0, -torch.inf)
            if history.bias is not None:
                mask[:, :, : -k.shape[2]] += history.bias[0][:, None, None]
            groups = H // k.shape[1]
            seen_k, seen_v = (t.repeat_interleave(groups, dim=0) for t in (keys, values))
            rows.append(F.scaled_dot_product_attention(q[row], seen_k, seen_v, mask))
    return torch.stack(rows)


@pytest.mark.parametrize("heads", [H, 2], ids=["all heads", "grouped"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("settings", [dict(mask="causal"), dict(mask="anchor"), dict(mask="window", window=2)], ids=str)
# A mask for every row and key; for every row, the same for all keys (all are seen); for every query.
@pytest.mark.parametrize("shape", [(B * S, 1, 1, TEXT + T), (B * S, 1, 1, 1), (1, 1, TEXT + T, 1), None], ids=str)
def test_slices_equal_one_dense_mask(shape: Any, settings: dict[str, Any], biased: bool, heads: int) -> None:
    q, (k, v) = torch.randn(B * S, H, TEXT + T, WIDTH), torch.randn(2, B * S, heads, TEXT + T, WIDTH)
    mask = None
    if shape is not None:
        mask = torch.rand(shape) < 0.7 if shape[-1] > 1 else torch.ones(shape, dtype=torch.bool)
    own = (
        torch.ones(B * S, 1, TEXT + T, TEXT + T, dtype=torch.bool)
        if mask is None
        else mask.expand(B * S, 1, TEXT + T, TEXT + T)
    )
    bias = torch.randn(1, H) if biased else None
    history = History(1, S, bias=bias, **settings)
    expected = dense(q, k, v, own, history)
    found = history.attend_rows(0, q, k, v, image=IMAGE, attn_mask=mask)
    torch.testing.assert_close(found, expected)
    # Step by step through the cache.
    cache, steps = ConcatenatingCache(), []
    for s in range(S):
        one = History(1, 1, bias=bias, cache=cache, **settings)
        rows = None if mask is None or len(mask) == 1 else mask.unflatten(0, (B, S))[:, s]
        pieces = (t.unflatten(0, (B, S))[:, s] for t in (q, k, v))
        steps.append(one.attend_rows(0, *pieces, image=IMAGE, attn_mask=mask if rows is None else rows))
        cache = cache.advance()
    torch.testing.assert_close(torch.stack(steps, dim=1).flatten(0, 1), expected)
    alone = History(1, S, mask="diagonal").attend_rows(0, q, k, v, image=IMAGE, attn_mask=mask)
    assert (found.unflatten(0, (B, S))[:, 1:] - alone.unflatten(0, (B, S))[:, 1:]).abs().max() > 1e-2  # the history is seen
