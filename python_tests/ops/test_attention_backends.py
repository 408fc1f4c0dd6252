"""The ways to compute block_attention that have no kernel of pyard's: SDPA step by step, and FlexAttention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pyard import ops
from pyard.ops import MASKS, flex, reference
from pyard.ops.backend import library

SIZES = [(3, 3, 5), (1, 4, 17), (2, 2, 130)]  # query blocks, key blocks, T; FlexAttention's own blocks are of 128


def sample(size: tuple[int, int, int], with_bias: bool, device: str = "cpu") -> tuple[Tensor, ...]:
    query_steps, key_steps, T = size
    B, H, head_dim = 2, 2, 16
    tensors = [torch.randn(B, H, steps * T, head_dim, device=device) for steps in (query_steps, key_steps, key_steps)]
    return *tensors, *([torch.randn(H, device=device)] if with_bias else [])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_flex_attention_is_the_plain_twin(size: tuple[int, int, int], mask: str, with_bias: bool) -> None:
    q, k, v, *bias = sample(size, with_bias)
    options = (size[2], mask, 2 if mask == "window" else None, bias[0] if with_bias else None)
    torch.testing.assert_close(flex.block_attention(q, k, v, *options), reference.block_attention(q, k, v, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_sdpa_step_by_step_compiles_without_graph_breaks(mask: str, dtype: torch.dtype) -> None:
    q, k, v, bias = (tensor.to(dtype).requires_grad_() for tensor in sample((2, 3, 5), True))
    window = 2 if mask == "window" else None

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ops.block_attention(q, k, v, 5, mask, window, bias)

    def with_gradients(function: object) -> tuple[Tensor, ...]:
        out = function(q, k, v, bias)  # type: ignore[operator]
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v, bias))

    with ops.use_backend("sdpa"):
        assert not ops.takes_native("block_attention", q)
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(with_gradients(compiled), with_gradients(attend))


def test_the_choice_is_for_attention_alone() -> None:
    x = torch.empty(1)
    with ops.use_backend("auto"):
        usual = ops.takes_native("modulated_layer_norm", x)
    for backend in ("sdpa", "flex"):
        with ops.use_backend(backend):  # type: ignore[arg-type]
            assert ops.takes_native("modulated_layer_norm", x) == usual
            assert not ops.takes_native("block_attention", x)


@pytest.mark.skipif(library is None, reason="the native operators are not built")
def test_auto_leaves_own_blocks_without_history_to_sdpa_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once `auto` takes kernels there: shapes and devices alone, since no GPU is needed to choose."""
    plain: list[int] = []

    def instead(q: Tensor, k: Tensor, *_: object) -> Tensor:
        plain.append(k.shape[2])
        return q

    monkeypatch.setattr(ops, "takes_native", lambda *_: True)
    monkeypatch.setattr(reference, "block_attention", instead)
    with FakeTensorMode():
        q, k = (torch.empty(2, 2, steps * 5, 16, device="cuda") for steps in (1, 3))
        with ops.use_backend("auto"):
            ops.block_attention(q, q, q, 5)
            ops.block_attention(q, k, k, 5)
        with ops.use_backend("native"):
            ops.block_attention(q, q, q, 5)
    assert plain == [5]


@pytest.mark.cuda
def test_flex_attention_has_the_gradients_of_the_plain_twin() -> None:
    inputs = [tensor.requires_grad_() for tensor in sample((2, 3, 32), True, "cuda")]  # one mask: compiling takes long

    def with_gradients() -> tuple[Tensor, ...]:
        out = ops.block_attention(*inputs[:3], 32, "window", 2, inputs[3])
        return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)

    with ops.use_backend("reference"):
        expected = with_gradients()
    with ops.use_backend("flex"):
        torch.testing.assert_close(with_gradients(), expected, rtol=1e-3, atol=1e-3)
