"""How a refused launch is reported, with CUDA's own runtime: without a driver, that one repeats its own error for ever."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from ops.cuda_emulator.kernels import SOURCES

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")

PROGRAM = """
#include <cstdio>
#include <machine.cuh>

__global__ void kernel(const int) {}

int main() {
  // No device has so much shared memory.
  const char* error = pyard::cuda::launch(kernel, dim3(1), 32, 1 << 24, nullptr, 0);
  std::printf("%s, then %s\\n", error == nullptr ? "launched" : "refused", cudaGetErrorString(cudaGetLastError()));
}
"""


@pytest.mark.cuda
@pytest.mark.skipif(NVCC is None, reason="no nvcc to compile the launcher with")
def test_a_refused_launch_leaves_no_error_for_the_next(tmp_path: Path) -> None:
    source, program = tmp_path / "refused.cu", tmp_path / "refused"
    source.write_text(PROGRAM)
    folders = [f"-I{SOURCES}", f"-I{SOURCES / 'ptx'}"]
    subprocess.run([str(NVCC), "-std=c++17", "-arch=sm_80", *folders, str(source), "-o", str(program)], check=True)
    finished = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    assert finished.stdout == "refused, then no error\n"
