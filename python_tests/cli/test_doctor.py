from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyard
from pyard.cli import doctor as checks
from pyard.cli.doctor import Problem, as_text, doctor, examine
from pyard.ops import native, self_test
from pyard.ops.backend import KERNELS, OPERATORS, library

needs_native = pytest.mark.skipif(library is None, reason="the native operators are not built")


@needs_native
def test_a_good_installation_has_no_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["pyard"] == pyard.__version__
    assert set(report["operators"]) == {*KERNELS, *OPERATORS}
    assert report["operators"]["modulated_layer_norm"]["cpu"] == "native"
    assert set(report["self_test"]) == {operator for operator, devices in KERNELS.items() if "cpu" in devices}
    assert all(0 <= difference < self_test.TOLERANCE for difference in report["self_test"].values())
    assert "CPUExecutionProvider" in report["onnxruntime_providers"]


def test_the_text_names_versions_operators_and_remedies() -> None:
    report = examine()
    report.problems = [Problem("the flux is low", "add flux")]
    text = as_text(report)
    assert f"torch            {torch.__version__}" in text
    assert "modulated_layer_norm" in text
    assert "problem: the flux is low\n  do: add flux" in text
    assert "native: compiled, reference: plain PyTorch" in text
    for line in text.splitlines():
        if line.strip().startswith(tuple(KERNELS)):
            assert ("only GPUs have a kernel of it" in line) == ("cpu" not in KERNELS[line.split()[0]]), line


@needs_native
def test_a_build_that_recorded_nothing_about_cuda_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_build.json").write_text('{"built": true}', encoding="utf-8")
    monkeypatch.setattr(native, "BUILD_RECORD", tmp_path / "_build.json")
    monkeypatch.setattr(native.derivatives, "register", lambda: None)  # once in a process
    loaded, _ = native.load()
    assert loaded is not None
    assert loaded.cuda_note == "the build did not record why"


