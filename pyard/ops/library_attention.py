"""PyTorch's own attention kernels: forward returns out and log-sum-exp, and backward accepts any out and log-sum-exp.

`F.scaled_dot_product_attention` does not return the log-sum-exp, so this module calls the kernels beneath it. Their signatures
are the same in torch 2.11 to 2.13. The CUDA calls have never run: their layouts follow torch/_meta_registrations.py. Passing
backward the out and log-sum-exp of a larger softmax is also what torch.distributed's context parallelism does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyard.errors import InputError

aten = torch.ops.aten
DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
# The kernels of CUDA move 16 bytes at a time.
PADDED_HEAD = 8
ALIGNED_BYTES = 16
# The efficient kernel's log-sum-exp has whole tiles of rows.
EFFICIENT_ROWS = 32


def check(q: Tensor) -> None:
    """Refuses devices and dtypes for which PyTorch has no such kernel.

    Raises:
        InputError: Naming what was found and what there is.
    """
    if q.dtype not in DTYPES.get(q.device.type, ()):
        kinds = "; ".join(f"{device} in {', '.join(str(d)[6:] for d in dtypes)}" for device, dtypes in DTYPES.items())
        raise InputError(
            f"backend 'merged' cannot run block_attention on {q.device.type} in {q.dtype}: PyTorch returns a log-sum-exp on "
            f"{kinds}; use backend 'auto' or 'reference'"
        )


def forward(
    q: Tensor,  # [B, H, rows, Dh]
    k: Tensor,  # [B, H, keys, Dh]
    v: Tensor,  # [B, H, keys, Dh]
) -> tuple[Tensor, Tensor]:  # [B, H, rows, Dh], [B, H, rows]
    """Attention of all rows to all keys, and the log-sum-exp of the logits in float32 (float64 for float64 inputs)."""
    if q.numel() == 0:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    if q.is_cuda:
        return _forward_cuda(q, k, v)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse


def backward(
    grad: Tensor,  # [B, H, rows, Dh]
    q: Tensor,  # [B, H, rows, Dh]
    k: Tensor,  # [B, H, keys, Dh]
    v: Tensor,  # [B, H, keys, Dh]
    out: Tensor,  # [B, H, rows, Dh]
    lse: Tensor,  # [B, H, rows]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v due to these keys; `out` and `lse` may come from a softmax over more keys."""
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if q.is_cuda:
        return _backward_cuda(grad, q, k, v, out, lse)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
    return dq, dk, dv


def cuda_kernel(q: Tensor) -> str:
    """The CUDA kernel to call: the one that `torch.nn.attention.sdpa_kernel` allows; if it allows several, flash for 16 bits.

    For float32 there is only the memory-efficient kernel.
    """
    allowed = torch.backends.cuda
    if q.dtype == torch.float32:
        return "efficient"
    if allowed.flash_sdp_enabled():
        return "flash"
    return "cudnn" if allowed.cudnn_sdp_enabled() and q.shape[3] <= 128 else "efficient"


def _forward_cuda(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """lse is [B, H, rows] from flash and [B, H, rows, 1] from cuDNN; the memory-efficient kernel pads rows to whole tiles."""
    scale, head_dim = 1 / math.sqrt(q.shape[3]), q.shape[3]
    q, k, v = (_aligned(x) for x in (q, k, v))
    kernel = cuda_kernel(q)
    if kernel == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    elif kernel == "cudnn":
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    return out.narrow(3, 0, head_dim), lse.flatten(2).narrow(2, 0, q.shape[2])


def _backward_cuda(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without dropout, the random state is not read; without ragged batches, neither are the cumulative lengths."""
    scale, head_dim, rows, keys = 1 / math.sqrt(q.shape[3]), q.shape[3], q.shape[2], k.shape[2]
    grad, q, k, v, out = (_aligned(x) for x in (grad, q, k, v, out))
    lse = lse.clone(memory_format=torch.contiguous_format)
    kernel = cuda_kernel(q)
    if kernel == "flash":
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        backward = aten._scaled_dot_product_flash_attention_backward
        grads = backward(grad, q, k, v, out, lse, None, None, rows, keys, 0.0, False, state, state, scale=scale)
    elif kernel == "cudnn":
        state = torch.zeros((), dtype=torch.int64, device=q.device)
        backward = aten._scaled_dot_product_cudnn_attention_backward
        grads = backward(
            grad, q, k, v, out, lse.unsqueeze(3), state, state, None, None, None, rows, keys, 0.0, False, scale=scale
        )
    else:
        state = torch.zeros((), dtype=torch.int64, device=q.device)
        # A row that is not there has weights e^(logits - inf) = 0.
        lse = F.pad(lse, (0, -rows % EFFICIENT_ROWS), value=math.inf)
        backward = aten._scaled_dot_product_efficient_attention_backward
        wanted = [True, True, True, False]
        grads = backward(grad, q, k, v, None, out, lse, state, state, 0.0, wanted, False, scale=scale)
    dq, dk, dv = (share.narrow(3, 0, head_dim) for share in grads[:3])
    return dq, dk, dv


def _aligned(x: Tensor) -> Tensor:
    """x with a head size and strides that are multiples of what a kernel moves at once; x itself if they already are."""
    x = F.pad(x, (0, -x.shape[3] % PADDED_HEAD))
    # torch allocates at multiples of far more bytes.
    places = [x.storage_offset(), *x.stride()[:3]]
    if x.stride(3) == 1 and all(place * x.element_size() % ALIGNED_BYTES == 0 for place in places):
        return x
    return x.clone(memory_format=torch.contiguous_format)
