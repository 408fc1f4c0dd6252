"""What is run beside the measurements: sanitizers, tests, a fresh build, a profiler.

Each is a time limit and a command, or None where the machine lacks the tool.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

Program = tuple[float, list[str]]
NOT_HERE = "left out: not on this machine"

ROOT = Path(__file__).resolve().parents[2]
FRESH = ROOT / "build" / "gpu-fresh"
TESTS = (
    "python_tests/ops/test_cuda_kernels.py",
    "python_tests/ops/test_cuda.py",
    "python_tests/ops/test_attention_backends.py",
)


def sanitizer(tool: str, smoke: bool, carried: Path) -> Program | None:
    """compute-sanitizer over every kernel at small, ragged sizes."""
    program = carried / "pyard_gpu_sanitize"
    if smoke or shutil.which("compute-sanitizer") is None or not program.exists():
        return None
    return 75, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", str(program)]


def tests(smoke: bool, carried: Path) -> Program | None:
    """The tests that need a GPU; in a smoke run they are collected only."""
    options = ["-q", "-m", "cuda and not slow", "-p", "no:cacheprovider", *(["--collect-only"] if smoke else [])]
    return 90, [sys.executable, "-m", "pytest", *options, *TESTS]


CHECKS: dict[str, Callable[[bool, Path], Program | None]] = {
    "memcheck": partial(sanitizer, "memcheck"),
    "racecheck": partial(sanitizer, "racecheck"),
    "initcheck": partial(sanitizer, "initcheck"),
    "tests": tests,
}
# Of call A: beside one another and before all timings, which want the GPU for themselves.
FIRST = tuple(CHECKS)


def build_command(smoke: bool) -> list[str]:
    """Operators, CUDA kernels included, and the trajectory reader, built on this machine; in a smoke run the reader alone."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    settings = {
        "PYARD_TORCH_DIR": str(Path(torch.origin).parent),
        "PYARD_CUDA": "OFF" if smoke else "ON",
        "PYARD_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "PYARD_PYBIND11_INCLUDE": _pybind11_include(),
    }
    targets = ["pyard_trajectory", *([] if smoke else ["pyard_ops"])]
    configure = ["cmake", "-S", str(ROOT), "-B", str(FRESH), "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items())]
    build = ["cmake", "--build", str(FRESH), "--target", *targets]
    # nvcc takes several threads for one file, too, since minutes count. It yields to the timings that go on meanwhile.
    environment = ["TORCH_CUDA_ARCH_LIST=9.0", "NVCC_APPEND_FLAGS=--split-compile=0"]
    script = f"{shlex.join(configure)} && exec {shlex.join(build)}"
    return ["nice", "-n", "10", "env", *environment, f"PATH={_path_with_scripts()}", "sh", "-c", script]


def fresh_library() -> Path:
    """What the build makes."""
    return FRESH / "libpyard_ops.so"


def profilers(smoke: bool) -> dict[str, Program]:
    """ncu where it is there, then PyTorch's profiler, for machines where ncu is missing or may read no counters.

    They are tried in this order until one ends well.
    """
    profiled = [sys.executable, "-m", "benchmarks.gpu.profiled", "--device", "cpu" if smoke else "cuda"]
    profiled += ["--smoke"] if smoke else []
    found: dict[str, Program] = {}
    if not smoke and shutil.which("ncu") is not None:
        sections = [part for name in ("SpeedOfLight", "Occupancy", "LaunchStats") for part in ("--section", name)]
        ours = ["--kernel-name-base", "demangled", "--kernel-name", "regex:pyard", "--launch-count", "24"]
        found["ncu"] = 40, ["ncu", "--clock-control", "none", *sections, *ours, *profiled]
    found["profiler"] = 30, [*profiled, "--profile"]
    return found


def place_reader(carried: Path) -> None:
    """Puts the trajectory reader where Python finds it: the one that was carried here, else the one that call A built."""
    package = ROOT / "pyard"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for built in (carried / f"_trajectory{suffix}", FRESH / "_trajectory.so"):
        if not (package / f"_trajectory{suffix}").exists() and built.exists():
            shutil.copyfile(built, package / f"_trajectory{suffix}")


def _pybind11_include() -> str:
    found = importlib.util.find_spec("pybind11")
    if found is not None and found.origin is not None:
        return str(Path(found.origin).parent / "include")
    kept = sorted((ROOT / "build").glob("pybind11-*"))  # setup.py's
    return str(kept[-1]) if kept else ""


def _path_with_scripts() -> str:
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
