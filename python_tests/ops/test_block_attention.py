from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyard.errors import InputError
from pyard.ops import MASKS, block_attention, visible


def closed_form(q: Tensor, k: Tensor, v: Tensor, T: int, mask: str, window: int | None, bias: Tensor | None = None) -> Tensor:
    """Softmax over a dense matrix of logits, built entry by entry from the predicate."""
    query_steps, key_steps = q.shape[2] // T, k.shape[2] // T
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    columns = []
    for row in range(q.shape[2]):
        step = key_steps - query_steps + row // T
        for column in range(k.shape[2]):
            entry = logits[:, :, row, column]
            if not visible(mask, step, column // T, window):
                entry = torch.full_like(entry, -math.inf)
            elif bias is not None and column // T != step:
                entry = entry + bias
            columns.append(entry)
    weights = torch.stack(columns, -1).unflatten(-1, logits.shape[2:]).softmax(-1)
    return weights @ v


def sample_inputs(query_steps: int, key_steps: int, T: int, head_dim: int, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(B, 3, steps * T, head_dim) for steps in (query_steps, key_steps, key_steps)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("query_steps", "key_steps"), [(4, 4), (1, 4), (2, 5), (1, 1)])
def test_matches_dense_attention(query_steps: int, key_steps: int, mask: str, with_bias: bool) -> None:
    inputs = sample_inputs(query_steps, key_steps, T=3, head_dim=8)
    window = 2 if mask == "window" else None
    bias = torch.tensor([0.7, -1.3, 2.1], dtype=torch.float64, requires_grad=True) if with_bias else None
    leaves = (*inputs, bias) if bias is not None and mask != "diagonal" and key_steps > 1 else inputs
    ours = block_attention(*inputs, 3, mask, window, bias)
    exact = closed_form(*inputs, 3, mask, window, bias)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(exact, leaves, grad), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("head_dim", [8, 72])
def test_slices_of_a_fused_projection_and_float32(head_dim: int) -> None:
    B, H, S, T = 2, 3, 3, 5
    fused = torch.randn(B, S * T, 3, H, head_dim)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    exact = closed_form(q.double(), k.double(), v.double(), T, "causal", None)
    torch.testing.assert_close(block_attention(q, k, v, T), exact.float(), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_passes() -> None:
    q, k, v = sample_inputs(1, 2, T=3, head_dim=8, B=0)
    assert block_attention(q, k, v, 3).shape == (0, 3, 3, 8)


def test_wrong_input_is_named() -> None:
    q, k, v = sample_inputs(2, 2, T=3, head_dim=8)
    with pytest.raises(InputError, match=r"q, k, v have shapes \[2, 3, 6, 8\], \[2, 3, 6, 8\], \[2, 3, 3, 8\]"):
        block_attention(q, k, v[:, :, :3], 3)
    with pytest.raises(InputError, match="6 queries and 6 keys, expected multiples of tokens_per_step = 4"):
        block_attention(q, k, v, 4)
    with pytest.raises(InputError, match="1 <= query blocks <= key blocks"):
        block_attention(q, k[:, :, :3], v[:, :, :3], 3)
    with pytest.raises(InputError, match=r"bias has shape \[2\], expected \[3\]"):
        block_attention(q, k, v, 3, bias=torch.zeros(2))
    with pytest.raises(InputError, match="expected one of diagonal"):
        block_attention(q, k, v, 3, "dense")
