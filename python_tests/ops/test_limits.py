"""What is said of the CUDA kernels' limits, against the kernels' own source on the emulated machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from ops.cuda_emulator.kernels import Kernels

from pyard.errors import InputError
from pyard.ops import limits, modulated_layer_norm, use_backend, why_not_native
from pyard.ops.backend import library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
AMPERE = limits.CudaDevice((8, 0), 163 * 1024)
CONSUMER = limits.CudaDevice((8, 6), limits.SMALL_SHARED_BYTES)
BUILT = ("8.0", "9.0+PTX")


@pytest.fixture
def on_device(emulated: Kernels) -> Iterator[Callable[[limits.CudaDevice], None]]:
    yield lambda device: emulated.library.emulated_shared_bytes(device.shared_bytes)
    emulated.library.emulated_shared_bytes(AMPERE.shared_bytes)


def is_accepted(call: Callable[[], object]) -> bool:
    try:
        call()
    except AssertionError:
        return False
    return True


def obstacle(operator: str, x: torch.Tensor, device: limits.CudaDevice = AMPERE) -> str:
    shape = tuple(x.shape)
    return limits.shape_obstacle(operator, shape, x.dtype) or limits.device_obstacle(operator, shape, x.dtype, device, BUILT)


@pytest.mark.parametrize("device", [AMPERE, CONSUMER], ids=["sm_80", "sm_86"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_takes_the_heads_that_it_says(
    emulated: Kernels, on_device: Callable[[limits.CudaDevice], None], dtype: torch.dtype, device: limits.CudaDevice
) -> None:
    on_device(device)
    for head_dim in (1, 4, 7, 8, 12, 64, 72, 80, 81, 88, 96, 104, 128, 132, 136):
        q = torch.randn(1, 1, 4, head_dim).to(dtype)

        def both(q: torch.Tensor = q) -> None:
            out, lse = emulated.attention_forward(q, q, q, 2, "causal")
            for deterministic in (False, True):
                emulated.attention_backward(q, q, q, q, out, lse, 2, "causal", deterministic=deterministic)

        found = obstacle("block_attention", q, device)
        assert is_accepted(both) == (not found), (head_dim, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_the_sizes_that_are_said(emulated: Kernels, dtype: torch.dtype) -> None:
    for D in (1, 2, 4, 8, 12, 20, 72, 100, 1152, 8192, 8196, 8200):
        x, per_step = torch.randn(1, 1, 2, D).to(dtype), torch.randn(1, 1, D).to(dtype)

        def both(x: torch.Tensor = x, per_step: torch.Tensor = per_step) -> None:
            emulated.residual_norm_forward(x, per_step, x, per_step, per_step, 1e-6)
            emulated.residual_norm_backward(x, x, x, per_step, x, per_step, 1e-6)

        found = obstacle("gated_residual_modulated_layer_norm", x)
        assert is_accepted(both) == (not found), (D, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_takes_the_rows_that_it_says(emulated: Kernels, dtype: torch.dtype) -> None:
    for D in (1, 2, 4, 8, 12, 16, 1160):
        x, bias = torch.randn(2, D).to(dtype), torch.randn(D).to(dtype)

        def both(x: torch.Tensor = x, bias: torch.Tensor = bias) -> None:
            emulated.gelu_forward(x, bias)
            emulated.gelu_backward(x, x, bias)

        assert is_accepted(both) == (not obstacle("gelu_tanh", x))


def test_samples_of_the_sizes_that_are_said(emulated: Kernels) -> None:
    for row in (1, 4, 8, 12, 16, 72):
        noise, steps, index = torch.randn(2, row), torch.randn(2, 2, row), torch.tensor([1])

        def gather(noise: torch.Tensor = noise, steps: torch.Tensor = steps, index: torch.Tensor = index) -> None:
            emulated.gather_trajectories(noise, steps, index, torch.float32)

        assert is_accepted(gather) == (not obstacle("gather_trajectories", steps))


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), ("8.0", "9.0+PTX"), True),
        ((8, 9), ("8.0", "9.0+PTX"), True),
        ((12, 0), ("8.0", "9.0+PTX"), True),
        ((7, 5), ("8.0", "9.0+PTX"), False),
        ((10, 0), ("8.0", "9.0"), False),
        ((9, 0), ("8.0",), False),
        ((9, 0), ("9.0a",), True),
        ((10, 0), ("9.0a",), False),
    ],
)
def test_which_gpus_the_compiled_code_runs_on(capability: tuple[int, int], architectures: tuple[str, ...], runs: bool) -> None:
    device = limits.CudaDevice(capability, 163 * 1024)
    found = limits.device_obstacle("block_attention", (1, 1, 4, 64), torch.bfloat16, device, architectures)
    assert (found == "") == runs
    assert runs or f"compute capability {capability[0]}.{capability[1]}" in found


def test_sizes_beyond_a_grid_are_refused() -> None:
    assert "65536 heads" in limits.shape_obstacle("block_attention", (1, 65536, 4, 64), torch.float32)
    assert "20001 steps" in limits.shape_obstacle("gated_residual", (1, 20001, 4, 64), torch.float32)
    assert "65536 steps" in limits.shape_obstacle("gather_trajectories", (1, 65536, 8), torch.float32)
    assert limits.shape_obstacle("timestep_embedding", (7,), torch.float32) == ""


@pytest.mark.skipif(library is None, reason="the native operators are not built")
def test_the_question_is_answered_where_the_error_is_raised() -> None:
    assert why_not_native("block_attention", torch.empty(1, 1, 1, 7)) == ""  # the CPU's kernels take every shape
    narrow = torch.empty(1, 1, 1, 8, dtype=torch.float8_e4m3fn)
    assert "it has kernels for cpu in bfloat16, float16, float32, float64" in why_not_native("block_attention", narrow)
    x, per_step = torch.empty(1, 1, 2, 8, device="meta"), torch.empty(1, 1, 8, device="meta")
    with use_backend("native"), pytest.raises(InputError, match="it has kernels for cpu"):
        modulated_layer_norm(x, per_step, per_step)


@pytest.mark.cuda
def test_a_gpu_is_asked_for_what_it_has() -> None:
    gpu = limits.describe_device(torch.device("cuda"))
    assert gpu.capability == torch.cuda.get_device_capability()
    assert gpu.shared_bytes >= limits.SMALL_SHARED_BYTES

    def answer(x: torch.Tensor) -> torch.Tensor:
        return x + len(why_not_native("block_attention", x))

    x = torch.zeros(1, 1, 2, 7, device="cuda")
    torch.testing.assert_close(torch.compile(answer, fullgraph=True, backend="aot_eager")(x), answer(x))
