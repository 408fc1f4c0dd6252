"""Chooses the implementation of each operator: the compiled kernel or plain PyTorch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from pyard.errors import InputError
from pyard.ops import limits, native

Backend = Literal["auto", "native", "reference", "sdpa", "merged", "flex"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
ATTENTION_BACKENDS = ("sdpa", "merged", "flex")

OPERATORS = (
    "modulated_layer_norm",
    "gated_residual",
    "gelu_tanh",
    "timestep_embedding",
    "block_attention",
    "gather_trajectories",
)

# Device types on which an operator has a kernel; one without a row runs as plain PyTorch everywhere.
KERNELS: dict[str, frozenset[str]] = {
    "modulated_layer_norm": frozenset({"cpu", "cuda"}),
    "gated_residual": frozenset({"cpu", "cuda"}),
    "gelu_tanh": frozenset({"cpu", "cuda"}),
    "timestep_embedding": frozenset({"cpu", "cuda"}),
    "block_attention": frozenset({"cpu", "cuda"}),
    "gather_trajectories": frozenset({"cpu", "cuda"}),
    "gated_residual_modulated_layer_norm": frozenset({"cuda"}),
}
DTYPES: dict[str, frozenset[torch.dtype]] = {
    "cpu": frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16}),
    "cuda": frozenset({torch.float32, torch.bfloat16, torch.float16}),
}
# Of `timestep_embedding`, on every device: the public function converts the times.
TIME_DTYPES = frozenset({torch.float32})
# Where `auto` takes the kernels. Those of CUDA have been compiled and emulated, but never run on a GPU.
AUTO_DEVICES = frozenset({"cpu"})


def _checked(name: str, source: str) -> Backend:
    for backend in BACKENDS:
        if name == backend:
            return backend
    raise InputError(f"{source} is {name!r}, expected one of {', '.join(BACKENDS)}")


library, missing_reason = native.load()
_told_of_failed_build = False
_choice: Backend = _checked(os.environ.get("PYARD_BACKEND", "auto"), "PYARD_BACKEND")


def current_backend() -> Backend:
    """The current backend: that of the innermost `use_backend`, else PYARD_BACKEND, else `auto`."""
    return _choice


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Runs the operators inside the `with` block with another backend, in all threads.

    Args:
        name: `auto`: the fastest one (on the CPU the kernel if there is one, else plain PyTorch). `native`: the kernel of every
            operator that has one, or an error that says why it cannot run. `reference`: plain PyTorch, as exporters need.
            The other three only choose for `block_attention` and mean `auto` for the rest. `sdpa`: PyTorch's SDPA, step by
            step. `merged`: SDPA's kernels over the block itself and over earlier blocks, merged by log-sum-exp. `flex`:
            FlexAttention on CUDA, SDPA on other devices.

    Raises:
        InputError: If `name` is none of these.
    """
    global _choice
    before, _choice = _choice, _checked(name, "backend")
    try:
        yield
    finally:
        _choice = before


def takes_native(operator: str, x: Tensor) -> bool:
    """Whether `operator` runs as a kernel on `x` under the current backend; `x` as in `why_not_native`.

    Raises:
        InputError: If the backend is `native` and the operator's kernel cannot run.
    """
    device = x.device.type
    if device == "cuda":
        _tell_of_failed_build()
    if operator not in KERNELS or _choice == "reference" or torch.onnx.is_in_onnx_export():
        return False
    if device in DTYPES and device not in KERNELS[operator]:
        return False  # no kernel was written for it there: `native` takes plain PyTorch, too
    if _choice != "native" and not has_kernel(operator, device):
        return False
    obstacle = why_not_native(operator, x)
    if obstacle and _choice == "native":
        raise InputError(
            f"backend 'native' cannot run {operator} on {device} in {x.dtype}: {obstacle}; use backend 'auto' or 'reference'"
        )
    return not obstacle


def why_not_native(operator: str, x: Tensor) -> str:
    """Why an operator's compiled kernel cannot run on a tensor (library, device, dtype or shape); "" if it can.

    Args:
        operator: name of the operator.
        x: its first tensor; for `block_attention` the keys, for `gather_trajectories` the steps.
    """
    device = x.device.type
    if operator not in KERNELS:
        return "no kernel of it has been written"
    if library is None:
        return f"the operators are not built ({missing_reason})"
    if device == "cuda" and not library.cuda_architectures:
        return "the library was built without CUDA; install with PYARD_CUDA=1"
    if device not in KERNELS[operator] or x.dtype not in _dtypes(operator, device):
        return _what_there_is(operator)
    if device != "cuda":
        return ""
    if obstacle := limits.shape_obstacle(operator, x.shape, x.dtype):
        return obstacle
    gpu = limits.describe_device(x.device)
    return limits.device_obstacle(operator, x.shape, x.dtype, gpu, library.cuda_architectures)


def _tell_of_failed_build() -> None:
    """Warns, once, that the CUDA kernels could not be built at installation. pip hides the output of builds that succeed."""
    global _told_of_failed_build
    if _told_of_failed_build or library is None or not library.cuda_failed or torch.compiler.is_compiling():
        return
    _told_of_failed_build = True
    reason = library.cuda_note.splitlines()[0]
    warnings.warn(
        f"pyard runs without its CUDA kernels: building them failed ({reason}); `python -m pyard doctor` says what to do.",
        stacklevel=4,
    )


def has_kernel(operator: str, device: str) -> bool:
    """Whether the current backend runs a kernel of `operator` on a device type, for the dtypes that the kernel supports."""
    if operator == "block_attention" and _choice in ATTENTION_BACKENDS:
        return False
    chosen = _choice == "native" or (_choice in ("auto", *ATTENTION_BACKENDS) and device in AUTO_DEVICES)
    return chosen and device in KERNELS.get(operator, ()) and _is_built(device)


def _is_built(device: str) -> bool:
    return library is not None and (device == "cpu" or bool(library.cuda_architectures))


def _dtypes(operator: str, device: str) -> frozenset[torch.dtype]:
    return TIME_DTYPES if operator == "timestep_embedding" else DTYPES[device]


def _what_there_is(operator: str) -> str:
    devices = sorted(name for name in KERNELS[operator] if _is_built(name))
    kernels = "; ".join(
        f"{name} in " + ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in _dtypes(operator, name)))
        for name in devices
    )
    return f"it has kernels for {kernels}"
