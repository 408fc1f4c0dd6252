"""Fixtures of all tests: fixed seeds, one thread, and skips that cannot hide a machine meant to have a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Tests are tiny: a second thread costs more in waking up than it saves, a hundredfold on a busy machine. The variable is for
# the commands that tests start, and must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device; PYARD_REQUIRE_CUDA=1 makes its absence a failure")


def pytest_sessionstart(session: pytest.Session) -> None:
    if os.environ.get("PYARD_NATIVE") == "1":
        from pyard.ops.backend import library, missing_reason

        if library is None:  # else all tests of the operators would be skipped, and nothing would be said
            pytest.exit(f"PYARD_NATIVE=1, but {missing_reason}", returncode=1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available():
        return
    if os.environ.get("PYARD_REQUIRE_CUDA") == "1":
        pytest.fail("PYARD_REQUIRE_CUDA=1, but torch finds no CUDA device")
    pytest.skip("torch finds no CUDA device")


@pytest.fixture(autouse=True)
def _fixed_seed_and_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
