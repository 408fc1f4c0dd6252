"""Builds the native operators and the trajectory reader with CMake; everything else about the package is in pyproject.toml.

Environment: PYARD_NATIVE=auto|0|1 (auto: build if it can be built, otherwise install without; 1: a failed build is an
error), CXX, CXXFLAGS, MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

from torch_location import TORCH_REQUIREMENT, TorchLocation, find_torch  # noqa: E402

LIBRARY = "libpyard_ops"
READER = "_trajectory"
BUILD_RECORD = "_build.json"


class NativeBuildError(Exception):
    """Why the operators could not be built."""


class CMakeBuild(build_ext):
    """Drives CMakeLists.txt and records beside the library how it was built, or why it was not."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith(READER):
            return str(super().get_ext_filename(fullname))
        # No Python ABI suffix: the library knows torch's C ABI only and is not a Python module.
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        return str(Path(*fullname.split("."))) + suffix

    def build_extension(self, ext: Extension) -> None:
        target = (ROOT / self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        mode = os.environ.get("PYARD_NATIVE", "auto")
        if mode not in {"auto", "0", "1"}:
            raise NativeBuildError(f"PYARD_NATIVE must be auto, 0 or 1, not {mode!r}")
        record: dict[str, object] = {"built": False}
        try:
            if mode == "0":
                raise NativeBuildError("PYARD_NATIVE=0 was set when pyard was installed")
            torch = find_torch()
            if torch is None:
                raise NativeBuildError(f"{TORCH_REQUIREMENT} was not found when pyard was installed")
            shutil.copyfile(_run_cmake(torch, READER if ext.name.endswith(READER) else LIBRARY), target)
            record = {"built": True, "torch": torch.version}
        except NativeBuildError as error:
            if mode == "1":
                raise
            record["reason"] = str(error)
            what = "native trajectory reader" if ext.name.endswith(READER) else "native operators"
            warnings.warn(f"pyard installs without {what}: {error}", stacklevel=2)
        if not ext.name.endswith(READER):
            (target.parent / BUILD_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            file = Path(self.get_ext_filename(ext.name))
            built, package = Path(self.build_lib) / file, ROOT / file.parent
            (package / built.name).unlink(missing_ok=True)
            for path in (built, built.with_name(BUILD_RECORD)):
                if path.exists():
                    # A process may have the old library mapped: replace the file, never write into it.
                    shutil.copyfile(path, package / (path.name + ".new"))
                    (package / (path.name + ".new")).replace(package / path.name)

    def get_outputs(self) -> list[str]:
        outputs = [Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions]
        return [str(path) for path in outputs if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def _run_cmake(torch: TorchLocation, library: str) -> Path:
    """Configures and builds in build/native/, which stays for the next, incremental build; returns the library asked for."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    build = ROOT / "build" / "native"
    configure = [
        cmake,
        *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPYARD_TORCH_DIR={torch.folder}",
        f"-DPYARD_PYTHON_INCLUDE={sysconfig.get_path('include')}",
        f"-DPYARD_PYBIND11_INCLUDE={_pybind11_include() or ''}",
    ]
    target = "pyard_ops"
    if library == READER:
        target = "pyard_trajectory"
        if _pybind11_include() is None:
            raise NativeBuildError("pybind11 was not found: pip install pybind11")
    cache = build / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text(encoding="utf-8"):
        shutil.rmtree(build)
    _call(configure, "configuring")
    jobs = os.environ.get("MAX_JOBS")
    _call([cmake, "--build", str(build), "--target", target, *(["--parallel", jobs] if jobs else [])], "compiling")
    return build / (library + (".dylib" if sys.platform == "darwin" and library == LIBRARY else ".so"))


def _pybind11_include() -> str | None:
    try:
        import pybind11
    except ImportError:
        return None
    return str(pybind11.get_include())


def _tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise NativeBuildError(f"{name} was not found: pip install {name}")
    return found


def _call(command: list[str], what: str) -> None:
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(finished.stdout, flush=True)
    if finished.returncode != 0:
        tail = "\n".join(finished.stdout.strip().splitlines()[-15:])
        raise NativeBuildError(f"{what} the operators failed (a C++17 compiler is needed; set CXX):\n{tail}")


setup(
    ext_modules=[Extension(f"pyard.{name}", sources=[], optional=False) for name in (LIBRARY, READER)],
    cmdclass={"build_ext": CMakeBuild},
)
