"""What the compiled library asks of the machine it is loaded on."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from pyard.ops.backend import library

pytestmark = [
    pytest.mark.skipif(library is None, reason="the native operators are not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads ELF"),
]

# LibTorch's stable C functions, and what a C++ program takes from the system.
STABLE = re.compile(r"^(aoti_torch_|torch_)[a-z0-9_]+$")
SYSTEM = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^(__gmon_start__|_ITM_\w+)$")


def tool_output(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} (binutils) is not installed")
    assert library is not None
    command = [tool, *arguments, str(library.path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_asks_torch_for_its_stable_c_abi_alone() -> None:
    symbols = [line.split()[-1] for line in tool_output("nm", "-D", "--undefined-only").splitlines()]
    of_torch = [symbol for symbol in symbols if not SYSTEM.search(symbol)]
    assert "torch_call_dispatcher" in of_torch
    assert [symbol for symbol in of_torch if not STABLE.match(symbol)] == []


def test_links_neither_python_nor_a_path() -> None:
    dynamic = tool_output("readelf", "-d")
    assert "libtorch_cpu.so" in dynamic
    assert "python" not in dynamic
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic


def test_exports_no_kernels() -> None:
    exported = [line.split()[-1] for line in tool_output("nm", "-D", "--defined-only").splitlines()]
    ours = [symbol for symbol in exported if "pyard" in symbol]
    assert ours
    assert all(symbol.startswith("pyard_") for symbol in ours), "C++ functions would clash with another pyard's"
