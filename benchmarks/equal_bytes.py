"""Whether equal requests give equal pictures, whatever is drawn in the same batch, by the sizes that batches may have.

    python -m benchmarks.equal_bytes fp32.onnx fp16.onnx int8.onnx scenes/

30 requests are drawn again and again in random batches of 1 to 8. Counted are pictures that differ from the first one of the
same request: in some bit of their numbers, and in some byte of their 8-bit pixels. Writes equal_bytes.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from pyard.bench.machine import processor
from pyard.diffusion.noise import standard_normal
from pyard.runtime import OnnxPipeline, OnnxStudent

RESULTS = Path(__file__).parent / "results"
REQUESTS, MOST = 30, 8
TEXTS = ("a red circle", "a large blue square above a small green circle", "two yellow triangles")
SIZES: dict[str, Callable[[int], int]] = {
    "as they come": lambda count: count,
    "at least 2": lambda count: max(count, 2),
    "2, 4 or 8": lambda count: max(2, 1 << (count - 1).bit_length()),
    "always 8": lambda count: MOST,
}


def drawing(place: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """From numbers of requests to their samples, float32."""
    index = np.arange(REQUESTS)
    if place.is_dir():
        pipeline = OnnxPipeline(place, threads=threads)
        noise = standard_normal(5, index, pipeline.sizes[0].sample_shape)
        return lambda rows: pipeline.latents(pipeline.encode([TEXTS[i % len(TEXTS)] for i in rows]), noise[rows])
    student = OnnxStudent(place, threads=threads)
    noise = standard_normal(5, index, student.info.sample_shape)
    labels = index % (student.info.num_classes or 1)
    return lambda rows: student.sample(labels[rows], noise=noise[rows])


def levels(sample: np.ndarray) -> np.ndarray:
    return sample if sample.dtype == np.uint8 else np.round((sample.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def compare(place: Path, batches: int) -> dict[str, Any]:
    found = {name: {"bits": 0, "bytes": 0, "pictures": 0} for name in SIZES}
    random = np.random.default_rng(0)
    for threads in (1, 2):
        draw = drawing(place, threads)
        for name, size_of in SIZES.items():
            first: dict[int, np.ndarray] = {}
            for _ in range(batches):
                rows = random.integers(0, REQUESTS, random.integers(1, MOST + 1))
                filled = np.concatenate([rows, np.repeat(rows[:1], size_of(len(rows)) - len(rows))])
                for row, sample in zip(rows, draw(filled), strict=False):
                    before = first.setdefault(int(row), sample)
                    if before is not sample:
                        found[name]["pictures"] += 1
                        found[name]["bits"] += not np.array_equal(before, sample)
                        found[name]["bytes"] += not np.array_equal(levels(before), levels(sample))
    return found


def table(results: dict[str, Any]) -> str:
    lines = [f"| batches of | {' | '.join(SIZES)} |", f"|---|{'---|' * len(SIZES)}"]
    for name, found in results["files"].items():
        cells = [f"{one['bits']} / {one['bytes']} of {one['pictures']}" for one in found.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += [
        "",
        "Pictures that differ from the first of the same request: in a bit of a number / in a byte of a pixel.",
        "",
    ]
    return "\n".join([*lines, f"onnxruntime {results['onnxruntime']}, {results['processor']}, one thread and two."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", type=Path)
    parser.add_argument("--batches", type=int, default=150, help="batches of each kind, with one thread and with two")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    files = {place.name: compare(place, options.batches) for place in options.students}
    results = dict(processor=processor(), onnxruntime=onnxruntime.__version__, files=files)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "equal_bytes.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / "equal_bytes.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
