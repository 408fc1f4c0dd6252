"""The CUDA kernels for the tests here: on the emulated machine, compiled once, and on a GPU where there is one."""

from __future__ import annotations

import pytest
from ops.cuda_emulator.kernels import Kernels, compile_kernels, compiler
from ops.device_kernels import DeviceKernels


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if compiler() is None:
        pytest.skip("no C++ compiler to compile the kernels with")
    return Kernels(compile_kernels(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(scope="session", params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def kernels(request: pytest.FixtureRequest) -> Kernels | DeviceKernels:
    return DeviceKernels() if request.param == "cuda" else request.getfixturevalue("emulated")
