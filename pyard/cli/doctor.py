"""What is installed, what is built, what runs where, and what to do about each problem."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import platform
import re
import warnings
from dataclasses import asdict, dataclass, field
from json import dumps
from typing import TYPE_CHECKING, Any

from pyard.version import __version__

if TYPE_CHECKING:
    from pyard.ops.native import NativeLibrary

PACKAGES = (
    "torch", "numpy", "safetensors", "diffusers", "transformers", "accelerate", "huggingface_hub", "onnx", "onnxscript",
    "scikit-learn", "jsonargparse", "matplotlib", "pillow", "pyyaml", "tqdm", "filelock",
)  # fmt: skip
# What packages are imported as, where that is another name.
_MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}
DISTRIBUTION = "pyard-distill"
RUNTIME_DISTRIBUTION = "pyard-runtime"
# Other projects on PyPI whose wheels have a package called pyard.
SAME_PACKAGE = ("pyard", "py-ard")
ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with the installation, and its remedy."""

    what: str
    remedy: str


@dataclass
class Report:
    """All that the doctor found; `--json` prints it field by field."""

    versions: dict[str, str | None] = field(default_factory=dict)
    native: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    trajectory_reader: str = "python"  # native | python
    operators: dict[str, dict[str, str]] = field(default_factory=dict)  # operator -> device -> native | reference
    for_gpus_only: list[str] = field(default_factory=list)  # operators that have no compiled kernel for the CPU
    self_test: dict[str, float] = field(default_factory=dict)  # operator -> largest difference from plain PyTorch
    onnxruntime_providers: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    runtime_only: bool = False  # no package for training is installed
    distributions: list[str] = field(default_factory=list)  # of pyard, that are installed


def doctor(json: bool = False) -> int:
    """Check this installation: versions, the native operators and whether they compute the right thing, ONNX Runtime.

    Prints what is built and for which instruction sets, which implementation every operator takes on every device of
    this machine (native: compiled; reference: plain PyTorch), the result of a short self-test of the compiled operators
    against plain PyTorch, ONNX Runtime's execution providers, and what to do about every problem found. The exit
    status is 0 if no problem was found, else 1.

    Args:
        json: Print one JSON object instead of text, for bug reports and scripts.

    Returns:
        0 if no problem was found, else 1.
    """
    report = examine()
    print(dumps(asdict(report), indent=2) if json else as_text(report))
    return 1 if report.problems else 0


def examine() -> Report:
    """Everything the doctor looks at, without printing."""
    report = Report()
    _examine_versions(report)
    parts = [_examine_onnxruntime]
    if report.versions["torch"] is not None:
        parts = [_examine_operators, _examine_trajectory_reader, *parts, _examine_imports]
    for part in parts:
        try:
            part(report)
        except Exception as error:  # a broken package may raise anything when it is imported
            what = part.__name__.removeprefix("_examine_").replace("_", " ")
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            broken = getattr(error, "name", None) or "torch"
            remedy = f"pip install --force-reinstall {broken}; `PYARD_TRACEBACK=1 python -c 'import {broken}'` shows more"
            report.problems.append(Problem(f"{what} cannot be examined: {reason}", remedy))
    return report


def as_text(report: Report) -> str:
    """The report for people."""
    shown = {name: version for name, version in report.versions.items() if version is not None or not report.runtime_only}
    lines = ["versions"]
    lines += [f"  {name:<16} {version or 'not installed'}" for name, version in shown.items()]
    lines += ["", f"installed as {' and '.join(report.distributions)}"] if report.distributions else []
    if report.runtime_only:
        lines += ["", "runtime only: students in ONNX files run; training and export need pyard-distill, which brings torch"]
    else:
        lines += _about_operators(report)
    lines += ["", "onnxruntime providers", f"  {', '.join(report.onnxruntime_providers) or 'none'}", ""]
    if not report.problems:
        return "\n".join([*lines, "no problems found"])
    for problem in report.problems:
        lines += [f"problem: {problem.what}", f"  do: {problem.remedy}"]
    return "\n".join(lines)


