"""What PyTorch asks of every operator, native: derivatives, opcheck, compilation, export, autocast, vmap."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyard import ops
from pyard.ops import reference, use_backend
from pyard.ops.backend import KERNELS, OPERATORS, library
from pyard.ops.masks import mask_number

pytestmark = pytest.mark.skipif(library is None, reason="the native operators are not built")

B, S, T, D, H, HEAD_DIM = 2, 2, 3, 5, 2, 4
CAUSAL = mask_number("causal")


@dataclass(frozen=True)
class Case:
    """A face with its tensors; further arguments are bound."""

    face: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float64

    def inputs(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape).to(dtype or self.dtype).requires_grad_() for shape in self.shapes)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ops.block_attention(q, k, v, T, "anchor", None, bias)


def attend_in_a_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.block_attention(q, k, v, T, "window", 2)


def embed(times: Tensor) -> Tensor:
    return ops.timestep_embedding(times, 7)


def gather(noise: Tensor, steps: Tensor) -> Tensor:
    history, target = ops.gather_trajectories(noise.detach(), steps.detach(), torch.tensor([3, 0, 3]))
    return torch.stack([history, target])


QUERIES, KEYS = (B, H, T, HEAD_DIM), (B, H, 3 * T, HEAD_DIM)
CASES = {
    "modulated_layer_norm": Case(ops.modulated_layer_norm, ((B, S, T, D), (B, S, D), (B, S, D))),
    "gated_residual": Case(ops.gated_residual, ((B, S, T, D), (B, S, D), (B, S, T, D))),
    "gelu_tanh": Case(ops.gelu_tanh, ((B, T, D), (D,))),
    "timestep_embedding": Case(embed, ((B, S),)),
    "block_attention": Case(attend, (QUERIES, KEYS, KEYS, (H,))),
    "block_attention, window": Case(attend_in_a_window, (KEYS, KEYS, KEYS)),
    "gather_trajectories": Case(gather, ((4, 2, 3), (4, S, 2, 3)), torch.float32),
}
SMOOTH = [name for name in CASES if name not in ("timestep_embedding", "gather_trajectories")]
every_case = pytest.mark.parametrize("name", CASES)


def test_every_operator_with_a_kernel_has_a_case() -> None:
    assert {name.split(",")[0] for name in CASES} == {name for name in OPERATORS if name in KERNELS}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_to_second_order(name: str) -> None:
    case = CASES[name]
    with use_backend("native"):
        assert torch.autograd.gradcheck(case.face, case.inputs())
        assert torch.autograd.gradgradcheck(case.face, case.inputs())


def test_the_derivative_of_an_embedding() -> None:
    times = torch.tensor([0.3, 1.7], dtype=torch.float64, requires_grad=True)
    step = 1e-3
    numeric = (embed(times + step).sum(-1) - embed(times - step).sum(-1)) / (2 * step)
    torch.testing.assert_close(torch.autograd.grad(embed(times).sum(), times)[0], numeric.double(), rtol=1e-3, atol=1e-3)


def opcheck_samples() -> list[tuple[str, tuple[object, ...]]]:
    q, k, v, bias = CASES["block_attention"].inputs(torch.float32)
    out, log_sum_exp = torch.ops.pyard.block_attention(q.detach(), k.detach(), v.detach(), T, CAUSAL, None, bias.detach())
    x, gate, branch = CASES["gated_residual"].inputs(torch.float32)
    hidden, hidden_bias = CASES["gelu_tanh"].inputs(torch.float32)
    noise, steps = (tensor.detach() for tensor in CASES["gather_trajectories"].inputs(torch.float32))
    grad = torch.randn_like(q)
    return [
        ("block_attention", (q, k, v, T, CAUSAL, None, bias)),
        ("block_attention", (q[:0], k[:0], v[:0], T, mask_number("window"), 2, None)),
        ("block_attention_backward", (grad, q, k, v, out, log_sum_exp, T, CAUSAL, None, bias)),
        ("block_attention_backward", (grad, q, k, v, out, log_sum_exp, T, CAUSAL, None, None)),
        ("gated_residual", (x, gate, branch)),
        ("gated_residual_backward", (torch.randn_like(x), gate, branch)),
        ("gelu_tanh", (hidden, hidden_bias)),
        ("gelu_tanh_backward", (torch.randn_like(hidden), hidden, hidden_bias)),
        ("timestep_embedding", (torch.rand(2, 3), 7, 1e4, 0.0)),
        ("gather_trajectories", (noise, steps, torch.tensor([3, 0]), torch.bfloat16)),
    ]


@pytest.mark.slow
def test_opcheck() -> None:
    for name, inputs in opcheck_samples():
        torch.library.opcheck(getattr(torch.ops.pyard, name).default, inputs)


@every_case
def test_compiles_without_graph_breaks(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    compiled = torch.compile(case.face, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*inputs), case.face(*inputs)
    torch.testing.assert_close(ours, expected)
    if expected.requires_grad:
        direction = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(expected, inputs, direction)
        )


class Called(torch.nn.Module):
    def __init__(self, face: Callable[..., Tensor]):
        super().__init__()
        self.face = face

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.face(*inputs)


@every_case
def test_exports_natively_and_as_plain_operators(name: str) -> None:
    case = CASES[name]
    inputs = tuple(tensor.detach() for tensor in case.inputs(torch.float32))
    exported = torch.export.export(Called(case.face), inputs)
    assert f"pyard.{name.split(',')[0]}" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*inputs), case.face(*inputs))
    with use_backend("reference"):
        assert "pyard" not in str(torch.export.export(Called(case.face), inputs).graph)


@every_case
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_keeps_the_dtype_of_the_first_input(name: str, backend: ops.Backend) -> None:
    case = CASES[name]
    first, *others = case.inputs(torch.float32)
    fixed = {"timestep_embedding": torch.float32, "gather_trajectories": torch.float32}.get(name)
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        inputs = (first.to(dtype), *(tensor.to(other) for tensor in others))
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            out = case.face(*inputs)
        assert out.dtype == (fixed or dtype)


@every_case
@pytest.mark.filterwarnings("ignore:.*performance drop")
def test_vmap_equals_a_loop(name: str) -> None:
    case = CASES[name]
    samples = [[tensor.detach() for tensor in case.inputs()] for _ in range(3)]
    many = [torch.stack(tensors) for tensors in zip(*samples, strict=True)]
    together = torch.func.vmap(case.face)(*many)
    torch.testing.assert_close(together, torch.stack([case.face(*sample) for sample in samples]))


@pytest.mark.parametrize("name", [name for name in CASES if name != "modulated_layer_norm"])
def test_exports_to_onnx_as_plain_operators(name: str) -> None:
    case = CASES[name]
    inputs = tuple(tensor.detach() for tensor in case.inputs(torch.float32))
    program = torch.onnx.export(Called(case.face), inputs, dynamo=True, verbose=False)
    assert program is not None
    assert {node.domain for node in program.model.graph} <= {"", "ai.onnx"}
    torch.testing.assert_close(program(*inputs)[0], case.face(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(library is None or len(library.instruction_sets) == 1, reason="one instruction set was compiled")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_is_as_exact(isa: str) -> None:
    """The choice is made once in a process, so the narrower sets are tested in one of their own."""
    here = Path(__file__).parent
    files = [str(here / f"test_{name}.py") for name in ("block_attention", "elementwise", "modulated_layer_norm")]
    chosen = "exact or takes_rows or rounds or closed_form or digits or taken or asked_for"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    environment = {**os.environ, "PYARD_CPU_ISA": isa}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-2000:]


def test_twins_of_the_backwards_are_their_derivatives() -> None:
    x, gate, branch = CASES["gated_residual"].inputs()
    grad = torch.randn_like(x)
    expected = torch.autograd.grad(reference.gated_residual(x, gate, branch), (gate, branch), grad)
    torch.testing.assert_close(reference.gated_residual_backward(grad, gate, branch), expected)
    shift, scale = torch.randn(2, B, S, D, dtype=torch.float64).requires_grad_().unbind(0)
    grads = torch.randn(2, B, S, T, D, dtype=torch.float64).unbind(0)
    with use_backend("reference"):
        outputs = ops.gated_residual_modulated_layer_norm(x, gate, branch, shift, scale, 1e-6)
    expected = torch.autograd.grad(outputs, (x, gate, branch, shift, scale), grads)
    found = reference.gated_residual_modulated_layer_norm_backward(*grads, outputs[0], gate, branch, scale, 1e-6)
    torch.testing.assert_close(found, expected)
    hidden, bias = CASES["gelu_tanh"].inputs()
    grad = torch.randn_like(hidden)
    expected = torch.autograd.grad(reference.gelu_tanh(hidden, bias), (hidden, bias), grad)
    torch.testing.assert_close(reference.gelu_tanh_backward(grad, hidden, bias), expected)
