"""The operators that pyard's models are built from. Each runs as a compiled kernel or in plain PyTorch; see `use_backend`.

B batch, S num_steps, T tokens_per_step, D hidden size, H heads, Dh head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyard.errors import InputError
from pyard.ops import merged, reference
from pyard.ops.autocast import dtype_of_linears, takes_mixed
from pyard.ops.backend import BACKENDS, Backend, current_backend, takes_native, use_backend, why_not_native
from pyard.ops.derivatives import accumulator
from pyard.ops.masks import MASKS, Mask, check_mask, mask_number, visible, visible_steps

__all__ = [
    "BACKENDS",
    "MASKS",
    "Backend",
    "Mask",
    "block_attention",
    "check_mask",
    "current_backend",
    "dtype_of_linears",
    "gated_residual",
    "gated_residual_modulated_layer_norm",
    "gather_trajectories",
    "gelu_tanh",
    "modulated_layer_norm",
    "takes_native",
    "timestep_embedding",
    "use_backend",
    "visible",
    "visible_steps",
    "why_not_native",
]


def modulated_layer_norm(
    x: Tensor,  # [B, S, T, D]
    shift: Tensor,  # [B, S, D]
    scale: Tensor,  # [B, S, D]
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:  # [B, S, T, D]
    """LayerNorm over D without affine parameters, then `* (1 + scale) + shift` with one shift and scale per step.

    Args:
        x: [B, S, T, D], floating point.
        shift: [B, S, D]; converted to the dtype of x.
        scale: [B, S, D]; converted to the dtype of x.
        eps: Added to the variance.
        dtype: dtype of the result; None: that of x. Under autocast, pass `dtype_of_linears(x)`: the linear layer that follows
            would convert the result anyway.

    Returns:
        [B, S, T, D], contiguous.

    Raises:
        InputError: If the shapes do not fit.

    The adaLN of Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), section 3.2.
    """
    _check_tokens("modulated_layer_norm", "x", x)
    _check_per_step("modulated_layer_norm", "shift", shift, x)
    _check_per_step("modulated_layer_norm", "scale", scale, x)
    dtype = dtype or x.dtype
    native = takes_native("modulated_layer_norm", x)
    if not (native and takes_mixed("modulated_layer_norm", x, shift.dtype, scale.dtype, dtype)):
        shift, scale = shift.to(x.dtype), scale.to(x.dtype)
    compute = torch.ops.pyard.modulated_layer_norm if native else reference.modulated_layer_norm
    out: Tensor = compute(x, shift, scale, eps)
    return out.to(dtype)


def gated_residual(
    x: Tensor,  # [B, S, T, D]
    gate: Tensor,  # [B, S, D]
    branch: Tensor,  # [B, S, T, D]
) -> Tensor:  # [B, S, T, D]
    """`x + gate * branch` with one gate per step.

    Args:
        x: [B, S, T, D], floating point: the residual stream.
        gate: [B, S, D]; converted to the dtype of x.
        branch: [B, S, T, D]: the output of an attention or an MLP; converted to the dtype of x.

    Returns:
        [B, S, T, D] in the dtype of x.

    Raises:
        InputError: If the shapes do not fit.
    """
    _check_tokens("gated_residual", "x", x)
    _check_per_step("gated_residual", "gate", gate, x)
    if branch.shape != x.shape:
        raise InputError(f"gated_residual: branch has shape {list(branch.shape)}, expected that of x, {list(x.shape)}")
    native = takes_native("gated_residual", x)
    if not (native and takes_mixed("gated_residual", x, gate.dtype, branch.dtype)):
        gate, branch = gate.to(x.dtype), branch.to(x.dtype)
    compute = torch.ops.pyard.gated_residual if native else reference.gated_residual
    out: Tensor = compute(x, gate, branch)
    return out


def gated_residual_modulated_layer_norm(
    x: Tensor,  # [B, S, T, D]
    gate: Tensor,  # [B, S, D]
    branch: Tensor,  # [B, S, T, D]
    shift: Tensor,  # [B, S, D]
    scale: Tensor,  # [B, S, D]
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # [B, S, T, D] twice
    """`residual = gated_residual(x, gate, branch)` and `modulated_layer_norm(residual, shift, scale, eps, dtype)`, in one pass
    over memory where there is a kernel for it.

    Args:
        x: [B, S, T, D], floating point: the residual stream.
        gate: [B, S, D]; like all arguments below, converted to the dtype of x.
        branch: [B, S, T, D].
        shift: [B, S, D].
        scale: [B, S, D].
        eps: Added to the variance.
        dtype: dtype of the normalised result, as in `modulated_layer_norm`.

    Returns:
        (residual, normalised), each [B, S, T, D]; the residual has the dtype of x.

    Raises:
        InputError: If the shapes do not fit.
    """
    operator = "gated_residual_modulated_layer_norm"
    if not takes_native(operator, x):
        residual = gated_residual(x, gate, branch)
        return residual, modulated_layer_norm(residual, shift, scale, eps, dtype)
    _check_tokens(operator, "x", x)
    if branch.shape != x.shape:
        raise InputError(f"{operator}: branch has shape {list(branch.shape)}, expected that of x, {list(x.shape)}")
    for name, value in (("gate", gate), ("shift", shift), ("scale", scale)):
        _check_per_step(operator, name, value, x)
    dtype = dtype or x.dtype
    if not takes_mixed(operator, x, dtype, gate.dtype, branch.dtype, shift.dtype, scale.dtype):
        gate, branch, shift, scale = (tensor.to(x.dtype) for tensor in (gate, branch, shift, scale))
    residual, normal = torch.ops.pyard.gated_residual_modulated_layer_norm(x, gate, branch, shift, scale, eps)
    return residual, normal.to(dtype)


def gelu_tanh(
    x: Tensor,  # [..., D]
    bias: Tensor,  # [D]
) -> Tensor:  # [..., D]
    """GELU (tanh approximation) of `x + bias`: a linear layer's bias and the activation that follows it, in one pass.

    Args:
        x: [..., D], floating point: `F.linear(input, weight)`, without the bias.
        bias: [D]; converted to the dtype of x.

    Returns:
        [..., D] in the dtype of x.

    Raises:
        InputError: If the shapes do not fit.

    Hendrycks & Gimpel, "Gaussian Error Linear Units" (arXiv 1606.08415), section 2.
    """
    if x.dim() < 1 or not x.is_floating_point() or bias.shape != x.shape[-1:]:
        raise InputError(
            f"gelu_tanh: x has shape {list(x.shape)} and dtype {x.dtype}, bias {list(bias.shape)}, "
            "expected floating [..., D] and [D]"
        )
    bias = bias.to(x.dtype)
    if takes_native("gelu_tanh", x):
        out: Tensor = torch.ops.pyard.gelu_tanh(x, bias)
        return out
    return reference.gelu_tanh(x, bias)


def timestep_embedding(
    times: Tensor,  # [...]
    dim: int,
    max_period: float = 10000.0,
    freq_shift: float = 0.0,
) -> Tensor:  # [..., dim]
    """Sinusoidal features of times, cosines first.

    Args:
        times: [...], any real dtype, in the teacher's units of time; fractions are allowed.
        dim: number of features; if it is odd, the last column is zeros.
        max_period: The longest period, in units of time.
        freq_shift: subtracted from dim // 2 in the exponent's denominator (0 in DiT, 1 in some other models).

    Returns:
        [..., dim] float32: cos(t f_i) then sin(t f_i), f_i = max_period^(-i / (dim // 2 - freq_shift)).

    Raises:
        InputError: If there are too few features for `freq_shift`.
    """
    if dim < 2 or dim // 2 <= freq_shift:
        raise InputError(f"timestep_embedding: dim is {dim}, expected at least 2 and dim // 2 > freq_shift = {freq_shift}")
    times = times.float()
    if takes_native("timestep_embedding", times):
        out: Tensor = torch.ops.pyard.timestep_embedding(times, dim, max_period, freq_shift)
        return out
    return reference.timestep_embedding(times, dim, max_period, freq_shift)


def block_attention(
    q: Tensor,  # [B, H, Sq * T, Dh]
    k: Tensor,  # [B, H, Sk * T, Dh]
    v: Tensor,  # [B, H, Sk * T, Dh]
    tokens_per_step: int,
    mask: str = "causal",
    window: int | None = None,
    bias: Tensor | None = None,  # [H]
) -> Tensor:  # [B, H, Sq * T, Dh]
    """Attention between blocks of T tokens: each token attends to all tokens of those blocks that `mask` allows for its block.

    The Sq query blocks are the last Sq of the Sk key blocks. So a cached rollout passes one block of queries and all keys.

    Args:
        q: [B, H, Sq * T, Dh], floating point.
        k: [B, H, Sk * T, Dh]; converted to the dtype of q.
        v: [B, H, Sk * T, Dh]; converted to the dtype of q.
        tokens_per_step: T.
        mask: `diagonal | window | anchor | causal`, see `visible`.
        window: for the mask `window`, the number of blocks that a block attends to, including itself.
        bias: [H], added to the logits of keys in earlier blocks; None: no bias.

    Returns:
        [B, H, Sq * T, Dh]; logits are scaled by 1 / sqrt(Dh). The kernel writes a token's heads next to each other in
        memory, so `.transpose(1, 2).reshape(B, Sq * T, H * Dh)` makes no copy.

    Raises:
        InputError: If shapes, mask or window do not fit.

    The block-wise masks M1-M4 of ARD (arXiv 2504.11295), figure 1b.
    """
    check_mask(mask, window)
    T = tokens_per_step
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise InputError(
            "block_attention: q, k, v have shapes "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}, expected [B, H, Sq * T, Dh] and [B, H, Sk * T, Dh]"
        )
    if T < 1 or q.shape[2] % T or k.shape[2] % T or not 0 < q.shape[2] <= k.shape[2]:
        raise InputError(
            f"block_attention: {q.shape[2]} queries and {k.shape[2]} keys, expected multiples of tokens_per_step = {T} "
            "and 1 <= query blocks <= key blocks"
        )
    if bias is not None and bias.shape != q.shape[1:2]:
        raise InputError(f"block_attention: bias has shape {list(bias.shape)}, expected [{q.shape[1]}], one per head")
    k, v = k.to(q.dtype), v.to(q.dtype)
    if current_backend() == "merged" and not torch.onnx.is_in_onnx_export():
        return merged.block_attention(q, k, v, T, mask, window, bias)
    # Own blocks alone are what the library's kernels are best at on CUDA: there `auto` leaves them to SDPA.
    without_history = k.shape[2] == T and q.is_cuda and current_backend() == "auto"
    if not without_history and takes_native("block_attention", k):
        bias = None if bias is None else bias.to(accumulator(q.dtype))
        out: Tensor = torch.ops.pyard.block_attention(q, k, v, T, mask_number(mask), window, bias)[0]
        return out
    if q.is_cuda and current_backend() == "flex":
        from pyard.ops import flex  # its import costs what few need

        return flex.block_attention(q, k, v, T, mask, window, bias)
    return reference.block_attention(q, k, v, T, mask, window, bias).to(q.dtype)  # autocast narrows it


def gather_trajectories(
    noise: Tensor,  # [n, C, H, W]
    steps: Tensor,  # [n, S, C, H, W]
    indices: Tensor,  # [B] int64
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # [B, S, C, H, W] twice
    """A student's inputs and targets from trajectories in memory, converted to the wanted dtype in the same pass.

    Args:
        noise: [n, C, H, W], float32, bfloat16 or float16: x_T of every trajectory.
        steps: [n, S, C, H, W], float32, bfloat16 or float16: the targets of its S steps, x_0 last.
        indices: [B] int64: the trajectories to take, 0 to n - 1, in any order.
        dtype: dtype of the returned tensors: float32, bfloat16 or float16.

    Returns:
        history [B, S, C, H, W], the noise and all steps but the last, and target [B, S, C, H, W], the steps.

    Raises:
        InputError: If shapes or dtypes do not fit.
    """
    if steps.dim() < 2 or noise.shape != steps.shape[:1] + steps.shape[2:]:
        raise InputError(
            f"gather_trajectories: noise and steps have shapes {list(noise.shape)} and {list(steps.shape)}, "
            "expected [n, C, H, W] and [n, S, C, H, W]"
        )
    if indices.dim() != 1 or indices.dtype != torch.int64:
        raise InputError(
            f"gather_trajectories: indices has shape {list(indices.shape)} and dtype {indices.dtype}, expected [B] int64"
        )
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    if any(kind not in allowed for kind in (noise.dtype, steps.dtype, dtype)):
        raise InputError(
            f"gather_trajectories: noise, steps and dtype are {noise.dtype}, {steps.dtype} and {dtype}, "
            "expected float32, bfloat16 or float16"
        )
    # A store is data; if it is trained all the same, the plain version has derivatives.
    if takes_native("gather_trajectories", steps) and not (noise.requires_grad or steps.requires_grad):
        history, target = torch.ops.pyard.gather_trajectories(noise, steps, indices, dtype)
        return history, target
    return reference.gather_trajectories(noise, steps, indices, dtype)


def _check_tokens(operator: str, argument: str, x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise InputError(
            f"{operator}: {argument} has shape {list(x.shape)} and dtype {x.dtype}, expected floating [B, S, T, D]"
        )


def _check_per_step(operator: str, argument: str, value: Tensor, x: Tensor) -> None:
    expected = (x.shape[0], x.shape[1], x.shape[3])
    if tuple(value.shape) != expected:
        raise InputError(f"{operator}: {argument} has shape {list(value.shape)}, expected [B, S, D] = {list(expected)}")
