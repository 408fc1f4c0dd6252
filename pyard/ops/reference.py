"""The operators' definition in plain PyTorch: the kernels must agree with it, and it runs if there is no kernel.

B batch, S num_steps, T tokens_per_step, D hidden size, H heads, Dh head size. The public functions in
`pyard.ops` check arguments; these do not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyard.ops.masks import visible_steps


def modulated_layer_norm(
    x: Tensor,  # [B, S, T, D]
    shift: Tensor,  # [B, S, D]
    scale: Tensor,  # [B, S, D]
    eps: float,
) -> Tensor:  # [B, S, T, D]
    normal = F.layer_norm(x, x.shape[-1:], eps=eps)
    # Autocast makes layer_norm return float32 on some devices.
    return (normal * (1 + scale[:, :, None]) + shift[:, :, None]).to(x.dtype)


def modulated_layer_norm_backward(
    grad: Tensor,  # [B, S, T, D]
    x: Tensor,  # [B, S, T, D]
    scale: Tensor,  # [B, S, D]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, S, T, D], [B, S, D], [B, S, D]
    """The gradients of x, shift and scale."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normal = centred * rstd
    inner = grad * (1 + scale[:, :, None])
    dx = rstd * (inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True))
    return dx, grad.sum(2), (grad * normal).sum(2)


def gated_residual(
    x: Tensor,  # [B, S, T, D]
    gate: Tensor,  # [B, S, D]
    branch: Tensor,  # [B, S, T, D]
) -> Tensor:  # [B, S, T, D]
    return x + gate[:, :, None] * branch


def gated_residual_backward(
    grad: Tensor,  # [B, S, T, D]
    gate: Tensor,  # [B, S, D]
    branch: Tensor,  # [B, S, T, D]
) -> tuple[Tensor, Tensor]:  # [B, S, D], [B, S, T, D]
    """The gradients of gate and branch; that of x is `grad`."""
    return (grad * branch).sum(2), grad * gate[:, :, None]


def gated_residual_modulated_layer_norm_backward(
    grad_residual: Tensor,  # [B, S, T, D]
    grad_normal: Tensor,  # [B, S, T, D]
    residual: Tensor,  # [B, S, T, D]
    gate: Tensor,  # [B, S, D]
    branch: Tensor,  # [B, S, T, D]
    scale: Tensor,  # [B, S, D]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # [B, S, T, D], [B, S, D], [B, S, T, D], [B, S, D], [B, S, D]
    """The gradients of x, gate, branch, shift and scale."""
    through_norm, dshift, dscale = modulated_layer_norm_backward(grad_normal, residual, scale, eps)
    dx = grad_residual + through_norm
    return dx, *gated_residual_backward(dx, gate, branch), dshift, dscale


def gelu_tanh(
    x: Tensor,  # [..., D]
    bias: Tensor,  # [D]
) -> Tensor:  # [..., D]
    return F.gelu(x + bias, approximate="tanh")


def gelu_tanh_backward(
    grad: Tensor,  # [..., D]
    x: Tensor,  # [..., D]
    bias: Tensor,  # [D]
) -> tuple[Tensor, Tensor]:  # [..., D], [D]
    """The gradients of x and bias."""
    dx = torch.ops.aten.gelu_backward(grad, x + bias, approximate="tanh")
    return dx, dx.flatten(0, -2).sum(0)


def gather_trajectories(
    noise: Tensor,  # [n, C, H, W]
    steps: Tensor,  # [n, S, C, H, W]
    indices: Tensor,  # [B] int64
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [B, S, C, H, W] twice
    target = steps[indices].to(dtype)
    return torch.cat([noise[indices, None].to(dtype), target[:, :-1]], dim=1), target


def timestep_embedding(
    times: Tensor,  # [...]
    dim: int,
    max_period: float,
    freq_shift: float,
) -> Tensor:  # [..., dim] float32
    half = dim // 2
    # In the order in which DiT and diffusers round: a last bit of a frequency, times t = 999, is 1e-5 of the network's output.
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=times.device) / (half - freq_shift)
    angles = times[..., None].float() * torch.exp(exponents)  # [..., half]
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def block_attention(
    q: Tensor,  # [B, H, Sq * T, Dh]
    k: Tensor,  # [B, H, Sk * T, Dh]
    v: Tensor,  # [B, H, Sk * T, Dh]
    tokens_per_step: int,
    mask: str,
    window: int | None,
    bias: Tensor | None,  # [H]
) -> Tensor:  # [B, H, Sq * T, Dh]
    T, head_dim = tokens_per_step, q.shape[-1]
    query_steps, key_steps = q.shape[2] // T, k.shape[2] // T
    learns_bias = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if key_steps == 1 and not learns_bias:  # else the bias gets its gradient, zeros
        return F.scaled_dot_product_attention(q, k, v)
    out = []
    for index in range(query_steps):
        step = key_steps - query_steps + index
        steps = visible_steps(mask, step, window)
        q_block = q[:, :, index * T : (index + 1) * T]
        k_seen, v_seen = _blocks(k, steps, T), _blocks(v, steps, T)
        if bias is not None:
            q_block, k_seen, v_seen = _with_bias_channel(q_block, k_seen, v_seen, bias, T)
        seen = F.scaled_dot_product_attention(q_block, k_seen, v_seen, scale=1 / math.sqrt(head_dim))
        out.append(seen[..., :head_dim])
    return torch.cat(out, dim=2)


def _blocks(
    keys: Tensor,  # [B, H, Sk * T, Dh]
    steps: list[int],
    T: int,
) -> Tensor:  # [B, H, len(steps) * T, Dh]
    first, last = steps[0], steps[-1]
    if steps == list(range(first, last + 1)):
        return keys[:, :, first * T : (last + 1) * T]
    return torch.cat([keys[:, :, step * T : (step + 1) * T] for step in steps], dim=2)


def _with_bias_channel(
    q: Tensor,  # [B, H, T, Dh]
    k: Tensor,  # [B, H, K, Dh], the own block last
    v: Tensor,  # [B, H, K, Dh]
    bias: Tensor,  # [H]
    T: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds `bias` to the logits of earlier blocks without a mask, by one more channel: 1 in q and bias * sqrt(Dh) in k.

    v gets a channel of zeros, because the fused kernels need equal head sizes.
    """
    B, H, K, head_dim = k.shape
    earlier = torch.arange(K, device=k.device) < K - T  # [K]
    # Finite and far from overflow: the bias that switches a history off may be -inf.
    channel = (bias * math.sqrt(head_dim)).to(k.dtype).clamp(min=torch.finfo(k.dtype).min / 2)
    channel = torch.where(earlier, channel[:, None], 0.0)  # [H, K]
    k = torch.cat([k, channel[None, :, :, None].expand(B, H, K, 1)], dim=-1)
    return F.pad(q, (0, 1), value=1.0), k, F.pad(v, (0, 1))
