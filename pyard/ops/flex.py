"""`block_attention` by PyTorch's FlexAttention: the backend `flex`, for CUDA. On the CPU it has no backward pass.

Dong et al., "Flex Attention" (arXiv 2412.05496).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from pyard.ops.masks import visible


def block_attention(
    q: Tensor,  # [B, H, Sq * T, Dh]
    k: Tensor,  # [B, H, Sk * T, Dh]
    v: Tensor,  # [B, H, Sk * T, Dh]
    tokens_per_step: int,
    mask: str,
    window: int | None,
    bias: Tensor | None,  # [H]
) -> Tensor:  # [B, H, Sq * T, Dh]
    """See `pyard.ops.block_attention`."""
    T = tokens_per_step
    query_steps, key_steps = q.shape[2] // T, k.shape[2] // T
    offset = key_steps - query_steps
    block_mask = _block_mask(query_steps, key_steps, T, mask, window, q.device)

    def with_bias(score: Tensor, b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        assert bias is not None
        return torch.where(q_index // T + offset == kv_index // T, score, score + bias[h])

    attend: Any = _compiled() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    out: Tensor = attend(q, k, v, score_mod=None if bias is None else with_bias, block_mask=block_mask)
    return out


@functools.cache
def _compiled() -> Any:
    # One graph for each shape: a student has few, and dynamic ones are slower.
    return torch.compile(flex_attention, dynamic=False)


@torch.compiler.disable
@functools.lru_cache(maxsize=64)
def _block_mask(
    query_steps: int, key_steps: int, tokens: int, mask: str, window: int | None, device: torch.device
) -> BlockMask:
    steps = range(key_steps - query_steps, key_steps)
    with torch.inference_mode(False):  # a mask that sampling made must serve training, too
        seen = torch.tensor([[visible(mask, step, key, window) for key in range(key_steps)] for step in steps], device=device)

        def shows(b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
            return seen[q_index // tokens, kv_index // tokens]

        return create_block_mask(shows, None, None, query_steps * tokens, key_steps * tokens, device=str(device))