def _about_operators(report: Report) -> list[str]:
    lines = ["", f"operators (backend {report.backend}; native: compiled, reference: plain PyTorch)"]
    if report.native.get("path"):
        lines.append("  built for {instruction_sets}; this processor takes {active_instruction_set}".format(**report.native))
        lines.append("  with torch {built_with_torch} headers and compiler {compiler}".format(**report.native))
        compiled = report.native["cuda_architectures"] or "not compiled: " + report.native["cuda_note"].splitlines()[0]
        lines.append(f"  CUDA kernels: {compiled}")
    else:
        lines.append("  not built")
    width = max(map(len, report.operators), default=0)
    for operator, by_device in report.operators.items():
        places = ", ".join(f"{device}: {implementation}" for device, implementation in by_device.items())
        places += " (as meant: only GPUs have a kernel of it)" if operator in report.for_gpus_only else ""
        difference = report.self_test.get(operator)
        lines.append(f"  {operator:<{width}} {places}" + ("" if difference is None else f" (differs by {difference:.1e})"))
    return [*lines, "", "trajectory reader", f"  {report.trajectory_reader}"]


def _examine_versions(report: Report) -> None:
    report.versions = {"python": platform.python_version(), "pyard": __version__}
    report.versions.update({package: _version(package) for package in (*PACKAGES, *ONNX_RUNTIMES)})
    report.distributions = [name for name in (DISTRIBUTION, RUNTIME_DISTRIBUTION) if _version(name) is not None]
    for other in SAME_PACKAGE:
        if _has_our_package(other):
            what = f"{other} is another project that also installs a package called pyard: the two overwrite each other's files"
            again = " ".join(report.distributions) or DISTRIBUTION
            report.problems.append(Problem(what, f"pip uninstall -y {other}; pip install --force-reinstall --no-deps {again}"))
    # Where none of these is, only students in ONNX files are meant to run.
    report.runtime_only = all(report.versions[package] is None for package in ("torch", "diffusers", "accelerate"))
    needed = ("numpy",) if report.runtime_only else PACKAGES
    for package in needed:
        if report.versions[package] is None:
            report.problems.append(Problem(f"{package} is not installed", f"pip install {package}"))
    for package, least in minimum_versions().items():
        version = report.versions.get(package)
        if version is not None and _numbers(version) < _numbers(least):
            remedy = f"pip install '{package}>={least}'"
            report.problems.append(Problem(f"{package} is {version}; pyard needs {least} or newer", remedy))


