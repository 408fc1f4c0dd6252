"""Every operator against the plain PyTorch that it replaces. B batch, S steps, T tokens, D hidden, H heads, Dh head size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Measurement
from pyard import ops
from pyard.ops import reference
from pyard.ops.masks import mask_number

Case = tuple[Measurement, dict[str, Callable[[], object]]]

B, S, T = 4, 4, 256
FLOAT_BYTES = 4


def all_cases() -> Iterator[Case]:
    """Operator by operator, forward and forward + backward."""
    for D in (384, 1152):
        yield from layer_norm(D)
    yield from layer_norm(1152, torch.bfloat16)
    yield from gate(384)
    yield from gelu(1536)
    for dtype in (torch.float32, torch.bfloat16):
        yield from attention("causal", H=6, head_dim=64, dtype=dtype)
    yield from attention("causal", H=4, head_dim=72, dtype=torch.float32)
    yield from attention("diagonal", H=6, head_dim=64, dtype=torch.float32)
    yield attention_cached(H=6, head_dim=64)
    yield embedding()
    yield gather()


def layer_norm(D: int, beside: torch.dtype = torch.float32) -> Iterator[Case]:
    """`beside`: dtype of all but the stream, which autocast leaves in float32."""
    x, grad = torch.randn(B, S, T, D, requires_grad=True), torch.randn(B, S, T, D).to(beside)
    shift, scale = (torch.randn(B, S, D).to(beside).requires_grad_() for _ in range(2))
    wide, narrow = FLOAT_BYTES * x.numel(), beside.itemsize * x.numel()

    def ours() -> Tensor:
        return torch.ops.pyard.modulated_layer_norm(x, shift, scale, 1e-6)

    def composed() -> Tensor:
        return reference.modulated_layer_norm(x, shift.to(x.dtype), scale.to(x.dtype), 1e-6).to(beside)

    uniform = beside == torch.float32
    name = f"modulated_layer_norm D {D}" + ("" if uniform else f" float32 to {str(beside).removeprefix('torch.')}")
    of_forward = Measurement(f"{name} forward", "pyard", bytes=wide + narrow, aim={"composed": 2.5} if uniform else {})
    yield forward(of_forward, ours, composed)
    of_backward = Measurement(f"{name} backward", "pyard", bytes=2 * wide + narrow, aim={"composed": 2.0} if uniform else {})
    yield backward(of_backward, ours, composed, (x, shift, scale), grad)


def gate(D: int) -> Iterator[Case]:
    x, branch, grad = (torch.randn(B, S, T, D, requires_grad=True) for _ in range(3))
    per_step = torch.randn(B, S, D, requires_grad=True)
    size = FLOAT_BYTES * x.numel()

    def ours() -> Tensor:
        return torch.ops.pyard.gated_residual(x, per_step, branch)

    def composed() -> Tensor:
        return reference.gated_residual(x, per_step, branch)

    yield forward(Measurement(f"gated_residual D {D} forward", "pyard", bytes=3 * size), ours, composed)
    yield backward(
        Measurement(f"gated_residual D {D} backward", "pyard", bytes=3 * size),
        ours,
        composed,
        (x, per_step, branch),
        grad.detach(),
    )


def gelu(D: int) -> Iterator[Case]:
    x, grad = torch.randn(B, S, T, D, requires_grad=True), torch.randn(B, S, T, D)
    bias = torch.randn(D, requires_grad=True)
    size = FLOAT_BYTES * x.numel()

    def ours() -> Tensor:
        return torch.ops.pyard.gelu_tanh(x, bias)

    def composed() -> Tensor:
        return F.gelu(x, approximate="tanh")  # the bias is inside the linear layer before it

    yield forward(Measurement(f"gelu_tanh D {D} forward", "pyard", bytes=2 * size), ours, composed)
    yield backward(Measurement(f"gelu_tanh D {D} backward", "pyard", bytes=3 * size), ours, composed, (x,), grad)


def forward(measurement: Measurement, ours: Callable[[], Tensor], composed: Callable[[], Tensor]) -> Case:
    def without_graph(work: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(work)

    return measurement, {"pyard": without_graph(ours), "composed": without_graph(composed)}


def backward(
    measurement: Measurement,
    ours: Callable[[], Tensor],
    composed: Callable[[], Tensor],
    inputs: tuple[Tensor, ...],
    grad: Tensor,
) -> Case:
    def of(out: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

    return measurement, {"pyard": of(ours()), "composed": of(composed())}


def attention(mask: str, H: int, head_dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """Slices of a fused projection in, heads side by side out, as in a model."""
    fused = torch.randn(B, S * T, 3, H, head_dim).to(dtype)
    q, k, v = (part.requires_grad_() for part in fused.permute(2, 0, 3, 1, 4).unbind(0))
    grad = torch.randn(B, S * T, H, head_dim).to(dtype).transpose(1, 2)
    seen = [ops.visible_steps(mask, step) for step in range(S)]
    dense = torch.full((S, T, S, T), -math.inf)
    for step, steps in enumerate(seen):
        dense[step, :, steps] = 0
    dense = dense.view(S * T, S * T).to(dtype)

    def ours() -> Tensor:
        return torch.ops.pyard.block_attention(q, k, v, T, mask_number(mask), None, None)[0]

    def with_dense_mask() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    def step_by_step() -> Tensor:
        return reference.block_attention(q, k, v, T, mask, None, None)

    def merged_parts() -> Tensor:
        with ops.use_backend("merged"):
            return ops.block_attention(q, k, v, T, mask)

    work = {
        "pyard": ours,
        "SDPA, dense mask": with_dense_mask,
        "SDPA per step": step_by_step,
        "SDPA merged": merged_parts,
    }
    flops = 4 * B * H * head_dim * T * T * sum(map(len, seen))
    # FLOP/s floors are those of float32, whatever the storage.
    kind = str(dtype).removeprefix("torch.")
    name = f"block_attention {mask} H {H} Dh {head_dim} {kind}"

    def once(attend: Callable[[], Tensor], with_backward: bool) -> Callable[[], object]:
        def run() -> object:
            if not with_backward:
                with torch.no_grad():
                    return attend()
            return torch.autograd.grad(attend(), (q, k, v), grad)

        return run

    yield Measurement(f"{name} forward", "pyard", flops=flops), {who: once(how, False) for who, how in work.items()}
    aim = {"SDPA, dense mask": 2.0, "SDPA per step": 1.0} if mask == "causal" and dtype == torch.float32 else {}
    yield (
        Measurement(f"{name} forward + backward", "pyard", flops=3.5 * flops, aim=aim),
        {who: once(how, True) for who, how in work.items()},
    )


def attention_cached(H: int, head_dim: int) -> Case:
    q = torch.randn(B, T, H, head_dim).transpose(1, 2)
    k, v = torch.randn(2, B, H, S * T, head_dim).unbind(0)
    rivals = {
        "pyard": lambda: torch.ops.pyard.block_attention(q, k, v, T, mask_number("causal"), None, None)[0],
        "SDPA per step": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    flops = 4 * B * H * head_dim * T * S * T
    return Measurement(f"block_attention cached, last step, H {H} Dh {head_dim} float32", "pyard", flops=flops), rivals


def embedding() -> Case:
    times = torch.rand(B, S)
    return Measurement("timestep_embedding 16 times, 256 features", "pyard"), {
        "pyard": lambda: torch.ops.pyard.timestep_embedding(times, 256, 1e4, 0.0),
        "composed": lambda: reference.timestep_embedding(times, 256, 1e4, 0.0),
    }


def gather() -> Case:
    noise, steps = torch.randn(2048, 4, 32, 32), torch.randn(2048, S, 4, 32, 32).bfloat16()
    indices = torch.randint(len(noise), (64,))
    size = 64 * noise[0].numel() * (FLOAT_BYTES + S * 2 + 2 * S * FLOAT_BYTES)
    return Measurement("gather_trajectories 64 of 4x32x32, bfloat16 to float32", "pyard", bytes=size), {
        "pyard": lambda: torch.ops.pyard.gather_trajectories(noise, steps, indices, torch.float32),
        "composed": lambda: reference.gather_trajectories(noise, steps, indices, torch.float32),
    }