@needs_native
@pytest.mark.parametrize("factor", [1 + 1e-4, math.nan])
@pytest.mark.parametrize("operator", ["modulated_layer_norm", "timestep_embedding", "block_attention"])
def test_a_wrong_kernel_is_found(operator: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    true_twin = getattr(self_test.reference, operator)
    monkeypatch.setattr(self_test.reference, operator, lambda *inputs: true_twin(*inputs) * factor)
    assert [problem.what.split()[0] for problem in examine().problems] == [operator]


@needs_native
def test_a_gradient_that_is_nan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    true_twin = self_test.reference.gated_residual

    def twin(x: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        branch.register_hook(lambda grad: grad * float("nan"))
        return true_twin(x, gate, branch)

    monkeypatch.setattr(self_test.reference, "gated_residual", twin)
    assert math.isnan(self_test.self_test()["gated_residual"])


def run_doctor(package_in: Path, record: dict[str, object]) -> subprocess.CompletedProcess[str]:
    (package_in / "pyard" / "_build.json").write_text(json.dumps(record))
    command = [sys.executable, "-P", "-c", "import sys; from pyard.cli.doctor import doctor; sys.exit(doctor())"]
    environment = {**os.environ, "PYTHONPATH": str(package_in)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@needs_native
def test_cuda_kernels_that_could_not_be_built_are_a_problem(tmp_path: Path) -> None:
    shutil.copytree(native.PACKAGE, tmp_path / "pyard", ignore=shutil.ignore_patterns("__pycache__"))
    record = {"built": True, "torch": "2.11.0+cu130", "cuda": "compiling failed: stream.cpp:16: error: x", "cuda_failed": True}
    finished = run_doctor(tmp_path, record)
    assert finished.returncode == 1, finished.stdout
    assert "building the operators' CUDA kernels failed: compiling failed: stream.cpp:16: error: x" in finished.stdout
    assert "do: install pyard again with PYARD_CUDA=1" in finished.stdout
    left_out = {**record, "cuda": "PYARD_CUDA=0 was set when pyard was installed", "cuda_failed": False}
    assert run_doctor(tmp_path, left_out).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("compiling the operators failed", "install a C++17 compiler"),
        ("cmake was not found: pip install cmake", "install the missing package"),
        ("PYARD_NATIVE=0 was set when pyard was installed", "unset PYARD_NATIVE"),
    ],
)
def test_missing_operators_come_with_a_remedy(tmp_path: Path, reason: str, remedy: str) -> None:
    package = tmp_path / "pyard"
    shutil.copytree(native.PACKAGE, package, ignore=shutil.ignore_patterns("libpyard_ops.*", "__pycache__"))
    finished = run_doctor(tmp_path, {"built": False, "reason": reason})
    assert finished.returncode == 1, finished.stderr
    assert f"so plain PyTorch runs instead: {reason}\n  do: {remedy}" in finished.stdout
    assert finished.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("package", ["onnxruntime", "torch", "onnx", "diffusers", "yaml", "matplotlib"])
def test_the_doctor_survives_a_broken_import(package, tmp_path):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise OSError('libbroken.so: cannot open')", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(pyard.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "pyard", "doctor"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        encoding="utf-8", check=False, cwd=tmp_path,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "versions" in done.stdout
    assert done.returncode == 1
    assert "libbroken.so" in done.stdout


def test_a_package_that_is_missing_or_broken_is_one_line_of_any_command(tmp_path):
    path = os.pathsep.join([str(tmp_path), str(Path(pyard.__file__).parents[1])])
    (tmp_path / "onnx").mkdir()
    for error in ("ImportError('libbroken.so: cannot open', name='onnx')", "ModuleNotFoundError('no x', name='x')"):
        (tmp_path / "onnx" / "__init__.py").write_text(f"raise {error}", encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pyard", "export", "--student", "x"], env=environment,
            capture_output=True, text=True, encoding="utf-8", check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert done.stderr.endswith("; `pyard doctor` says what to install\n")
        assert done.stderr.count("\n") == 1


def test_the_doctor_runs_where_only_the_runtime_is(tmp_path):
    """Without torch, yaml or jsonargparse, as beside an ONNX file."""
    code = """
import importlib.metadata, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "yaml", "jsonargparse", "diffusers", "accelerate", "safetensors", "onnx", "tqdm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
version = importlib.metadata.version
def only(package):
    if package not in ("numpy", "onnxruntime", "onnxruntime-gpu"):
        raise importlib.metadata.PackageNotFoundError(package)
    return version(package)
importlib.metadata.version = only
from pyard.cli.command_line import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runtime only" in done.stdout


def test_versions_that_are_too_old_are_problems(monkeypatch):
    monkeypatch.setattr(checks, "minimum_versions", lambda: {"torch": "99.1", "numpy": "1.26"})
    report = examine()
    (problem,) = (p for p in report.problems if "needs 99.1" in p.what)
    assert problem.remedy == "pip install 'torch>=99.1'"
    assert not [p for p in report.problems if p.what.startswith("numpy")]
    assert checks._numbers("2.11.0+cpu") == checks._numbers("2.11") < checks._numbers("2.13.0")


def test_minimum_versions_are_those_of_the_metadata(monkeypatch):
    lines = ["torch>=2.11", "jsonargparse[signatures]>=4.49", "peft>=0.13; extra == 'lora'", "filelock"]
    monkeypatch.setattr(checks.importlib.metadata, "requires", lambda name: lines)
    assert checks.minimum_versions() == {"torch": "2.11", "jsonargparse": "4.49"}


@pytest.mark.slow
def test_another_project_with_a_package_called_pyard_is_a_problem(tmp_path):
    """py-ard and the `pyard` of PyPI write into the folder that pyard-distill writes into."""
    site = tmp_path / "py_ard-1.5.0.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: py-ard\nVersion: 1.5.0\n", encoding="utf-8")
    (site / "RECORD").write_text("pyard/__init__.py,,\npyard/ard.py,,\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(pyard.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "pyard", "doctor"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        encoding="utf-8", check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "problem: py-ard is another project" in done.stdout
    assert "do: pip uninstall -y py-ard; pip install --force-reinstall --no-deps pyard-" in done.stdout
