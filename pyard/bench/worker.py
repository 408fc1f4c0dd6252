"""A process for each way of drawing samples, so that its memory is its own: `python -m pyard.bench.worker KIND PATH THREADS`.

It loads, says how long that took, then draws a batch for each line it reads, which names the inputs' file and the samples'.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Draw = Callable[[np.ndarray, np.ndarray], np.ndarray]
# Seconds until the threads of the process whose turn it was have stopped to spin.
PAUSE = 0.3


def load(kind: str, path: Path, threads: int) -> Draw:
    """A way of drawing samples from (noise, labels): `eager`, `compile`, or `onnx` for any exported file."""
    if kind == "onnx":
        from pyard.runtime import OnnxStudent

        exported = OnnxStudent(path, providers=["CPUExecutionProvider"], threads=threads)
        return lambda noise, labels: exported.sample(labels, noise=noise)
    import torch

    from pyard.models.student import Student

    torch.set_num_threads(threads)
    student = Student.from_pretrained(path)
    if kind == "compile":
        # Regional compilation: the blocks are alike, so one graph serves all that see no history.
        for block in list(student.trunk.blocks)[student.config.history_layers :]:
            block.compile()

    @torch.inference_mode()
    def draw(noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        *_, last = student.rollout(torch.from_numpy(noise), torch.from_numpy(labels))
        return last.numpy()

    return draw


def products(shape: tuple[int, int, int], threads: int) -> Callable[[], float]:
    """Bare single-precision matrix products of a size: a function that returns their floating-point operations a second."""
    import torch

    torch.set_num_threads(threads)
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)

    def rate() -> float:
        rates = []
        for _ in range(7):
            start = time.perf_counter()
            a @ b
            rates.append(2 * rows * inner * columns / (time.perf_counter() - start))
        return max(rates)

    return rate


def peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says on Linux begins with the parent's
        return 1024 * next(
            int(line.split()[1]) for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Serve requests from standard input until it ends."""
    kind, path, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    start = time.perf_counter()
    if kind == "sgemm":
        rate = products(tuple(json.loads(sys.argv[2])), threads)
    else:
        draw = load(kind, path, threads)
    _answer(seconds=time.perf_counter() - start)
    for line in sys.stdin:
        if kind == "sgemm":
            time.sleep(PAUSE)
            _answer(rate=rate())
            continue
        request = json.loads(line)
        with np.load(request["inputs"]) as inputs:
            noise, labels = inputs["noise"], inputs["labels"]
        time.sleep(PAUSE)
        start = time.perf_counter()
        samples = draw(noise, labels)
        seconds = time.perf_counter() - start
        np.save(request["samples"], samples)
        _answer(seconds=seconds, peak_bytes=peak_bytes())


def _answer(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
