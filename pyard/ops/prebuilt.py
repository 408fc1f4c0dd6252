"""PYARD_PREBUILT: a library that was built elsewhere. It is checked, then loaded in place of pyard's own."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from pyard.errors import InputError

SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


def check_sources(path: Path, sources: str, csrc: Path) -> None:
    """Compares the digest in a library with that of the source tree in `csrc`, if there is one.

    Raises:
        InputError: If the library was built from other sources.
    """
    if csrc.is_dir() and sources != source_digest(csrc):
        raise InputError(
            f"PYARD_PREBUILT={path} was built from other sources than those in {csrc}; build it again from this source tree"
        )


def check_kernels(path: Path, architectures: tuple[str, ...], torch_cuda: str | None) -> None:
    """Checks that a library has CUDA kernels if torch has CUDA.

    Raises:
        InputError: If it has none, because a library is brought to a GPU machine for its kernels.
    """
    if torch_cuda is not None and not architectures:
        raise InputError(f"PYARD_PREBUILT={path} has no CUDA kernels, and this torch was built for CUDA {torch_cuda}")


def source_digest(csrc: Path) -> str:
    """SHA-256 of the operators' sources in hexadecimal, as cmake/sources.cmake computes it."""
    files = [path for path in csrc.rglob("*") if path.suffix in SUFFIXES and path.relative_to(csrc).parts[0] != "trajectory"]
    names = {f"{csrc.name}/{path.relative_to(csrc).as_posix()}": path for path in files}
    listing = "".join(f"{hashlib.sha256(names[name].read_bytes()).hexdigest()} {name}\n" for name in sorted(names))
    return hashlib.sha256(listing.encode()).hexdigest()


def runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether kernels compiled for `architectures` run on a GPU.

    Args:
        architectures: As in TORCH_CUDA_ARCH_LIST: `9.0`, `9.0a`, or `9.0+PTX`, which newer GPUs compile for themselves.
        capability: The GPU's compute capability, (9, 0) on an H100.
    """
    for architecture in architectures:
        found = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", architecture)
        if found is None:
            continue
        compiled, exact, ptx = (int(found[1]), int(found[2])), bool(found[3]), bool(found[4])
        # Machine code runs on later minor versions of its major version, that of an `a` target on no other.
        same_major = compiled[0] == capability[0] and compiled <= capability
        if compiled == capability or (not exact and (same_major or (ptx and compiled <= capability))):
            return True
    return False