def minimum_versions() -> dict[str, str]:
    """The oldest version of each package that pyard's metadata allow; nothing where pyard is not installed."""
    requirements: list[str] = []
    for name in (RUNTIME_DISTRIBUTION, DISTRIBUTION):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            requirements += importlib.metadata.requires(name) or []
    found = (re.match(r"([\w.-]+)(?:\[[^\]]*\])?>=([\d.]+)(?!.*\bextra\b)", one.replace(" ", "")) for one in requirements)
    return {match[1]: match[2] for match in found if match}


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, 2.11.0 of 2.11.0+cpu, without trailing zeros."""
    digits = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]  # type: ignore[index]
    while digits and digits[-1] == 0:
        digits.pop()
    return tuple(digits)


def _has_our_package(distribution: str) -> bool:
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(str(file) == "pyard/__init__.py" for file in files)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examine_operators(report: Report) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the operators are missing is said below, with a remedy
        from pyard.ops import backend
    import torch

    report.backend = backend.current_backend()
    library = backend.library
    if library is None:
        report.native = {"path": None, "reason": backend.missing_reason}
        report.problems.append(_missing_operators(backend.missing_reason))
    else:
        report.native = {
            "path": str(library.path),
            "built_with_torch": library.built_with_torch,
            "compiler": library.compiler,
            "instruction_sets": " ".join(library.instruction_sets),
            "active_instruction_set": library.active_instruction_set,
            "cuda_architectures": " ".join(library.cuda_architectures),
            "cuda_note": library.cuda_note,
        }
        _examine_cuda_kernels(report, library)
        _run_self_test(report)
    report.for_gpus_only = [operator for operator, places in backend.KERNELS.items() if "cpu" not in places]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for operator in dict.fromkeys([*backend.KERNELS, *backend.OPERATORS]):
        taken = {device: backend.has_kernel(operator, device) for device in devices}
        report.operators[operator] = {device: "native" if native else "reference" for device, native in taken.items()}


def _examine_cuda_kernels(report: Report, library: NativeLibrary) -> None:
    import torch

    from pyard.ops.prebuilt import runs_on

    has_gpu = torch.cuda.is_available()
    again = "install pyard again with PYARD_CUDA=1, which turns a failed build into an error"
    if library.cuda_failed:
        what = f"building the operators' CUDA kernels failed: {library.cuda_note}"
        report.problems.append(Problem(what, f"{again}, or with PYARD_CUDA=0 to leave them out"))
    elif has_gpu and not library.cuda_architectures:
        what = f"this machine has a GPU, but the operators' CUDA kernels were not compiled: {library.cuda_note}"
        report.problems.append(Problem(what, f"install a CUDA toolkit (nvcc), then {again}"))
    elif has_gpu and not runs_on(library.cuda_architectures, torch.cuda.get_device_capability()):
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        what = f"the CUDA kernels were compiled for {' '.join(library.cuda_architectures)}, but this GPU needs {found}"
        report.problems.append(Problem(what, f"set TORCH_CUDA_ARCH_LIST={found} and {again}"))


def _examine_trajectory_reader(report: Report) -> None:
    from pyard.trajectories.gather import native_module

    module, reason = native_module()
    report.trajectory_reader = "python" if module is None else "native"
    if module is None:
        remedy = "install a C++17 compiler and pybind11, then `pip install -e .` or `pip install .` again"
        report.problems.append(Problem(f"trajectories are read in plain Python, slowly: {reason}", remedy))


def _missing_operators(reason: str) -> Problem:
    again = "`pip install -e .` or `pip install .` again"
    remedies = {
        "PYARD_NATIVE=0": "unset PYARD_NATIVE and install pyard again",
        "does not load": "install pyard again, so that it is built with the torch that is installed now",
        "older than pyard's sources": again,
        "was not built": again,
        "was not found": f"install the missing package, then {again}",
    }
    otherwise = f"install a C++17 compiler (Debian, Ubuntu: apt install g++), then {again}"
    remedy = next((remedy for part, remedy in remedies.items() if part in reason), otherwise)
    return Problem(f"the native operators are missing, so plain PyTorch runs instead: {reason}", remedy)


def _run_self_test(report: Report) -> None:
    from pyard.ops.self_test import TOLERANCE, self_test

    report.self_test = self_test()
    for operator, difference in report.self_test.items():
        if not difference <= TOLERANCE:
            remedy = "set PYARD_BACKEND=reference to continue, and report this with the output of `pyard doctor --json`"
            report.problems.append(Problem(f"{operator} differs from its definition by {difference:.1e}", remedy))


def _examine_imports(report: Report) -> None:
    """Whether the packages that are installed can be imported: two that do not fit each other are found only then."""
    for package in PACKAGES[1:]:  # torch was imported with the operators
        if report.versions[package] is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(_MODULES.get(package, package))
        except Exception as error:  # a broken package may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            report.problems.append(Problem(f"{package} does not import: {reason}", f"pip install --force-reinstall {package}"))


def _examine_onnxruntime(report: Report) -> None:
    installed = [package for package in ONNX_RUNTIMES if report.versions[package] is not None]
    if len(installed) == 2:
        remedy = f"pip uninstall -y {' '.join(ONNX_RUNTIMES)}, then install the one you want (onnxruntime-gpu has both)"
        report.problems.append(Problem("onnxruntime and onnxruntime-gpu overwrite each other's files", remedy))
    try:
        import onnxruntime
    except Exception as error:  # a library that does not load, or another package of that name
        report.problems.append(Problem(f"onnxruntime cannot be imported: {error}", "pip install onnxruntime"))
        return
    report.onnxruntime_providers = list(onnxruntime.get_available_providers())
