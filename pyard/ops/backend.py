"""Which implementation an operator takes: the compiled one or its plain twin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from pyard.errors import InputError
from pyard.ops import native

Backend = Literal["auto", "native", "reference"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

OPERATORS = (
    "modulated_layer_norm",
    "gated_residual",
    "gelu_tanh",
    "timestep_embedding",
    "block_attention",
    "gather_trajectories",
)

# Device types on which an operator has a kernel; what is not here runs as its twin everywhere.
KERNELS: dict[str, frozenset[str]] = {operator: frozenset({"cpu"}) for operator in OPERATORS}
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def _checked(name: str, source: str) -> Backend:
    for backend in BACKENDS:
        if name == backend:
            return backend
    raise InputError(f"{source} is {name!r}, expected one of {', '.join(BACKENDS)}")


library, missing_reason = native.load()
_choice: Backend = _checked(os.environ.get("PYARD_BACKEND", "auto"), "PYARD_BACKEND")


def current_backend() -> Backend:
    """The backend in force: that of the innermost `use_backend`, else of PYARD_BACKEND, else `auto`."""
    return _choice


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Runs the operators called inside the block, in every thread, with another backend.

    Args:
        name: `auto` (native where there is a kernel for device and dtype, else the plain twin), `native` (the kernel of
            every operator that has one, or an error that says why not) or `reference` (plain PyTorch; what exporters
            want).

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
    """Whether `operator` runs natively on `x` under the backend in force.

    Raises:
        InputError: If the backend is `native` and the operator's kernel cannot run.
    """
    if operator not in KERNELS or _choice == "reference" or torch.onnx.is_in_onnx_export():
        return False
    possible = library is not None and x.device.type in KERNELS[operator] and x.dtype in DTYPES
    if not possible and _choice == "native":
        raise InputError(f"backend 'native' cannot run {operator} on {x.device.type} in {x.dtype}: {_obstacle(operator)}")
    return possible


def _obstacle(operator: str) -> str:
    if library is None:
        return f"the operators are not built ({missing_reason}); use backend 'auto' or 'reference'"
    devices = ", ".join(sorted(KERNELS[operator]))
    dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in DTYPES))
    return f"it has kernels for {devices} in {dtypes}; use backend 'auto' or 'reference'"
