"""Shapes and derivatives of the compiled operators: what PyTorch cannot learn from a schema."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyard.ops import reference


def register() -> None:
    """Registers them for every operator of the library that was just loaded."""
    register_fake, register_autograd = torch.library.register_fake, torch.library.register_autograd
    register_fake("pyard::modulated_layer_norm", _layer_norm_shapes)
    register_autograd("pyard::modulated_layer_norm", _layer_norm_backward, setup_context=_save_for_layer_norm_backward)
    register_fake("pyard::modulated_layer_norm_backward", _layer_norm_backward_shapes)
    register_autograd(
        "pyard::modulated_layer_norm_backward",
        _layer_norm_second_order,
        setup_context=_save_for_layer_norm_second_order,
    )
    register_fake("pyard::block_attention", _attention_shapes)
    register_autograd("pyard::block_attention", _attention_backward, setup_context=_save_for_attention_backward)
    register_fake("pyard::block_attention_backward", _attention_backward_shapes)
    register_autograd(
        "pyard::block_attention_backward", _attention_second_order, setup_context=_save_for_attention_second_order
    )


def _layer_norm_shapes(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _save_for_layer_norm_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    x, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, scale)


def _layer_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, scale = ctx.saved_tensors
    return *torch.ops.pyard.modulated_layer_norm_backward(grad, x, scale, ctx.eps), None


def _layer_norm_backward_shapes(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(scale.shape), x.new_empty(scale.shape)


def _save_for_layer_norm_second_order(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Any) -> None:
    grad, x, scale, ctx.eps = inputs
    ctx.save_for_backward(grad, x, scale)


def _layer_norm_second_order(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients of gradients are rare (penalties on them): the twin's derivative serves, at any order."""

    def twin(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return reference.modulated_layer_norm_backward(grad, x, scale, ctx.eps)

    pull_back: Any = torch.func.vjp(twin, *ctx.saved_tensors)[1]
    return *pull_back(cotangents), None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What the kernels add up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _new_heads(like: Tensor) -> Tensor:  # [B, H, tokens, Dh] over the memory of [B, tokens, H, Dh]
    B, H, tokens, head_dim = like.shape
    return like.new_empty(B, tokens, H, head_dim).transpose(1, 2)


def _attention_shapes(
    q: Tensor, k: Tensor, v: Tensor, tokens_per_step: int, mask: str, window: int | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _new_heads(q), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


def _save_for_attention_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options, bias = inputs
    out, log_sum_exp = output
    ctx.mark_non_differentiable(log_sum_exp)
    ctx.save_for_backward(q, k, v, bias, out, log_sum_exp)


def _attention_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, bias, out, log_sum_exp = ctx.saved_tensors
    dq, dk, dv, dbias = torch.ops.pyard.block_attention_backward(grad, q, k, v, out, log_sum_exp, *ctx.options, bias)
    return dq, dk, dv, None, None, None, None if bias is None else dbias


def _attention_backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = 0 if options[-1] is None else q.shape[1]
    return _new_heads(q), _new_heads(k), _new_heads(v), q.new_empty(heads, dtype=accumulator(q.dtype))


def _save_for_attention_second_order(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, q, k, v, _, _, *ctx.options, bias = inputs
    ctx.save_for_backward(grad, q, k, v, bias)


def _attention_second_order(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """As for the layer norm; `out` and `log_sum_exp` are functions of q, k, v, so these carry their share."""
    grad, q, k, v, bias = ctx.saved_tensors
    learned = () if bias is None else (bias,)

    def gradients(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        def forward(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
            return reference.block_attention(q, k, v, *ctx.options, *(bias or (None,)))

        pull_back: Any = torch.func.vjp(forward, *inputs)[1]
        return pull_back(grad)

    with sdpa_kernel(SDPBackend.MATH):
        pull_back: Any = torch.func.vjp(gradients, grad, q, k, v, *learned)[1]
        dgrad, dq, dk, dv, *dbias = pull_back(cotangents[: 3 + len(learned)])
    return dgrad, dq, dk, dv, None, None, None, None, None, dbias[0] if dbias else None
