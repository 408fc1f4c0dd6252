"""pip's default isolation must build against the torch of the environment, which it hides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

BACKEND = Path(__file__).resolve().parent.parent / "build_backend"

# What pip's build environments do: a folder on PYTHONPATH whose sitecustomize drops the environment's packages.
HIDE_PACKAGES = "import sys\nsys.path = [path for path in sys.path if 'site-packages' not in path]\n"

LOOK = """
import importlib.util, json
from torch_location import find_torch
found = find_torch()
print(json.dumps([importlib.util.find_spec("torch") is not None, found and [str(found.folder), found.version]]))
"""


def look(overlay: Path) -> tuple[bool, list[str] | None]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(overlay), str(BACKEND)])}
    command = [sys.executable, "-c", LOOK]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    visible, found = json.loads(finished.stdout)
    return visible, found


def test_the_torch_of_the_environment_is_found_behind_the_isolation(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE_PACKAGES)
    visible, found = look(tmp_path)
    assert not visible, "the test must hide torch, or it proves nothing"
    assert found == [str(Path(torch.__file__).parent), torch.__version__]


@pytest.mark.parametrize(("version", "taken"), [("2.10.1", False), ("2.11.0+cu130", True), ("3.0.0a0", True)])
def test_the_torch_of_the_build_comes_first_if_it_is_new_enough(tmp_path: Path, version: str, taken: bool) -> None:
    package = tmp_path / "torch"
    (package / "include").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
    _, found = look(tmp_path)
    assert found is not None
    assert (found == [str(package), version]) == taken


def fetch_headers(folder: Path, wheels: Path) -> subprocess.CompletedProcess[str]:
    pip = {"NO_INDEX": "1", "FIND_LINKS": str(wheels), "CONSTRAINT": "", "EXTRA_INDEX_URL": "", "CONFIG_FILE": os.devnull}
    environment = {**os.environ, **{f"PIP_{name}": value for name, value in pip.items()}}
    command = [sys.executable, str(BACKEND / "torch_headers.py"), "2.11.0", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_headers_are_taken_out_of_a_wheel_and_kept(tmp_path: Path) -> None:
    wheels, folder = tmp_path / "wheels", tmp_path / "build" / "torch-2.11.0"
    wheels.mkdir()
    missing = fetch_headers(folder, wheels)
    assert missing.returncode == 1
    assert missing.stderr.startswith("the headers of torch 2.11.0 cannot be downloaded from PyPI: ERROR: ")
    assert len(missing.stderr.splitlines()) == 1
    assert not folder.exists()

    wheel = wheels / "torch-2.11.0-cp311-cp311-macosx_11_0_arm64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("torch/include/torch/version.h", "2.11")
        archive.writestr("torch/lib/libtorch_cpu.dylib", "large")
        archive.writestr("torch-2.11.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
        archive.writestr("torch-2.11.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: cp311-cp311-macosx_11_0_arm64\n")
    found = fetch_headers(folder, wheels)
    assert found.stdout.strip() == str(folder / "torch/include"), found.stderr
    assert (folder / "torch/include/torch/version.h").read_text() == "2.11"
    assert not (folder / "torch/lib").exists()
    wheel.unlink()
    assert fetch_headers(folder, wheels).returncode == 0


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_without_native_parts_no_torch_is_downloaded_for_the_build(kind: str) -> None:
    code = f"import pyard_backend; print(pyard_backend.get_requires_for_build_{kind}())"
    environment = {**os.environ, "PYTHONPATH": str(BACKEND), "PYARD_NATIVE": "0", "PYARD_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=BACKEND.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
