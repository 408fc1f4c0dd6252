"""pip's default isolation must build against the torch of the environment, which it hides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
