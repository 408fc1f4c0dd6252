"""PYARD_PREBUILT: a library that was built elsewhere is checked before it is used, and what does not fit is one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyard.errors import InputError
from pyard.ops import native, prebuilt
from pyard.ops.backend import library

CSRC = native.PACKAGE.parent / "csrc"

pytestmark = pytest.mark.skipif(library is None, reason="the native operators are not built")


def load(path: Path, package_in: Path = native.PACKAGE.parent) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYARD_PREBUILT": str(path), "PYTHONPATH": str(package_in)}
    code = "from pyard.ops.backend import library; print(library.path, '|', library.cuda_note)"
    return subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A library in another folder than the package."""
    assert library is not None
    return Path(shutil.copy(library.path, tmp_path / "elsewhere.so"))


def refused(finished: subprocess.CompletedProcess[str]) -> str:
    """The last line of a failed process, without the name of the exception."""
    assert finished.returncode != 0
    name, _, message = finished.stderr.strip().splitlines()[-1].partition(": ")
    assert name == "pyard.errors.InputError", finished.stderr
    return message


def test_it_takes_the_place_of_the_own_one(elsewhere: Path) -> None:
    finished = load(elsewhere)
    assert finished.stdout.strip() == f"{elsewhere} | built elsewhere (PYARD_PREBUILT)", finished.stderr


@pytest.mark.slow
def test_a_file_that_is_missing_or_no_library_is_refused(tmp_path: Path) -> None:
    assert refused(load(tmp_path / "none.so")).startswith(f"PYARD_PREBUILT={tmp_path / 'none.so'}: there is no such file")
    text = tmp_path / "text.so"
    text.write_text("not a library")
    assert f"{text} does not load with torch {torch.__version__}: " in refused(load(text))


def test_a_library_of_something_else_is_refused() -> None:
    other = Path(torch.__file__).parent / "lib" / ("libc10.dylib" if sys.platform == "darwin" else "libc10.so")
    assert "is not a library of this version of pyard" in refused(load(other))


@pytest.mark.skipif(not CSRC.is_dir(), reason="there is no source tree to compare with")
def test_a_library_of_other_sources_is_refused(elsewhere: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(native.PACKAGE, tree / "pyard", ignore=shutil.ignore_patterns("libpyard_ops.*", "__pycache__"))
    shutil.copytree(CSRC, tree / "csrc")
    assert load(elsewhere, tree).returncode == 0
    with (tree / "csrc" / "cuda" / "rows.cuh").open("a") as header:
        header.write("// changed\n")
    assert f"was built from other sources than those in {tree / 'csrc'}" in refused(load(elsewhere, tree))


def test_a_library_without_cuda_kernels_is_refused_where_torch_has_cuda() -> None:
    path = Path("lib.so")
    prebuilt.check_kernels(path, (), None)
    prebuilt.check_kernels(path, ("9.0",), "13.0")
    with pytest.raises(InputError, match=r"has no CUDA kernels, and this torch was built for CUDA 13\.0"):
        prebuilt.check_kernels(path, (), "13.0")


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("9.0", (9, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("10.0a", (10, 3), False),
        ("8.0 9.0+PTX", (12, 0), True),
        ("", (9, 0), False),
    ],
)
def test_which_gpus_kernels_run_on(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    assert prebuilt.runs_on(tuple(architectures.split()), capability) is runs
