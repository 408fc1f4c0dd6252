"""benchmarks/gpu runs on machines that lack some of what pyard requires: its sections, and the tests that it runs, must import
nothing of that. Here Python is kept from finding it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import merge
from benchmarks.gpu.checks import TESTS
from benchmarks.gpu.measure import Setting
from benchmarks.gpu.sections import CALL_LIMITS, CALLS, SECTIONS, Section
from benchmarks.gpu.steps import Call
from benchmarks.gpu.students import NaiveStudent, new_student
from benchmarks.gpu.table import as_markdown, with_floors

ROOT = Path(__file__).resolve().parent.parent
# What benchmarks/GPU.md says is there.
PRESENT = {"torch", "numpy", "pytest", "filelock", "tqdm", "safetensors", "accelerate", "peft", "transformers", "onnxruntime"}
OTHER_NAMES = {"onnxruntime-gpu": "onnxruntime", "scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}

# sitecustomize.py runs before anything else of a Python process. It also adds the sections of this test to the others.
HOOK = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
class Find:
    def __call__(self, name, *rest, **named):
        return None if name.split(".")[0] in {refused!r} else find(name, *rest, **named)
PathFinder.find_spec = Find()
from benchmarks.gpu.measure import Setting
from benchmarks.gpu.sections import SECTIONS, Section
SECTIONS.update({sections!r})
"""
LIMITS = {"hangs": 1.0, "poisons": 60.0, "raises": 60.0, "is_late": 1.0}
SECTIONS_OF_THIS_TEST = {name: Section("broken_sections", name, limit_s) for name, limit_s in LIMITS.items()}
BROKEN_SECTIONS = """
import time
def hangs(results, setting):
    results.measure("first", lambda: {"ms": 1.0})
    time.sleep(100)
def poisons(results, setting):
    results.measure("first", lambda: {"ms": 1.0})
    if len(results.rows) == 1:
        results._add({"name": "second", "error": "an illegal address"})
        raise SystemExit(70)
    results.measure("third", lambda: {"ms": 3.0})
def raises(results, setting):
    results.measure("first", lambda: 1 / 0)
    raise ValueError("no such section")
def is_late(results, setting):
    time.sleep(1.1)
    results.measure("late", lambda: {"ms": 1.0})
"""


