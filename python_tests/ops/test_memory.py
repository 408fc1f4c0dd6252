"""Calls leave nothing behind: the stable ABI hands over arguments that some kinds of C++ signature never free."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.test_contracts import CASES, SMOOTH

from pyard.ops import use_backend
from pyard.ops.backend import library

CALLS = 20_000
# Bytes: a leak of four a call. Growth of a cache or two stays far below it.
MOST = 4 * CALLS

pytestmark = [
    pytest.mark.skipif(library is None, reason="the native operators are not built"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc how much is allocated"),
]


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def allocated() -> int:
    """Bytes that the process has taken from malloc and not given back."""
    ask: Any = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        pytest.skip("this C library has no mallinfo2")
    ask.restype = MallInfo
    info = ask()
    return int(info.uordblks + info.hblkhd)


def growth(call: Callable[[], object], calls: int) -> int:
    """Bytes still allocated after `calls` calls that were not before them."""
    for _ in range(100):  # caches are filled
        call()
    before = allocated()
    for _ in range(calls):
        call()
    return allocated() - before


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_calls_leave_no_memory_behind(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()

    def step() -> None:
        out = case.face(*inputs)
        if name in SMOOTH:  # the others have no backward kernel
            torch.autograd.grad(out, inputs, out)

    with use_backend("native"):
        assert growth(step, CALLS) < MOST


def test_a_leak_would_be_seen() -> None:
    kept: list[torch.Tensor] = []
    assert growth(lambda: kept.append(torch.empty(2)), CALLS) > MOST


def test_no_operator_takes_a_string() -> None:
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("pyard::")]
    assert schemas
    for schema in schemas:
        assert all("str" not in str(argument.type) for argument in schema.arguments), schema
