"""The CUDA kernels on the emulated machine under ThreadSanitizer and AddressSanitizer: what compute-sanitizer's racecheck
and memcheck look for on a GPU. Every CUDA thread is a thread to ThreadSanitizer, and only barriers order them, so that a
missing one is reported whatever order they ran in."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ops.cuda_emulator.kernels import HERE, SOURCES, compiler

ROOT = HERE.parents[2]
EMULATOR = HERE / "emulator.cpp"


def build(sanitizer: str, units: list[Path], folder: Path) -> Path:
    """Compiles `units` and the emulator for one sanitizer; the emulator itself goes without ThreadSanitizer."""
    if compiler() is None:
        pytest.skip("no C++ compiler to compile the kernels with")

    def compiled(unit: Path) -> Path:
        mode = f"-fsanitize={sanitizer}"
        if sanitizer == "thread" and unit == EMULATOR:
            mode = "-DEMULATED_UNDER_THREAD_SANITIZER"
        to = folder / f"{unit.stem}.o"
        flags = ["-std=c++17", "-O1", "-g1", mode, "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{SOURCES}"]
        command = [str(compiler()), *flags, "-x", "c++", "-c", str(unit), "-o", str(to)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr[-4000:]
        return to

    program = folder / "program"
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*units, EMULATOR]))
    link = [str(compiler()), f"-fsanitize={sanitizer}", *map(str, objects), "-o", str(program)]
    linked = subprocess.run(link, capture_output=True, text=True, check=False)
    if linked.returncode != 0 and "san" in linked.stderr:
        pytest.skip(f"this compiler has no -fsanitize={sanitizer}")
    assert linked.returncode == 0, linked.stderr[-4000:]
    return program


def run(program: Path, argument: str) -> tuple[int, str]:
    """The exit status and all output. Memory is freed by the end of the program: leaks are not looked for."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    # Without address randomisation, which ThreadSanitizer does not survive on every kernel.
    command = ["setarch", "-R", str(program), argument]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=1200)
    return finished.returncode, finished.stdout + finished.stderr


@pytest.fixture(scope="module", params=["thread", "address"])
def sanitizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def faulty(sanitizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(sanitizer, [HERE / "faulty.cu"], tmp_path_factory.mktemp(sanitizer))


def test_a_kernel_without_a_fault_passes(faulty: Path) -> None:
    status, output = run(faulty, "none")
    assert status == 0, output
    assert output.startswith("ran\n")


FAULTS = [
    ("thread", "no_block_barrier", "data race"),
    ("thread", "no_warp_barrier", "data race"),
    ("thread", "no_wait", "data race"),
    ("address", "beyond_global", "heap-buffer-overflow"),
    ("address", "beyond_shared", "heap-buffer-overflow"),
]


@pytest.mark.parametrize(("sanitizer", "fault", "report"), FAULTS, indirect=["sanitizer"], scope="module")
def test_a_fault_is_reported(faulty: Path, fault: str, report: str) -> None:
    status, output = run(faulty, fault)
    assert status != 0
    assert report in output


@pytest.mark.slow
def test_the_kernels_have_no_fault(sanitizer: str, tmp_path: Path) -> None:
    units = [*sorted(SOURCES.glob("*.cu")), ROOT / "benchmarks" / "gpu_sanitize.cu"]
    status, output = run(build(sanitizer, units, tmp_path), "few")
    assert status == 0, output[-4000:]
    assert "every kernel ran" in output
