"""Reads the compiler's report (nvcc -Xptxas -v, as the build prints it), prints registers and spills of every kernel and
fails where one spills that is not in EXPLAINED.

    python csrc/cuda/check_spills.py [--compile] [--arch 80 90] [LOG ...]

`--compile` compiles every kernel here for the architectures given, with nothing but nvcc, and reports the time.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Kernel name (a part of it) to the reason why its spills are accepted.
EXPLAINED: dict[str, str] = {}

REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """What the compiler says of one kernel."""

    name: str
    arch: str
    registers: int
    spilled: int  # bytes stored and loaded again


def read_report(text: str) -> list[Kernel]:
    """Every kernel of a compiler's output."""
    kernels = [
        Kernel(m["name"], m["arch"], int(m["registers"]), int(m["stores"]) + int(m["loads"])) for m in REPORT.finditer(text)
    ]
    names = dict(zip((k.name for k in kernels), _plain([k.name for k in kernels]), strict=True))
    return [Kernel(names[k.name], k.arch, k.registers, k.spilled) for k in kernels]


def _plain(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    noise = r"pyard::cuda::|\(anonymous namespace\)::|^void |\([^()]*\)$|\(int\)|\(bool\)"
    return [re.sub(noise, "", name) for name in plain]


def compile_all(archs: list[str]) -> str:
    """The compiler's report on every .cu file of this folder."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    report = ""
    for source in sorted(HERE.glob("*.cu")):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", *targets, f"-I{HERE}", f"-I{HERE / 'ptx'}"]
            command += ["--threads", str(len(archs)), "-c", str(source), "-o", str(Path(folder) / "out.o")]
            finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if finished.returncode != 0:
            sys.exit(f"{source.name} does not compile:\n{finished.stdout[-4000:]}")
        print(f"{source.name}: {time.monotonic() - start:.0f} s", flush=True)
        report += finished.stdout
    return report


def main() -> int:
    """Prints the table; 1 if a kernel spills without a reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", type=Path)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--arch", nargs="+", default=["80", "90"])
    options = parser.parse_args()
    text = "".join(log.read_text(encoding="utf-8") for log in options.logs)
    kernels = read_report(text + (compile_all(options.arch) if options.compile else ""))
    if not kernels:
        sys.exit("no kernels in the report: compile with -Xptxas=-v, or pass --compile")
    unexplained = 0
    for kernel in sorted(kernels, key=lambda k: (k.arch, k.name)):
        reason = next((why for part, why in EXPLAINED.items() if part in kernel.name), "")
        unexplained += kernel.spilled > 0 and not reason
        spills = f", {kernel.spilled} bytes spilled {reason or '(unexplained)'}" if kernel.spilled else ""
        print(f"{kernel.arch} {kernel.registers:4d} registers  {kernel.name}{spills}")
    print(f"{len(kernels)} kernels, {unexplained} with unexplained spills")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
