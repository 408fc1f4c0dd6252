"""Shapes and derivatives of the compiled operators, which PyTorch cannot derive from a schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyard.ops import reference
from pyard.ops.masks import MASKS


def register() -> None:
    """Registers shapes and derivatives for every operator of the library that was just loaded."""
    register_fake, register_autograd = torch.library.register_fake, torch.library.register_autograd
    register_fake("pyard::modulated_layer_norm", _layer_norm_shapes)
    register_autograd("pyard::modulated_layer_norm", _layer_norm_backward, setup_context=_save_for_layer_norm_backward)
    register_fake("pyard::modulated_layer_norm_backward", _layer_norm_backward_shapes)
    _differentiate_as("pyard::modulated_layer_norm_backward", reference.modulated_layer_norm_backward)
    register_fake("pyard::block_attention", _attention_shapes)
    register_autograd("pyard::block_attention", _attention_backward, setup_context=_save_for_attention_backward)
    for operator in ("pyard::block_attention_backward", "pyard::block_attention_backward_unordered"):
        register_fake(operator, _attention_backward_shapes)
        register_autograd(operator, _attention_second_order, setup_context=_save_for_attention_second_order)
    register_fake("pyard::gated_residual", lambda x, gate, branch: x.new_empty(x.shape))
    register_autograd("pyard::gated_residual", _residual_backward, setup_context=_save_for_residual_backward)
    register_fake("pyard::gated_residual_backward", _residual_backward_shapes)
    _differentiate_as("pyard::gated_residual_backward", reference.gated_residual_backward)
    register_fake("pyard::gelu_tanh", lambda x, bias: x.new_empty(x.shape))
    register_autograd("pyard::gelu_tanh", _gelu_backward, setup_context=_save_for_gelu_backward)
    register_fake("pyard::gelu_tanh_backward", lambda grad, x, bias: (x.new_empty(x.shape), bias.new_empty(bias.shape)))
    _differentiate_as("pyard::gelu_tanh_backward", reference.gelu_tanh_backward)
    register_fake("pyard::timestep_embedding", _embedding_shapes)
    register_autograd("pyard::timestep_embedding", _embedding_backward, setup_context=_save_for_embedding_backward)
    register_fake("pyard::gather_trajectories", _gather_shapes)
    fused = "pyard::gated_residual_modulated_layer_norm"
    register_fake(fused, lambda x, gate, *_: (x.new_empty(x.shape), gate.new_empty(x.shape)))
    register_autograd(fused, _fused_backward, setup_context=_save_for_fused_backward)
    register_fake(f"{fused}_backward", _fused_backward_shapes)
    _differentiate_as(f"{fused}_backward", reference.gated_residual_modulated_layer_norm_backward)


def _differentiate_as(operator: str, plain: Callable[..., tuple[Tensor, ...]]) -> None:
    """Registers the derivative of a backward operator as that of its plain PyTorch version, which works to any order.

    Gradients of gradients are rare (gradient penalties), so they need not be fast.

    The plain version computes in the widest dtype of its inputs; each result has the dtype that the operator gives it.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.options = [value for value in inputs if not isinstance(value, Tensor)]
        ctx.dtypes = [value.dtype for value in output]

    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        def results(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(value.to(dtype) for value, dtype in zip(plain(*tensors, *ctx.options), ctx.dtypes, strict=True))

        pull_back: Any = torch.func.vjp(results, *ctx.saved_tensors)[1]
        return *pull_back(cotangents), *(None for _ in ctx.options)

    torch.library.register_autograd(operator, backward, setup_context=save)


# x and the residual may be float32 where all else has 16 bits.


def _layer_norm_shapes(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return scale.new_empty(x.shape)


def _save_for_layer_norm_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    x, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, scale)


def _layer_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, scale = ctx.saved_tensors
    return *torch.ops.pyard.modulated_layer_norm_backward(grad, x, scale, ctx.eps), None


def _layer_norm_backward_shapes(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the kernels accumulate."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_heads(like: Tensor) -> Tensor:  # [B, H, tokens, Dh] over the memory of [B, tokens, H, Dh]
    B, H, tokens, head_dim = like.shape
    return like.new_empty(B, tokens, H, head_dim).transpose(1, 2)


def _attention_shapes(
    q: Tensor, k: Tensor, v: Tensor, tokens_per_step: int, mask: int, window: int | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return new_heads(q), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


def _save_for_attention_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options, bias = inputs
    out, log_sum_exp = output
    ctx.mark_non_differentiable(log_sum_exp)
    ctx.save_for_backward(q, k, v, bias, out, log_sum_exp)


def _attention_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, bias, out, log_sum_exp = ctx.saved_tensors
    operator = torch.ops.pyard.block_attention_backward
    if q.is_cuda and not torch.are_deterministic_algorithms_enabled():
        operator = torch.ops.pyard.block_attention_backward_unordered
    dq, dk, dv, dbias = operator(grad, q, k, v, out, log_sum_exp, *ctx.options, bias)
    return dq, dk, dv, None, None, None, None if bias is None else dbias


def _attention_backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = 0 if options[-1] is None else q.shape[1]
    return new_heads(q), new_heads(k), new_heads(v), q.new_empty(heads, dtype=accumulator(q.dtype))


def _save_for_attention_second_order(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, q, k, v, _, _, *ctx.options, bias = inputs
    ctx.save_for_backward(grad, q, k, v, bias)


def _attention_second_order(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    dgrad, dq, dk, dv, dbias = attention_second_order(ctx.saved_tensors, ctx.options, cotangents)
    return dgrad, dq, dk, dv, None, None, None, None, None, dbias


def attention_second_order(
    inputs: tuple[Tensor, ...],  # grad, q, k, v, and bias or None
    options: list[Any],  # tokens_per_step, number of the mask, window
    cotangents: tuple[Tensor, ...],  # of dq, dk, dv and dbias
) -> tuple[Tensor | None, ...]:
    """As `_differentiate_as`, for attention. What forward saved depends on q, k and v, so their gradients include that path.

    Returns:
        The gradients of grad, q, k, v and bias.
    """
    grad, q, k, v, bias = inputs
    tokens_per_step, mask, window = options
    learned = () if bias is None else (bias,)

    def gradients(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        def forward(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
            return reference.block_attention(q, k, v, tokens_per_step, MASKS[mask], window, *(bias or (None,)))

        pull_back: Any = torch.func.vjp(forward, *inputs)[1]
        return pull_back(grad)

    with sdpa_kernel(SDPBackend.MATH):
        pull_back: Any = torch.func.vjp(gradients, grad, q, k, v, *learned)[1]
        dgrad, dq, dk, dv, *dbias = pull_back(cotangents[: 3 + len(learned)])
    return dgrad, dq, dk, dv, dbias[0] if dbias else None


def _save_for_residual_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _residual_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad, *torch.ops.pyard.gated_residual_backward(grad, *ctx.saved_tensors)


def _residual_backward_shapes(grad: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), branch.new_empty(branch.shape)


def _save_for_gelu_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    dx, dbias = torch.ops.pyard.gelu_tanh_backward(grad, *ctx.saved_tensors)
    return dx, dbias


def _embedding_shapes(times: Tensor, dim: int, max_period: float, freq_shift: float) -> Tensor:
    return times.new_empty(*times.shape, dim, dtype=torch.float32)


def _save_for_embedding_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    times, *ctx.options = inputs
    ctx.save_for_backward(times)


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    # Times are a handful of numbers and seldom learned, so this has no kernel.
    pull_back: Any = torch.func.vjp(lambda times: reference.timestep_embedding(times, *ctx.options), *ctx.saved_tensors)[1]
    return *pull_back(grad), None, None, None


def _gather_shapes(noise: Tensor, steps: Tensor, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (indices.shape[0], *steps.shape[1:])
    return steps.new_empty(shape, dtype=dtype), steps.new_empty(shape, dtype=dtype)


def _save_for_fused_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, gate, branch, _, scale, ctx.eps = inputs
    ctx.save_for_backward(output[0], gate, branch, scale)


def _fused_backward(ctx: Any, grad_residual: Tensor, grad_normal: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.pyard.gated_residual_modulated_layer_norm_backward(
        grad_residual, grad_normal, *ctx.saved_tensors, ctx.eps
    )
    return *grads, None


def _fused_backward_shapes(
    grad_residual: Tensor, grad_normal: Tensor, residual: Tensor, gate: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    tokens, per_step = residual.shape, gate.shape
    return residual.new_empty(tokens), *(gate.new_empty(shape) for shape in (per_step, tokens, per_step, per_step))
