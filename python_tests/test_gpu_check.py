"""benchmarks/gpu_check.sh runs on machines that have torch, numpy and pytest and nothing else of pyard's requirements: its
steps, and the tests that it runs, must import nothing else. Here Python is kept from finding the rest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRESENT = {"torch", "numpy", "pytest", "filelock"}  # filelock: torch requires it
OTHER_NAMES = {"onnxruntime-gpu": "onnxruntime", "scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}

# sitecustomize.py runs before anything else of a Python process.
HOOK = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
class Find:
    def __call__(self, name, *rest, **named):
        return None if name.split(".")[0] in {refused!r} else find(name, *rest, **named)
PathFinder.find_spec = Find()
"""


def requirements() -> set[str]:
    """Import names of all that pyard requires, core and extras, beyond what is PRESENT."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[<>=\[; ]", requirement)[0] for listed in lists for requirement in listed}
    return {OTHER_NAMES.get(name, name) for name in names} - PRESENT - {"pyard"}


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python process on a bare machine."""
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(refused=requirements()), encoding="utf-8")
    search = os.pathsep.join([str(tmp_path), str(ROOT)])
    return {**os.environ, "PYTHONPATH": search, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def python(bare: dict[str, str], *arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=bare, capture_output=True, text=True, check=False, timeout=900
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-4000:]
    return finished.stdout


def test_the_hook_refuses(bare: dict[str, str]) -> None:
    assert {"diffusers", "accelerate", "safetensors", "onnx", "sklearn", "tqdm"} <= requirements()
    with pytest.raises(AssertionError, match="No module named 'tqdm'"):
        python(bare, "-c", "import tqdm")


def test_the_tests_for_a_gpu_can_be_collected(bare: dict[str, str]) -> None:
    files = [f"python_tests/ops/test_{name}.py" for name in ("cuda_kernels", "cuda", "attention_backends")]
    listed = python(bare, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", "cuda and not slow", *files)
    assert "test_values_and_gradients_are_those_of_the_twin" in listed
    assert "test_a_native_student_is_the_plain_one" in listed


def test_the_benchmarks_run_and_their_table_names_what_failed(bare: dict[str, str], tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    for step in ("operators", "models"):
        out = str(parts / "bench")
        printed = python(bare, "-m", f"benchmarks.gpu_{step}", "--device", "cpu", "--smoke", "--out", out)
        failed = [line for line in printed.splitlines() if '"error"' in line]
        # What no CPU has: cuDNN, and FlexAttention's backward.
        assert all("per-step SDPA" in line or "FlexAttention" in line for line in failed), failed
    (parts / "steps.tsv").write_text("build\t110\tno end within 110 s\noperators\t3\tok\n", encoding="utf-8")
    (parts / "build.log").write_text("the last words of the build\n", encoding="utf-8")
    text = python(bare, "-m", "benchmarks.gpu_table", str(parts), str(tmp_path / "results"))
    assert "| build | 110 | no end within 110 s |" in text
    assert "the last words of the build" in text
    (results,) = (json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "results").glob("*.json"))
    tables = {table["step"]: {row["name"]: row for row in table["rows"]} for table in results["tables"]}
    assert set(tables) == {"ceilings", "rows", "attention", "sampling", "training"}
    row, copy = tables["rows"]["modulated_layer_norm native"], tables["ceilings"]["copy"]
    assert row["forward_floor_ms"] == pytest.approx(row["forward_gb"] / copy["tb_per_s"])
    assert row["forward_of_floor"] == pytest.approx(row["forward_floor_ms"] / row["forward_ms"])
    assert tables["training"]["plain"]["tflop_per_s"] > 0
    assert results["machine"]["torch"]


def test_the_time_limits_end_within_nine_minutes() -> None:
    script = (ROOT / "benchmarks" / "gpu_check.sh").read_text(encoding="utf-8")
    limits = [int(limit) for limit in re.findall(r"^ *(?:if .*; then )?step \w+ (\d+) ", script, re.MULTILINE)]
    assert len(limits) == 8
    assert sum(limits) <= 525
    assert "END=$((SECONDS + 525))" in script
