"""`block_attention` by PyTorch's own attention kernels, exact and without a mask: the backend `merged`.

One call computes attention within all blocks at once, with blocks folded into the batch. One more call for each query block
covers its earlier blocks. The results are merged by log-sum-exp; the bias of earlier blocks is a number per head:

    lse = log(e^lse_own + e^(lse_earlier + bias)),   out = e^(lse_own - lse) out_own + e^(lse_earlier + bias - lse) out_earlier.

Backward calls the library's backward for the same parts with the merged out and lse, since it needs only P = e^(logits - lse)
and rowsum(grad * out); a part with a bias gets lse - bias.
Liu et al., "Ring Attention" (arXiv 2310.01889), merges in the same way.

B batch, H heads, Dh head size, T tokens_per_step, Sq and Sk blocks of queries and keys.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyard.ops import derivatives, library_attention
from pyard.ops.masks import MASKS, mask_number, visible_steps

# As in the kernels: e to this is 0, and no difference of two such numbers is NaN.
LEAST_BIAS = -1e30


def block_attention(
    q: Tensor,  # [B, H, Sq * T, Dh]
    k: Tensor,  # [B, H, Sk * T, Dh]
    v: Tensor,  # [B, H, Sk * T, Dh]
    tokens_per_step: int,
    mask: str,
    window: int | None,
    bias: Tensor | None,  # [H]
) -> Tensor:  # [B, H, Sq * T, Dh]
    """See `pyard.ops.block_attention`.

    Raises:
        InputError: If PyTorch has no kernel for q's device and dtype that returns a log-sum-exp.
    """
    library_attention.check(q)
    number, T = mask_number(mask), tokens_per_step
    if bias is None and not _parts(q, k, T, number, window):
        steps = q.shape[2] // T
        rows, keys, values = (_fold(x, steps) for x in (q, *_own_blocks(q, k, v)))
        return _unfold(F.scaled_dot_product_attention(rows, keys, values).to(q.dtype), steps)  # autocast narrows it
    if bias is not None:
        bias = bias.to(derivatives.accumulator(q.dtype))
    out: Tensor = torch.ops.pyard.merged_attention(q, k, v, T, number, window, bias)[0]
    return out


def _parts(q: Tensor, k: Tensor, T: int, mask: int, window: int | None) -> list[tuple[slice, slice]]:
    """Rows of q, and the rows of k in earlier blocks that they attend to.

    Neighbours with the same earlier blocks form one part.
    """
    first, key_steps = (k.shape[2] - q.shape[2]) // T, k.shape[2] // T
    parts = []

    def earlier(step: int) -> tuple[int, int]:
        steps = visible_steps(MASKS[mask], step, window)[:-1]  # contiguous under every mask
        return (steps[0], steps[-1] + 1) if steps else (0, 0)

    for (begin, end), steps in itertools.groupby(range(first, key_steps), key=earlier):
        if end > begin:
            queries = [step - first for step in steps]
            parts.append((slice(queries[0] * T, (queries[-1] + 1) * T), slice(begin * T, end * T)))
    return parts


def _own_blocks(q: Tensor, *keys: Tensor) -> list[Tensor]:
    return [x[:, :, x.shape[2] - q.shape[2] :] for x in keys]


def _fold(x: Tensor, steps: int) -> Tensor:
    """[B, H, steps * T, ...] to [B * steps, H, T, ...]; a view if the blocks of each sample are contiguous."""
    return x.unflatten(2, (steps, -1)).transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, steps: int) -> Tensor:
    """The inverse of `_fold`."""
    return x.unflatten(0, (-1, steps)).transpose(1, 2).flatten(2, 3)


@torch.library.custom_op("pyard::merged_attention", mutates_args=())
def _merged_attention(
    q: Tensor, k: Tensor, v: Tensor, tokens_per_step: int, mask: int, window: int | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse [B, H, Sq * T]), and with a bias, for its gradient, out_earlier - out_own and lse_own."""
    steps, T = q.shape[2] // tokens_per_step, tokens_per_step
    own, own_lse = library_attention.forward(*(_fold(x, steps) for x in (q, *_own_blocks(q, k, v))))
    own, own_lse = _unfold(own, steps), _unfold(own_lse, steps).contiguous()
    parts, found = _parts(q, k, T, mask, window), []
    earlier_lse = torch.full_like(own_lse, LEAST_BIAS)  # of queries that see no earlier block
    for queries, keys in parts:
        part, earlier_lse[:, :, queries] = library_attention.forward(q[:, :, queries], k[:, :, keys], v[:, :, keys])
        found.append(part)
    if bias is not None:
        earlier_lse += bias.clamp(min=LEAST_BIAS)[:, None]
    lse = torch.logaddexp(own_lse, earlier_lse)
    # Weights stay in the accumulator's dtype, products and sums are rounded to that of q.
    out = torch.mul(own, torch.exp(own_lse - lse)[..., None], out=derivatives.new_heads(q))
    weight = torch.exp(earlier_lse - lse)[..., None]
    for (queries, _), part in zip(parts, found, strict=True):
        out[:, :, queries].addcmul_(part, weight[:, :, queries])
    if bias is None:
        return out, lse, q.new_empty(0), lse.new_empty(0)
    difference = derivatives.new_heads(q).zero_()
    for (queries, _), part in zip(parts, found, strict=True):
        torch.sub(part, own[:, :, queries], out=difference[:, :, queries])
    return out, lse, difference, own_lse


