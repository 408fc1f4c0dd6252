"""PEP 517/660 build backend: setuptools, plus build requirements that depend on what the machine already has.

Asking for torch in `build-system.requires` would make pip download a second torch for every build, and one that need
not be the one the package runs with. So torch is asked for only where the environment has none that is new enough,
cmake and ninja only where they are not on the path; pybind11, which is headers, always.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from torch_location import TORCH_REQUIREMENT, find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# The same number stands in CMakeLists.txt.
MINIMUM_CMAKE = (3, 20)

ConfigSettings = dict[str, str | list[str]] | None


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    """Requirements of `pip install .`."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_native_requirements()]


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    """Requirements of `pip install -e .`."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_native_requirements()]


def _native_requirements() -> list[str]:
    if os.environ.get("PYARD_NATIVE") == "0":
        return []
    requirements = ["pybind11>=2.13"]
    if not _cmake_is_new_enough():
        requirements.append("cmake>=" + ".".join(map(str, MINIMUM_CMAKE)))
    if shutil.which("ninja") is None:
        requirements.append("ninja")
    if find_torch() is None:
        requirements.append(TORCH_REQUIREMENT)
    return requirements


def _cmake_is_new_enough() -> bool:
    cmake = shutil.which("cmake")
    if cmake is None:
        return False
    answer = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=False, encoding="utf-8").stdout
    version = re.search(r"version (\d+)\.(\d+)", answer)
    return version is not None and (int(version[1]), int(version[2])) >= MINIMUM_CMAKE
