"""The row kernels in the regime of autocast: a float32 residual stream, 16 bits everywhere else."""

from __future__ import annotations

import pytest
import torch
from ops.cuda_emulator.kernels import Kernels
from ops.device_kernels import DeviceKernels
from ops.tolerance import assert_as_exact_as_plain
from torch import Tensor

from pyard.ops import reference

EPS = 1e-6
# Every shape of a row: one warp to sixteen, ragged and whole.
SIZES = [(1, 1, 1, 8), (2, 3, 1, 72), (1, 2, 33, 512), (2, 2, 37, 1152), (1, 1, 5, 1280), (1, 2, 9, 2048), (1, 1, 2, 8192)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("has_gate", "has_norm"), [(True, False), (False, True), (True, True)])
def test_as_exact_as_converting_forth_and_back(
    kernels: Kernels | DeviceKernels, size: tuple[int, int, int, int], dtype: torch.dtype, has_gate: bool, has_norm: bool
) -> None:
    B, S, T, D = size
    # Tokens that are no neighbours, and slices of a fused modulation.
    x, branch = (2 * torch.randn(T, B, S, D).permute(1, 2, 0, 3) for _ in range(2))
    branch = branch.to(dtype)
    gate, shift, scale = torch.randn(B, S, 3 * D).to(dtype).chunk(3, dim=-1)
    grad_residual, grad_normal = torch.randn(size), torch.randn(size).to(dtype)
    gating, norming = (gate, branch) if has_gate else (None, None), (shift, scale) if has_norm else (None, None)
    residual, normal = kernels.residual_norm_forward(x, *gating, *norming, EPS)
    seen_by_norm = residual if has_gate else x
    grads = (grad_residual if has_gate else None, grad_normal if has_norm else None)
    ours = kernels.residual_norm_backward(*grads, seen_by_norm, *gating, norming[1], EPS)
    ours.update(residual=residual, normal=normal)

    def results(kind: torch.dtype) -> dict[str, Tensor]:
        """All in `kind`; what is stored in `dtype` is rounded once."""
        names = ["x", *(["branch", "gate"] if has_gate else []), *(["shift", "scale"] if has_norm else [])]
        inputs = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
        leaves = {name: inputs[name].to(kind).requires_grad_() for name in names}
        stream = reference.gated_residual(leaves["x"], leaves["gate"], leaves["branch"]) if has_gate else leaves["x"]
        outputs = {"residual": stream} if has_gate else {}
        if has_norm:
            outputs["normal"] = reference.modulated_layer_norm(stream, leaves["shift"], leaves["scale"], EPS)
        given = {"residual": grad_residual.to(kind), "normal": grad_normal.to(kind)}
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [given[name] for name in outputs])
        found = {**outputs, **{f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}}
        if not has_norm:
            del found["dx"]  # that of x is grad_residual itself
        return {name: value.detach() for name, value in found.items()}

    plain, exact = results(torch.float32), results(torch.float64)
    for name, exact_one in exact.items():
        kind = torch.float32 if name in ("residual", "dx") else dtype
        assert ours[name].dtype == kind
        assert_as_exact_as_plain(ours[name], plain[name].to(kind), exact_one)


def test_only_a_float32_stream_may_differ(emulated: Kernels) -> None:
    x, per_step = torch.randn(1, 1, 2, 64).half(), torch.randn(1, 1, 64).bfloat16()
    with pytest.raises(AssertionError, match="only beside float32"):
        emulated.residual_norm_forward(x, None, None, per_step, per_step, EPS)
    narrow, wide = torch.randn(1, 1, 2, 12), torch.randn(1, 1, 12).bfloat16()  # 12 is a multiple of 4, not of 8
    with pytest.raises(AssertionError, match="multiple of 16 bytes"):
        emulated.residual_norm_forward(narrow, None, None, wide, wide, EPS)


def test_no_result_depends_on_the_order_of_threads(emulated: Kernels) -> None:
    size, dtype = (1, 2, 37, 2048), torch.bfloat16
    x, branch, per_step = torch.randn(size), torch.randn(size).to(dtype), torch.randn(1, 2, 2048).to(dtype)
    results = []
    for seed in (1, 2, 3):
        emulated.library.emulated_order(seed)
        residual, normal = emulated.residual_norm_forward(x, per_step, branch, per_step, per_step, EPS)
        grads = emulated.residual_norm_backward(x, branch, residual, per_step, branch, per_step, EPS)
        results.append([residual, normal, *grads.values()])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