@torch.library.custom_op("pyard::merged_attention_backward", mutates_args=())
def _merged_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    difference: Tensor,
    own_lse: Tensor,
    tokens_per_step: int,
    mask: int,
    window: int | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dbias [H], or [0] where there is no bias)."""
    steps, T = q.shape[2] // tokens_per_step, tokens_per_step
    dq, dk, dv = derivatives.new_heads(q), derivatives.new_heads(k).zero_(), derivatives.new_heads(v).zero_()
    k_own, v_own = _own_blocks(q, k, v)
    folded = [_fold(x, steps) for x in (grad, q, k_own, v_own, out, lse)]
    for target, share in zip((dq, *_own_blocks(q, dk, dv)), library_attention.backward(*folded), strict=True):
        target.copy_(_unfold(share, steps))
    # e^(logits + bias - lse): the bias goes to the other side.
    earlier_lse = lse if bias is None else lse - bias.clamp(min=LEAST_BIAS)[:, None]
    for queries, keys in _parts(q, k, T, mask, window):
        inputs = grad[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys], out[:, :, queries]
        shares = library_attention.backward(*inputs, earlier_lse[:, :, queries])
        for target, share in zip((dq[:, :, queries], dk[:, :, keys], dv[:, :, keys]), shares, strict=True):
            target += share
    if bias is None:
        return dq, dk, dv, lse.new_empty(0)
    # out = w out_earlier + (1 - w) out_own, where w is the softmax of a row's earlier keys: dout/dbias = w (1 - w) difference.
    towards_earlier = (grad.to(lse.dtype) * difference.to(lse.dtype)).sum(-1)
    weight = torch.exp(own_lse - lse)
    return dq, dk, dv, (weight * (1 - weight) * towards_earlier).sum((0, 2))


@_merged_attention.register_fake
def _shapes(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=derivatives.accumulator(q.dtype))
    learned = (q.new_empty(0), lse.new_empty(0)) if options[-1] is None else (derivatives.new_heads(q), torch.empty_like(lse))
    return derivatives.new_heads(q), lse, *learned


@_merged_attention_backward.register_fake
def _backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = 0 if rest[-1] is None else q.shape[1]
    return derivatives.new_heads(q), derivatives.new_heads(k), derivatives.new_heads(v), lse.new_empty(heads)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *ctx.options, bias = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, bias, *output)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, bias, *results = ctx.saved_tensors
    dq, dk, dv, dbias = torch.ops.pyard.merged_attention_backward(grad, q, k, v, *results, *ctx.options, bias)
    return dq, dk, dv, None, None, None, None if bias is None else dbias


def _save_for_second_order(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, q, k, v, _, _, _, _, *ctx.options, bias = inputs
    ctx.save_for_backward(grad, q, k, v, bias)


def _second_order(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    dgrad, dq, dk, dv, dbias = derivatives.attention_second_order(ctx.saved_tensors, ctx.options, cotangents)
    return dgrad, dq, dk, dv, *(None for _ in range(7)), dbias


_merged_attention.register_autograd(_backward, setup_context=_save_for_backward)
_merged_attention_backward.register_autograd(_second_order, setup_context=_save_for_second_order)
