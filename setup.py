"""Builds the native operators and the trajectory reader with CMake; everything else about the package is in pyproject.toml.

Environment: PYARD_NATIVE=auto|0|1 (auto: build if it can be built, otherwise install without, but in a git checkout sources
that do not compile are an error; 1: a failed build is an error), CXX, CXXFLAGS, MAX_JOBS; PYARD_CUDA=auto|0|1 (auto: compile
the CUDA kernels if nvcc is found and torch has CUDA; 1: without a CUDA torch, too, and a failure is an error),
TORCH_CUDA_ARCH_LIST, CUDACXX; PYARD_TORCH_INCLUDE, PYARD_TORCH_LIB: folders of torch's headers and of libtorch_cpu, where
they are not those of the installed torch.
"""

from __future__ import annotations

import json
import os
import re
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


class CompileError(NativeBuildError):
    """The compiler is there and refuses the sources."""


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
        mode, cuda_mode = _choice("PYARD_NATIVE"), _choice("PYARD_CUDA")
        record: dict[str, object] = {"built": False}
        try:
            if mode == "0":
                raise NativeBuildError("PYARD_NATIVE=0 was set when pyard was installed")
            torch = find_torch()
            if torch is None:
                raise NativeBuildError(f"{TORCH_REQUIREMENT} was not found when pyard was installed")
            name = READER if ext.name.endswith(READER) else LIBRARY
            library, cuda_note, cuda_failed = _build(torch, name, cuda_mode)
            shutil.copyfile(library, target)
            record = {"built": True, "torch": torch.version, "cuda": cuda_note, "cuda_failed": cuda_failed}
        except NativeBuildError as error:
            # In a checkout the sources are being worked on: without them, tests of the operators would pass by plain PyTorch.
            broken = isinstance(error, CompileError) and (ROOT / ".git").exists()
            if broken or mode == "1" or (cuda_mode == "1" and not ext.name.endswith(READER)):
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


def _choice(variable: str) -> str:
    choice = os.environ.get(variable, "auto")
    if choice not in {"auto", "0", "1"}:
        raise NativeBuildError(f"{variable} must be auto, 0 or 1, not {choice!r}")
    return choice


def _build(torch: TorchLocation, library: str, mode: str) -> tuple[Path, str, bool]:
    """Builds with CUDA where PYARD_CUDA asks for it.

    Returns:
        The library, `built` or why it has no CUDA kernels, and whether building them failed.
    """
    nvcc = _nvcc()
    if mode == "1" and nvcc is None:
        raise NativeBuildError("PYARD_CUDA=1, but nvcc was not found: put it on the PATH, or set CUDACXX or CUDA_HOME")
    if mode == "0":
        return _run_cmake(torch, library, None), "PYARD_CUDA=0 was set when pyard was installed", False
    if nvcc is None:
        return _run_cmake(torch, library, None), "nvcc was not found when pyard was installed", False
    if mode == "auto" and torch.cuda is None:
        return _run_cmake(torch, library, None), f"torch {torch.version} has no CUDA", False
    try:
        return _run_cmake(torch, library, nvcc), "built", False
    except NativeBuildError as error:
        if mode == "1":
            raise
        warnings.warn(f"pyard installs without CUDA kernels: {error}", stacklevel=2)
        return _run_cmake(torch, library, None), str(error), True


def _nvcc() -> str | None:
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named)
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [str(Path(home) / "bin") for home in homes]
    found = shutil.which("nvcc", path=os.pathsep.join(folders)) if folders else None
    return found or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _run_cmake(torch: TorchLocation, library: str, nvcc: str | None) -> Path:
    """Configures and builds in build/native/, which stays for the next, incremental build; returns the library asked for."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    build = ROOT / "build" / "native"
    configure = [
        cmake,
        *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPYARD_TORCH_DIR={torch.folder}",
        *(f"-D{name}={os.environ.get(name, '')}" for name in ("PYARD_TORCH_INCLUDE", "PYARD_TORCH_LIB")),
        f"-DPYARD_PYTHON_INCLUDE={sysconfig.get_path('include')}",
        f"-DPYARD_PYBIND11_INCLUDE={_pybind11_include() or ''}",
        f"-DPYARD_CUDA={'OFF' if nvcc is None else 'ON'}",
        *([] if nvcc is None else [f"-DCMAKE_CUDA_COMPILER={nvcc}"]),
        f"-DCMAKE_CXX_FLAGS={os.environ.get('CXXFLAGS', '')}",
    ]
    target = "pyard_ops"
    if library == READER:
        target = "pyard_trajectory"
        if _pybind11_include() is None:
            raise NativeBuildError("pybind11 was not found: pip install pybind11")
    # CMake takes to neither another source folder nor another compiler in a build folder that it has configured.
    wanted = f"source {ROOT}\ncompiler {os.environ.get('CXX', '')}\n"
    configured = build / "configured-for.txt"
    if build.exists() and (not configured.exists() or configured.read_text(encoding="utf-8") != wanted):
        shutil.rmtree(build)
    build.mkdir(parents=True, exist_ok=True)
    configured.write_text(wanted, encoding="utf-8")
    _call(configure, "configuring")
    jobs = os.environ.get("MAX_JOBS")
    output = _call([cmake, "--build", str(build), "--target", target, *(["--parallel", jobs] if jobs else [])], "compiling")
    if "ptxas info" in output:
        # For csrc/cuda/check_spills.py; a build that compiled no kernel says nothing about them.
        (build / "ptxas.log").write_text(output, encoding="utf-8")
    return build / (library + (".dylib" if sys.platform == "darwin" and library == LIBRARY else ".so"))


def _pybind11_include() -> str | None:
    """pybind11's headers, copied to where they stay: pip's isolated builds put them into another folder every time, and headers
    that have moved make all that includes them compile again."""
    try:
        import pybind11
    except ImportError:
        return None
    kept = ROOT / "build" / f"pybind11-{pybind11.__version__}"
    if not kept.exists():
        partial = kept.with_name(f"{kept.name}.{os.getpid()}")
        shutil.copytree(pybind11.get_include(), partial)
        try:
            partial.rename(kept)
        except OSError:  # another build was faster
            shutil.rmtree(partial)
    return str(kept)


def _tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise NativeBuildError(f"{name} was not found: pip install {name}")
    return found


def _call(command: list[str], what: str) -> str:
    finished = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, encoding="utf-8"
    )
    print(finished.stdout, flush=True)
    if finished.returncode != 0:
        kind = CompileError if what == "compiling" else NativeBuildError
        raise kind(f"{what} the operators failed (a C++17 compiler is needed; set CXX): {_cause(finished.stdout)}")
    return finished.stdout


def _cause(output: str) -> str:
    """The first error that a compiler or CMake reported, in one line, and the end of the output in more."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [index for index, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)]
    first = lines[errors[0]] if errors else "no error was printed"
    if first.startswith("CMake Error") and errors[0] + 1 < len(lines):
        first += f" {lines[errors[0] + 1]}"
    return "\n".join([first, *lines[-15:]])


setup(
    ext_modules=[Extension(f"pyard.{name}", sources=[], optional=False) for name in (LIBRARY, READER)],
    cmdclass={"build_ext": CMakeBuild},
)
