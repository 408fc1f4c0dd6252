"""Seconds from the start of a Python process to the first image of an exported student.

    python -m benchmarks.first_image student.onnx [--results FILE.json]

A new process each time: it imports pyard.runtime, opens the file, draws one sample and says so. A first, untimed process reads
everything into the file cache. The bare interpreter and `import onnxruntime` alone, in the same turns, say what of it is not
pyard's. CPU seconds, of all threads up to the end of the process, hold on a machine that is busy with other work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime

from pyard.bench.machine import processor

IMPORTS = "import numpy, onnxruntime"
DRAW = "from pyard.runtime import OnnxStudent; OnnxStudent({path!r}).sample([3], seed=0)"


def seconds_until_done(code: str) -> tuple[float, float]:
    """Seconds until a process has run some code, and the CPU seconds it has used in the end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", f"{code}; print(flush=True)"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - begin
    if not line or process.returncode:
        raise RuntimeError(f"a process ended with {process.returncode}; its message is above")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="file written by python -m pyard.export")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    codes = {
        "Python alone": "pass",
        "import numpy and onnxruntime": IMPORTS,
        "first image": DRAW.format(path=arguments.student),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
    for turn in range(arguments.repeats + 1):
        for name, code in codes.items():
            both = seconds_until_done(code)
            if turn:
                found[name].append(both)
    for name, times in found.items():
        seconds, cpu = (statistics.median(one) for one in zip(*times, strict=True))
        print(f"{name}: {seconds:.3f} s, {cpu:.3f} s of CPU (medians of {len(times)})")
    load = round(os.getloadavg()[0], 1)
    print(f"load average of the machine: {load}")
    if arguments.results:
        facts = {
            "processor": processor(),
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            "student_bytes": Path(arguments.student).stat().st_size,
            "load_average": load,
            "seconds_and_cpu_seconds": found,
        }
        arguments.results.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
