"""The CUDA operators behind the interface of cuda_emulator.kernels.Kernels, so that a GPU passes the emulator's tests."""

from __future__ import annotations

import torch
from torch import Tensor

from pyard.ops.masks import mask_number


def to_device(tensor: Tensor) -> Tensor:
    """The same view of the same memory, on the GPU: strides, offset and what lies between the rows included."""
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return memory.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _moved(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else to_device(tensor) for tensor in tensors]


class DeviceKernels:
    """Takes and returns CPU tensors; computes on the GPU."""

    library = None

    def attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, T: int, mask: str, window: int | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        q_, k_, v_, bias_ = _moved(q, k, v, bias)
        out, lse = torch.ops.pyard.block_attention(q_, k_, v_, T, mask_number(mask), window, bias_)
        return out.cpu(), lse.cpu()

    def attention_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        T: int,
        mask: str,
        window: int | None = None,
        bias: Tensor | None = None,
        deterministic: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        operators = torch.ops.pyard
        backward = operators.block_attention_backward if deterministic else operators.block_attention_backward_unordered
        dq, dk, dv, dbias = backward(*_moved(grad, q, k, v, out, lse), T, mask_number(mask), window, *_moved(bias))
        return dq.cpu(), dk.cpu(), dv.cpu(), None if bias is None else dbias.cpu()

    def residual_norm_forward(
        self,
        x: Tensor,
        gate: Tensor | None,
        branch: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        x_, gate_, branch_, shift_, scale_ = _moved(x, gate, branch, shift, scale)
        operators = torch.ops.pyard
        if scale is None:
            residual = operators.gated_residual(x_, gate_, branch_)
            return residual.cpu(), torch.empty(0)
        if gate is None:
            return torch.empty(0), operators.modulated_layer_norm(x_, shift_, scale_, eps).cpu()
        residual, normal = operators.gated_residual_modulated_layer_norm(x_, gate_, branch_, shift_, scale_, eps)
        return residual.cpu(), normal.cpu()

    def residual_norm_backward(
        self,
        grad_residual: Tensor | None,
        grad_normal: Tensor | None,
        residual: Tensor,
        gate: Tensor | None,
        branch: Tensor | None,
        scale: Tensor | None,
        eps: float,
    ) -> dict[str, Tensor]:
        operators = torch.ops.pyard
        grad_residual_, grad_normal_, residual_ = _moved(grad_residual, grad_normal, residual)
        gate_, branch_, scale_ = _moved(gate, branch, scale)
        if scale is None:
            names = ["dgate", "dbranch"]
            grads = operators.gated_residual_backward(grad_residual_, gate_, branch_)
        elif gate is None:
            names = ["dx", "dshift", "dscale"]
            grads = operators.modulated_layer_norm_backward(grad_normal_, residual_, scale_, eps)
        else:
            names = ["dx", "dgate", "dbranch", "dshift", "dscale"]
            grads = operators.gated_residual_modulated_layer_norm_backward(
                grad_residual_, grad_normal_, residual_, gate_, branch_, scale_, eps
            )
        return {name: grad.cpu() for name, grad in zip(names, grads, strict=True)}

    def gelu_forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = torch.ops.pyard.gelu_tanh(*_moved(x, bias))
        return out.cpu()

    def gelu_backward(self, grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        dx, dbias = torch.ops.pyard.gelu_tanh_backward(*_moved(grad, x, bias))
        return dx.cpu(), dbias.cpu()

    def timestep_embedding(self, times: Tensor, dim: int, max_period: float, freq_shift: float) -> Tensor:
        out: Tensor = torch.ops.pyard.timestep_embedding(times.cuda(), dim, max_period, freq_shift)
        return out.cpu()

    def gather_trajectories(self, noise: Tensor, steps: Tensor, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        history, target = torch.ops.pyard.gather_trajectories(*_moved(noise, steps, index), dtype)
        return history.cpu(), target.cpu()