def requirements() -> set[str]:
    """Import names of all that pyard requires, core and extras, beyond what is PRESENT."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[<>=\[; ]", requirement)[0] for listed in lists for requirement in listed}
    return {OTHER_NAMES.get(name, name) for name in names} - PRESENT - {"pyard"}


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a Python process on a bare machine."""
    hook = HOOK.format(refused=requirements(), sections=SECTIONS_OF_THIS_TEST)
    (tmp_path / "sitecustomize.py").write_text(hook, encoding="utf-8")
    (tmp_path / "broken_sections.py").write_text(BROKEN_SECTIONS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return dict(os.environ)


def python(bare: dict[str, str], *arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=bare, capture_output=True, text=True, check=False, timeout=600
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-4000:]
    return finished.stdout


def test_the_hook_refuses(bare: dict[str, str]) -> None:
    assert {"diffusers", "jsonargparse", "onnx", "sklearn", "yaml", "matplotlib"} <= requirements()
    with pytest.raises(AssertionError, match="No module named 'jsonargparse'"):
        python(bare, "-c", "import jsonargparse")


@pytest.mark.slow
def test_the_tests_for_a_gpu_can_be_collected(bare: dict[str, str]) -> None:
    listed = python(bare, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", "cuda and not slow", *TESTS)
    assert "test_values_and_gradients_are_those_of_the_twin" in listed
    assert "test_a_native_student_is_the_plain_one" in listed


def results_of(folder: Path, name: str) -> tuple[dict[str, str], dict[str, dict[str, dict[str, object]]]]:
    """Results of the steps; rows by section and name."""
    results = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    tables = {table["section"]: {row["name"]: row for row in table["rows"]} for table in results["tables"]}
    return {step["step"]: step["result"] for step in results["steps"]}, tables


@pytest.mark.slow
def test_all_sections_run_on_a_bare_machine(bare: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "results"
    wanted = [*CALLS["A"], *CALLS["B"][1:], "memcheck"]
    printed = python(bare, "-m", "benchmarks.gpu", "C", *wanted, "--out", str(out), "--cpu-smoke")
    assert sorted(path.name for path in out.iterdir()) == ["c-log.txt", "c.json", "c.md"]
    steps, tables = results_of(out, "c")
    assert steps.pop("memcheck") == "left out: not on this machine"
    assert set(steps) == {"library", *SECTIONS}
    assert set(steps.values()) == {"ok"}
    assert set(tables) == set(SECTIONS)
    assert "| batch 2, naive |" in (out / "c.md").read_text(encoding="utf-8")
    assert "biased, native: forward_ms" in printed
    copy = tables["ceilings"]["copy"]
    row = tables["rows"]["modulated_layer_norm bf16 native"]
    assert row["forward_floor_ms"] == pytest.approx(row["forward_gb"] / copy["tb_per_s"])  # type: ignore[operator]
    assert row["forward_of_floor"] == pytest.approx(row["forward_floor_ms"] / row["forward_ms"])  # type: ignore[operator]
    assert "block_attention x 1" in str(tables["attention"]["biased, native"]["kernels"])
    assert tables["training"]["batch 2, naive"]["tflop_per_s"]


def test_the_naive_student_is_the_student() -> None:
    student = new_student(Setting("cpu", True), torch.float32)
    assert student.history_bias is not None
    student.history_bias.data.zero_()  # the usual way has none
    naive = NaiveStudent(student)
    history = torch.randn(2, student.num_steps, *student.sample_shape)
    labels = torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(naive(history, labels), student(history, labels), rtol=1e-4, atol=1e-4)
        *_, sample = student.rollout(history[:, 0], labels)
        torch.testing.assert_close(naive.rollout(history[:, 0], labels), sample, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_what_breaks_costs_itself_alone(bare: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.steps.SECTIONS", {**SECTIONS, **SECTIONS_OF_THIS_TEST})
    monkeypatch.setattr("benchmarks.gpu.steps.GRACE_S", 4.0)
    monkeypatch.chdir(ROOT)
    published: list[int] = []
    call = Call(tmp_path, time.monotonic() + 100, lambda call: published.append(len(call.steps)))
    call.run_sections(["hangs", "poisons", "raises", "is_late"], "cpu", True)
    steps = [(step["step"], step["result"]) for step in call.steps]
    assert steps == [
        ("hangs", "no end within 1 s"),
        ("poisons", "a row broke the device; the rest goes on"),
        ("poisons", "1 rows failed"),
        ("raises", "failed: ValueError: no such section"),
        ("is_late", "1 rows left out: no time"),
    ]
    rows = {name: json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["rows"] for name in SECTIONS_OF_THIS_TEST}
    assert [row["name"] for row in rows["hangs"]] == ["first"]
    assert [row["name"] for row in rows["poisons"]] == ["first", "second", "third"]
    assert rows["raises"][0]["error"] == "ZeroDivisionError: division by zero"
    assert max(published) == len(steps)


def test_programs_run_beside_one_another_and_end_in_time(tmp_path: Path) -> None:
    call = Call(tmp_path, time.monotonic() + 2.0, lambda call: None)
    start_s = time.monotonic()
    call.start("behind", 60, ["sh", "-c", "echo before; sleep 60"])
    hang = f"{sys.executable} -c 'import time; time.sleep(60)' & wait"  # what a shell started must end with it
    ended = call.run_together({"good": (60, ["true"]), "bad": (60, ["false"]), "long": (0.5, ["sh", "-c", hang])})
    assert ended == {"good": True, "bad": False, "long": False}
    assert not call.finish("behind")
    assert time.monotonic() - start_s < 5
    results = {step["step"]: step["result"] for step in call.steps}
    assert results == {"good": "ok", "bad": "failed (1)", "long": "no end within 0 s", "behind": "no end within 60 s"}
    assert call.steps[-1]["log"] == ["before"]


@pytest.mark.slow
def test_a_library_that_is_not_fit_stops_the_call(bare: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "A", "--out", str(tmp_path / "out"), "--cpu-smoke"]
    environment = {**bare, "PYARD_PREBUILT": str(tmp_path / "none.so")}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert f"not usable: PYARD_PREBUILT={tmp_path / 'none.so'}: there is no such file" in finished.stdout
    steps, tables = results_of(tmp_path / "out", "a")
    assert steps == {"library": "failed (1)"}
    assert tables == {}


def test_unknown_names_are_named(bare: dict[str, str]) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "C", "training", "traning", "--out", "x"]
    finished = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "not traning" in finished.stderr


def test_both_calls_leave_time_for_a_second_start() -> None:
    # Of fifteen minutes: two starts of up to two minutes, A, B, and C; before C four minutes must be left.
    assert CALL_LIMITS == {"A": 230.0, "B": 250.0, "C": 120.0}
    assert set(CALLS["A"]) | set(CALLS["B"]) == set(SECTIONS)


def test_results_of_several_calls_are_merged(tmp_path: Path) -> None:
    def result(device: str, section: str, ms: float) -> Path:
        table = {"section": section, "rows": [{"name": "row", "ms": ms, "gb": 2.0}]}
        path = tmp_path / f"{device}-{section}-{ms}.json"
        step = {"step": section, "seconds": 1.0, "result": "ok"}
        path.write_text(json.dumps({"machine": {"device": device}, "steps": [step], "tables": [table]}), encoding="utf-8")
        return path

    paths = [result("NVIDIA H200", "rows", 1.0), result("NVIDIA H200", "training", 2.0), result("NVIDIA H200", "rows", 3.0)]
    assert merge(paths, tmp_path / "out") == 0
    _, tables = results_of(tmp_path / "out", "gpu-nvidia-h200")
    assert tables == {
        "rows": {"row": {"name": "row", "ms": 3.0, "gb": 2.0}},
        "training": {"row": {"name": "row", "ms": 2.0, "gb": 2.0}},
    }
    assert merge([paths[0], result("NVIDIA H100", "rows", 1.0)], tmp_path / "out") == 2


def test_floors_are_the_larger_of_bytes_and_work() -> None:
    ceilings = {
        "section": "ceilings",
        "rows": [{"name": "copy", "tb_per_s": 4.0}, {"name": "matmul bf16", "tflop_per_s": 500.0}],
    }
    rows = [{"name": "work", "ms": 10.0, "gflop": 1000.0, "gb": 4.0}, {"name": "bytes", "ms": 10.0, "gb": 20.0}]
    tables = with_floors([ceilings, {"section": "rows", "rows": rows}], "NVIDIA H100 80GB HBM3")
    work, moved = tables[1]["rows"]
    assert (work["floor_ms"], work["of_floor"], work["tflop_per_s"]) == (2.0, 0.2, 100.0)
    assert work["mfu"] == pytest.approx(100 / 989)
    assert (moved["floor_ms"], moved["of_floor"]) == (5.0, 0.5)
    text = as_markdown(
        {"machine": {"device": "a | b"}, "steps": [{"step": "x", "seconds": 1, "result": "ok"}], "tables": tables}
    )
    assert "| work | 10 | 2 | 0.2 |" in text
