from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyard.errors import InputError
from pyard.ops import current_backend, modulated_layer_norm, native, use_backend
from pyard.ops.backend import has_kernel, library, takes_native

needs_native = pytest.mark.skipif(library is None, reason="the native operators are not built")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # -P: the current folder must not come before PYTHONPATH.
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_use_backend_nests_and_restores_after_an_error() -> None:
    before = current_backend()
    with use_backend("reference"):
        with pytest.raises(ZeroDivisionError), use_backend("native"):
            raise ZeroDivisionError
        assert current_backend() == "reference"
    assert current_backend() == before


def test_unknown_backends_are_named() -> None:
    with (
        pytest.raises(InputError, match="backend is 'fast', expected one of auto, native, reference"),
        use_backend("fast"),
    ):  # type: ignore[arg-type]
        pass
    finished = run_python("import pyard.ops", PYARD_BACKEND="fast")
    assert "PYARD_BACKEND is 'fast', expected one of auto, native, reference" in finished.stderr


def test_the_environment_chooses() -> None:
    finished = run_python("import pyard.ops; print(pyard.ops.current_backend())", PYARD_BACKEND="reference")
    assert finished.stdout.strip() == "reference"


@needs_native
def test_auto_takes_the_kernel_where_there_is_one() -> None:
    with use_backend("auto"):
        assert takes_native("modulated_layer_norm", torch.empty(1, dtype=torch.bfloat16))
        assert not takes_native("modulated_layer_norm", torch.empty(1, device="meta"))
        assert not takes_native("modulated_layer_norm", torch.empty(1, dtype=torch.float8_e4m3fn))
        assert has_kernel("block_attention", "cpu")
    with use_backend("sdpa"):
        assert has_kernel("modulated_layer_norm", "cpu")
        assert not has_kernel("block_attention", "cpu")


def test_native_refuses_what_it_has_no_kernel_for() -> None:
    x, per_step = torch.randn(1, 2, 3, 4, device="meta"), torch.randn(1, 2, 4, device="meta")
    with use_backend("native"), pytest.raises(InputError, match=r"cannot run modulated_layer_norm on meta in torch\.float32"):
        modulated_layer_norm(x, per_step, per_step)


@pytest.mark.slow
def test_a_new_operator_runs_as_plain_pytorch_until_it_has_a_kernel(tmp_path: Path) -> None:
    """Step 1 of "Adding an operator" in CONTRIBUTING.md, and nothing else."""
    package = tmp_path / "pyard"
    shutil.copytree(native.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "ops" / "reference.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef doubled(x: Tensor) -> Tensor:\n    return 2 * x\n")
    with (package / "ops" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write(
            "\n\ndef doubled(x: Tensor) -> Tensor:\n"
            '    compute = torch.ops.pyard.doubled if takes_native("doubled", x) else reference.doubled\n'
            "    return compute(x)\n"
        )
    table = package / "ops" / "backend.py"
    content = table.read_text(encoding="utf-8")
    assert content.count("OPERATORS = (\n") == 1
    table.write_text(content.replace("OPERATORS = (\n", 'OPERATORS = (\n    "doubled",\n'), encoding="utf-8")
    code = """
import torch, pyard.ops as ops
from pyard.cli.doctor import examine
for backend in ("auto", "native", "reference"):
    with ops.use_backend(backend):
        assert ops.doubled(torch.ones(3)).tolist() == [2.0] * 3
print(ops.why_not_native("doubled", torch.ones(3)), examine().operators["doubled"]["cpu"], sep="; ")
"""
    finished = run_python(code, PYTHONPATH=str(tmp_path))
    assert finished.stdout.strip() == "no kernel of it has been written; reference", finished.stderr


@needs_native
def test_an_unknown_instruction_set_is_named() -> None:
    refused = run_python("import pyard.ops", PYARD_CPU_ISA="sse9")
    assert "PYARD_CPU_ISA is 'sse9', expected one of baseline" in refused.stderr


def test_without_the_library_everything_works_and_is_said_once(tmp_path: Path) -> None:
    package = tmp_path / "pyard"
    shutil.copytree(native.PACKAGE, package, ignore=shutil.ignore_patterns("libpyard_ops.*", "__pycache__"))
    (package / "_build.json").write_text(json.dumps({"built": False, "reason": "no compiler was found\nlog"}))
    code = """
import torch, pyard.ops as ops
x = torch.randn(1, 2, 3, 4)
for _ in range(2):
    print(tuple(ops.modulated_layer_norm(x, x[:, :, 0], x[:, :, 0]).shape))
"""
    finished = run_python(code, PYTHONPATH=str(tmp_path))
    assert finished.stdout == "(1, 2, 3, 4)\n" * 2, finished.stderr
    assert finished.stderr.count("pyard runs without its native operators (no compiler was found)") == 1
    refused = run_python(code, PYTHONPATH=str(tmp_path), PYARD_BACKEND="native")
    assert "cannot run modulated_layer_norm on cpu in torch.float32: the operators are not built" in refused.stderr


@needs_native
@pytest.mark.parametrize(("failed", "warnings"), [(True, 1), pytest.param(False, 0, marks=pytest.mark.slow)])
def test_cuda_kernels_that_could_not_be_built_are_missed_once(tmp_path: Path, failed: bool, warnings: int) -> None:
    shutil.copytree(native.PACKAGE, tmp_path / "pyard", ignore=shutil.ignore_patterns("__pycache__"))
    record = {"built": True, "torch": "2.13.0", "cuda": "compiling failed: stream.cpp:16: error: x\nlog", "cuda_failed": failed}
    (tmp_path / "pyard" / "_build.json").write_text(json.dumps(record))
    code = """
import torch, pyard.ops as ops
from torch._subclasses.fake_tensor import FakeTensorMode
def call(device):
    ops.gelu_tanh(torch.empty(3, 4, device=device), torch.empty(4, device=device))
call("cpu")
print("on the CPU nothing is missed")
with FakeTensorMode():  # a CUDA device to Python, without a GPU
    call("cuda")
    call("cuda")
"""
    finished = run_python(code, PYTHONPATH=str(tmp_path), PYTHONWARNINGS="always")
    assert finished.returncode == 0, finished.stderr
    said = "pyard runs without its CUDA kernels: building them failed (compiling failed: stream.cpp:16: error: x)"
    assert finished.stderr.count(said) == warnings
    before = run_python(code.split("with Fake")[0], PYTHONPATH=str(tmp_path))
    assert said not in before.stderr
