"""Row operators under autocast: the norm in the dtype of the linear layer behind it, with the values of before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import tiny_student
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyard import ops
from pyard.ops.autocast import takes_mixed
from pyard.ops.backend import library

BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(library is None, reason="not built"))]
B, S, T, D = 2, 3, 5, 16


def sample() -> tuple[Tensor, ...]:
    """A float32 stream; gate, branch, shift and scale in bfloat16."""
    x, branch = torch.randn(B, S, T, D), torch.randn(B, S, T, D).bfloat16()
    gate, shift, scale = torch.randn(3, B, S, D).bfloat16().unbind(0)
    return tuple(tensor.requires_grad_() for tensor in (x, gate, branch, shift, scale))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_may_come_in_another_dtype(backend: ops.Backend) -> None:
    x, gate, branch, shift, scale = sample()
    with ops.use_backend(backend):
        residual, normal = ops.gated_residual_modulated_layer_norm(x, gate, branch, shift, scale, 1e-6, torch.bfloat16)
        wide_residual, wide = ops.gated_residual_modulated_layer_norm(x, gate, branch, shift, scale)
        alone = ops.modulated_layer_norm(wide_residual, shift, scale, dtype=torch.bfloat16)
    assert (residual.dtype, normal.dtype, wide.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert torch.equal(residual, wide_residual)
    assert torch.equal(normal, wide.bfloat16())
    assert torch.equal(alone, normal)
    leaves = (x, gate, branch, shift, scale)
    assert [g.dtype for g in torch.autograd.grad(normal.float().sum(), leaves)] == [leaf.dtype for leaf in leaves]


def test_what_a_linear_layer_computes_in() -> None:
    x = torch.randn(2, 4)
    assert ops.dtype_of_linears(x) == torch.float32
    assert ops.dtype_of_linears(torch.empty(1, device="meta")) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.dtype_of_linears(x) == torch.nn.functional.linear(x, x).dtype == torch.bfloat16
        compiled = torch.compile(lambda x: x.to(ops.dtype_of_linears(x)), fullgraph=True, backend="aot_eager")
        assert compiled(x).dtype == torch.bfloat16


def test_a_student_under_autocast_is_that_of_float32_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear layers convert a float32 norm to the same bits."""
    student = tiny_student(history_layers=2, history_bias=0.5)
    history, labels = torch.randn(2, student.num_steps, *student.sample_shape), torch.tensor([1, 0])

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = student(history, labels)
        return [out, *torch.autograd.grad(out.float().square().mean(), list(student.parameters()))]

    ours = run()
    monkeypatch.setattr(ops, "dtype_of_linears", lambda x: x.dtype)
    torch.testing.assert_close(ours, run(), rtol=0, atol=0)


def test_mixed_kernels_are_for_float32_beside_one_narrow_dtype() -> None:
    with FakeTensorMode():
        x = torch.empty(B, S, T, D, device="cuda")
        assert takes_mixed("gated_residual", x, torch.bfloat16, torch.bfloat16)
        assert not takes_mixed("gated_residual", x, torch.bfloat16, torch.float16)
        assert not takes_mixed("gated_residual", x, torch.float32, torch.float32)
        assert not takes_mixed("gated_residual", x.half(), torch.bfloat16)
        assert not takes_mixed("gated_residual", torch.empty(B, S, T, 12, device="cuda"), torch.bfloat16)
        assert takes_mixed("gated_residual", torch.empty(B, S, T, 7), torch.bfloat16)
        assert not takes_mixed("gated_residual", torch.empty(B, S, T, D, device="meta"), torch.bfloat16)


@pytest.mark.skipif(library is None, reason="the native operators are not built")
def test_mixed_shapes_and_dtypes_as_traced() -> None:
    with FakeTensorMode():
        x, branch = torch.empty(B, S, T, D), torch.empty(B, S, T, D, dtype=torch.bfloat16)
        step = torch.empty(B, S, D, dtype=torch.bfloat16)
        operators = torch.ops.pyard
        assert operators.modulated_layer_norm(x, step, step, 1e-6).dtype == torch.bfloat16
        grads = operators.modulated_layer_norm_backward(branch, x, step, 1e-6)
        assert [grad.dtype for grad in grads] == [torch.float32, torch.bfloat16, torch.bfloat16]
        assert operators.gated_residual(x, step, branch).dtype == torch.float32
        assert {grad.dtype for grad in operators.gated_residual_backward(x, step, branch)} == {torch.bfloat16}
        residual, normal = operators.gated_residual_modulated_layer_norm(x, step, branch, step, step, 1e-6)
        assert (residual.dtype, normal.dtype) == (torch.float32, torch.bfloat16)
        grads = operators.gated_residual_modulated_layer_norm_backward(x, branch, x, step, branch, step, 1e-6)
        assert [grad.dtype for grad in grads] == [torch.float32, *[torch.bfloat16] * 4]


@pytest.mark.cuda
def test_on_a_gpu_the_mixed_kernels_run_and_agree() -> None:
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in sample()]

    def run() -> list[Tensor]:
        out = ops.gated_residual_modulated_layer_norm(*tensors, 1e-6, torch.bfloat16)
        return [*out, *torch.autograd.grad(out, tensors, [torch.cos(value.detach()) for value in out])]

    with ops.use_backend("reference"):
        expected = run()
    with ops.use_backend("native"):
        ours = run()
    for our, other in zip(ours, expected, strict=True):
        assert our.dtype == other.dtype
        torch.testing.assert_close(our, other, rtol=2e-2, atol=5e-2)


class Recorded(TorchDispatchMode):
    """The names of the operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith("prim."):  # questions, such as for the device
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(library is None, reason="the native operators are not built")
def test_on_cuda_nothing_is_converted_forth_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "takes_native", lambda *_: True)
    with FakeTensorMode(), Recorded() as recorded:
        x = torch.empty(B, S, T, D, device="cuda")
        branch, (gate, shift, scale) = x.bfloat16(), torch.empty(3, B, S, D, device="cuda", dtype=torch.bfloat16).unbind(0)
        recorded.names.clear()
        residual, normal = ops.gated_residual_modulated_layer_norm(x, gate, branch, shift, scale, 1e-6, torch.bfloat16)
        ops.gated_residual(residual, gate, branch)
        ops.modulated_layer_norm(residual, shift, scale, dtype=torch.bfloat16)
    names = ["gated_residual_modulated_layer_norm", "gated_residual", "modulated_layer_norm"]
    assert recorded.names == [f"pyard.{name}.default" for name in names]
    assert (residual.dtype, normal.dtype) == (torch.float32, torch.bfloat16)
