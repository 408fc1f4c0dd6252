from __future__ import annotations

import os

import pytest
import torch
from ops.tolerance import assert_as_exact_as_plain
from torch import Tensor

from pyard.errors import InputError
from pyard.ops import modulated_layer_norm, reference, use_backend
from pyard.ops.backend import library

needs_native = pytest.mark.skipif(library is None, reason="the native operators are not built")

EPS = 1e-6
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# B, S, T, D: no batch, one token, no multiple of any vector, more rows than one task takes.
SIZES = [
    (0, 2, 3, 8),
    (2, 4, 0, 8),
    (1, 1, 1, 2),
    (2, 3, 1, 5),
    (1, 4, 17, 24),
    (2, 2, 65, 72),
    (1, 2, 257, 37),
    (2, 1, 130, 384),
]


def sample_inputs(
    size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, offset: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    B, S, T, D = size
    x = (torch.randn(B, S, T, D, dtype=torch.float64) * 2 + offset).to(dtype)
    shift = torch.randn(B, S, D, dtype=torch.float64).to(dtype)
    scale = torch.randn(B, S, D, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), shift.requires_grad_(), scale.requires_grad_()


def closed_form(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """In float64, from the definition of mean and variance."""
    x, shift, scale = x.double(), shift.double(), scale.double()
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (x - mean).square().sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + EPS).sqrt() * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)


def gradients(out: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, grad.to(out.dtype))


