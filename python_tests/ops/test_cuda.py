"""What only a GPU can show of the CUDA operators: autograd, streams, graphs, compilation, whole models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from factories import tiny_student
from ops.test_cuda_kernels import EPS, sample_rows
from torch import Tensor

from pyard import ops
from pyard.ops.backend import library
from pyard.ops.masks import mask_number

pytestmark = pytest.mark.cuda

NAMES = ("modulated_layer_norm", "gated_residual", "gated_residual_modulated_layer_norm", "gelu_tanh", "block_attention")
Case = tuple[Callable[..., object], tuple[object, ...]]


def sample_attention(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, S, T, head_dim = 2, 3, 3, 17, 24
    fused = torch.randn(B, S * T, 3, H, head_dim, device="cuda", dtype=dtype, requires_grad=True)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, T:], k, v, torch.randn(H, device="cuda", requires_grad=True)


def cases() -> dict[str, Case]:
    x, branch, gate, shift, scale = (t.cuda().detach().requires_grad_() for t in sample_rows((2, 3, 5, 64), torch.float32))
    q, k, v, bias = (tensor.detach().requires_grad_() for tensor in sample_attention())
    return {
        "modulated_layer_norm": (ops.modulated_layer_norm, (x, shift, scale)),
        "gated_residual": (ops.gated_residual, (x, gate, branch)),
        "gated_residual_modulated_layer_norm": (ops.gated_residual_modulated_layer_norm, (x, gate, branch, shift, scale)),
        "gelu_tanh": (ops.gelu_tanh, (x, gate.detach()[0, 0].requires_grad_())),
        "block_attention": (ops.block_attention, (q, k, v, 17, "window", 2, bias)),
    }


def run(case: Case) -> list[Tensor]:
    function, inputs = case
    outputs = function(*inputs)
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [value for value in inputs if isinstance(value, Tensor)]
    return [*values, *torch.autograd.grad(values, leaves, [torch.cos(value.detach()) for value in values])]


def test_the_library_has_cuda_kernels() -> None:
    assert library is not None
    assert library.cuda_architectures


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_twin(name: str) -> None:
    case = cases()[name]
    with ops.use_backend("reference"):
        expected = run(case)
    with ops.use_backend("native"):
        torch.testing.assert_close(run(case), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name: str) -> None:
    function, inputs = cases()[name]
    with ops.use_backend("native"):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run((compiled, inputs)), run((function, inputs)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_is_kept(name: str) -> None:
    inputs = tuple(mask_number(value) if isinstance(value, str) else value for value in cases()[name][1])
    eps = () if name in ("gated_residual", "gelu_tanh", "block_attention") else (EPS,)
    operator = getattr(torch.ops.pyard, name).default
    torch.library.opcheck(operator, (*inputs, *eps), test_utils=("test_schema", "test_faketensor"))


def test_deterministic_mode_repeats_every_bit() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with ops.use_backend("native"):
            for name in ("block_attention", "modulated_layer_norm"):
                case = cases()[name]
                assert all(torch.equal(a, b) for a, b in zip(run(case), run(case), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_work_is_queued_on_the_current_stream_and_can_be_captured() -> None:
    q, k, v, bias = (tensor.detach() for tensor in sample_attention(torch.bfloat16))

    def attend() -> Tensor:
        return ops.block_attention(q, k, v, 17, "causal", None, bias)

    with ops.use_backend("native"):
        expected = attend()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            attend()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attend()
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, expected)


def test_auto_takes_no_kernel_of_cuda_yet() -> None:
    with ops.use_backend("auto"):
        assert not ops.takes_native("block_attention", torch.empty(1, device="cuda"))


def test_a_native_student_is_the_plain_one() -> None:
    student = tiny_student(history_layers=2, history_bias=0.5).cuda()
    history = torch.randn(2, student.num_steps, *student.sample_shape, device="cuda")
    labels = torch.tensor([1, 4], device="cuda")

    def both() -> list[Tensor]:
        parallel = student(history, labels)
        parallel.square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]
        student.zero_grad()
        with torch.no_grad():
            return [parallel.detach(), *student.rollout(history[:, 0], labels), *gradients]

    with ops.use_backend("reference"):
        expected = both()
    with ops.use_backend("native"):
        torch.testing.assert_close(both(), expected, rtol=1e-3, atol=1e-4)