def check_against_closed_form(inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> None:
    exact = closed_form(*inputs)
    plain = reference.modulated_layer_norm(*inputs, EPS)
    with use_backend("native"):
        ours = modulated_layer_norm(*inputs, eps=EPS)
    assert_as_exact_as_plain(ours, plain, exact)
    triples = zip(gradients(ours, inputs, grad), gradients(plain, inputs, grad), gradients(exact, inputs, grad), strict=True)
    for our_gradient, plain_gradient, exact_gradient in triples:
        assert_as_exact_as_plain(our_gradient, plain_gradient, exact_gradient.double())


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_closed_form(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = sample_inputs(size, dtype)
    check_against_closed_form(inputs, torch.randn(size))


@needs_native
def test_rows_far_from_zero_keep_their_digits() -> None:
    inputs = sample_inputs((1, 2, 5, 96), torch.float32, offset=300.0)
    check_against_closed_form(inputs, torch.randn(1, 2, 5, 96))


def test_the_twin_is_the_closed_form() -> None:
    inputs = sample_inputs((2, 3, 5, 16), torch.float64)
    with use_backend("reference"):
        torch.testing.assert_close(modulated_layer_norm(*inputs, eps=EPS), closed_form(*inputs), rtol=1e-12, atol=1e-12)
    grad = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    by_formula = reference.modulated_layer_norm_backward(grad, inputs[0], inputs[2], EPS)
    torch.testing.assert_close(by_formula, gradients(closed_form(*inputs), inputs, grad), rtol=1e-11, atol=1e-11)


@needs_native
def test_slices_of_a_fused_projection_and_transposed_tokens_are_taken_as_they_are() -> None:
    B, S, T, D = 2, 3, 9, 20
    shift, scale, _ = torch.randn(B, S, 3 * D, requires_grad=True).chunk(3, dim=-1)
    by_token = torch.randn(T, S, B, D, requires_grad=True).permute(2, 1, 0, 3)
    by_channel = torch.randn(B, S, D, T, requires_grad=True).transpose(2, 3)
    for x in (by_token, by_channel):
        check_against_closed_form((x, shift, scale), torch.randn(B, S, D, T).transpose(2, 3))
        check_against_closed_form((x, shift, scale), torch.ones(()).expand(B, S, T, D))


@needs_native
def test_gradcheck_to_second_order() -> None:
    inputs = sample_inputs((2, 2, 3, 5), torch.float64)
    with use_backend("native"):
        assert torch.autograd.gradcheck(modulated_layer_norm, inputs)
        assert torch.autograd.gradgradcheck(modulated_layer_norm, inputs)


@needs_native
@pytest.mark.parametrize("size", [(2, 3, 5, 12), (0, 2, 3, 8)], ids=str)
def test_opcheck(size: tuple[int, int, int, int]) -> None:
    inputs = sample_inputs(size)
    torch.library.opcheck(torch.ops.pyard.modulated_layer_norm.default, (*inputs, EPS))
    backward_inputs = (torch.randn(size, requires_grad=True), inputs[0], inputs[2], EPS)
    torch.library.opcheck(torch.ops.pyard.modulated_layer_norm_backward.default, backward_inputs)


@needs_native
def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    inputs = sample_inputs((3, 2, 200, 64))
    grad = torch.randn(3, 2, 200, 64)

    def run() -> tuple[Tensor, ...]:
        return gradients(modulated_layer_norm(*inputs), inputs, grad)

    one = run()
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(run(), one, strict=True))


@needs_native
def test_compiles_without_graph_breaks() -> None:
    inputs = sample_inputs((2, 3, 5, 12))
    compiled = torch.compile(modulated_layer_norm, fullgraph=True, backend="aot_eager")
    grad = torch.randn(2, 3, 5, 12)
    torch.testing.assert_close(compiled(*inputs), modulated_layer_norm(*inputs))
    torch.testing.assert_close(
        gradients(compiled(*inputs), inputs, grad), gradients(modulated_layer_norm(*inputs), inputs, grad)
    )
    with use_backend("reference"):
        torch.testing.assert_close(compiled(*inputs), reference.modulated_layer_norm(*inputs, EPS))


class Block(torch.nn.Module):
    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return modulated_layer_norm(x, shift, scale)


@needs_native
def test_exports_natively_and_as_plain_operators() -> None:
    inputs = tuple(tensor.detach() for tensor in sample_inputs((2, 3, 5, 12)))
    batch = torch.export.Dim("batch")
    exported = torch.export.export(Block(), inputs, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    assert "pyard.modulated_layer_norm" in str(exported.graph)
    larger = tuple(tensor.detach() for tensor in sample_inputs((4, 3, 5, 12)))
    torch.testing.assert_close(exported.module()(*larger), modulated_layer_norm(*larger))
    with use_backend("reference"):
        assert "pyard" not in str(torch.export.export(Block(), inputs).graph)


def test_exports_to_onnx_as_plain_operators() -> None:
    inputs = tuple(tensor.detach() for tensor in sample_inputs((2, 3, 5, 12)))
    program = torch.onnx.export(Block(), inputs, dynamo=True, verbose=False)
    assert program is not None
    assert {node.domain for node in program.model.graph} <= {"", "ai.onnx"}
    torch.testing.assert_close(program(*inputs)[0], modulated_layer_norm(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_keeps_the_dtype_of_x(backend: str) -> None:
    x, shift, scale = sample_inputs((2, 3, 5, 12))
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        shift_low, scale_low = (shift.bfloat16(), scale.bfloat16())
        assert modulated_layer_norm(x, shift_low, scale_low).dtype == torch.float32
        assert modulated_layer_norm(x.bfloat16(), shift, scale).dtype == torch.bfloat16


@needs_native
@pytest.mark.filterwarnings("ignore:.*performance drop")
def test_vmap_equals_a_loop() -> None:
    x, shift, scale = sample_inputs((2, 3, 5, 12))
    many = torch.randn(3, *x.shape)
    together = torch.func.vmap(modulated_layer_norm, in_dims=(0, None, None))(many, shift, scale)
    torch.testing.assert_close(together, torch.stack([modulated_layer_norm(one, shift, scale) for one in many]))


def test_wrong_input_is_named() -> None:
    x, shift, scale = sample_inputs((2, 3, 5, 12))
    with pytest.raises(InputError, match=r"shift has shape \[2, 5, 12\], expected \[B, S, D\] = \[2, 3, 12\]"):
        modulated_layer_norm(x, x[:, 0], scale)
    with pytest.raises(InputError, match=r"x has shape \[2, 3, 12\]"):
        modulated_layer_norm(shift, shift, scale)
    with pytest.raises(InputError, match=r"dtype torch\.int64"):
        modulated_layer_norm(x.long(), shift, scale)


@needs_native
def test_the_operator_itself_names_wrong_input() -> None:
    x, shift, scale = sample_inputs((2, 3, 5, 12))
    operator = torch.ops.pyard.modulated_layer_norm
    with pytest.raises(RuntimeError, match=r"scale has shape \[2, 3, 11\], expected \[2, 3, 12\]"):
        operator(x, shift, scale[..., 1:], EPS)
    with pytest.raises(RuntimeError, match="shift has dtype Double, expected that of x, Float"):
        operator(x, shift.double(), scale, EPS)


@needs_native
@pytest.mark.skipif("PYARD_CPU_ISA" not in os.environ, reason="PYARD_CPU_ISA asks for no instruction set")
def test_the_instruction_set_is_the_one_asked_for() -> None:
    assert library is not None
    assert library.active_instruction_set == os.environ["PYARD_CPU_ISA"]


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_wide_stream_is_exactly_that_of_converted_tensors(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, *others = sample_inputs(size)
    shift, scale = (tensor.detach().to(dtype).requires_grad_() for tensor in others)
    grad = torch.randn(size).to(dtype)
    ours = torch.ops.pyard.modulated_layer_norm(x, shift, scale, EPS)
    expected = torch.ops.pyard.modulated_layer_norm(x, shift.float(), scale.float(), EPS).to(dtype)
    assert torch.equal(ours, expected)
    leaves = (x, shift, scale)
    pairs = zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@needs_native
def test_derivatives_of_a_wide_stream_to_second_order() -> None:
    x, *others = sample_inputs((1, 2, 3, 8))
    leaves = (x, *(tensor.detach().bfloat16().requires_grad_() for tensor in others))

    def penalty(*leaves: Tensor) -> Tensor:
        out = torch.ops.pyard.modulated_layer_norm(*leaves, EPS)
        slopes = torch.autograd.grad(out.float().square().mean(), leaves, create_graph=True)
        return torch.stack([slope.float().square().sum() for slope in slopes]).sum()

    gradients_of = torch.autograd.grad(penalty(*leaves), leaves)
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    for ours, exact in zip(gradients_of, torch.autograd.grad(penalty(*wide), wide), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0.05, atol=0.05)


@needs_native
def test_other_mixtures_of_dtypes_are_refused() -> None:
    x, shift, scale = (tensor.detach() for tensor in sample_inputs((1, 2, 3, 8)))
    with pytest.raises(RuntimeError, match="scale has dtype Double, expected that of x, Float, or 16 bits beside float32"):
        torch.ops.pyard.modulated_layer_norm(x, shift, scale.double(), EPS)
    with pytest.raises(RuntimeError, match="scale has dtype BFloat16, expected that of x, Half"):
        torch.ops.pyard.modulated_layer_norm(x.half(), shift.bfloat16(), scale.bfloat16(), EPS)
    with pytest.raises(RuntimeError, match="shift has dtype Float"):
        torch.ops.pyard.modulated_layer_norm(x, shift, scale.bfloat16(), EPS)
