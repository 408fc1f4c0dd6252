"""What each precision of an exported student costs in quality, beside the spread of students trained from different seeds.

    pyard bench quality --subjects '[digits]' --only denoised-direct-N-all --out QUALITY  # its report goes there, too
    python -m benchmarks.precisions QUALITY/digits/denoised-direct-N-all

Each folder holds seed-0/run, seed-1/run, ...; beside it lies teacher-samples.npz, the endpoints of the benchmark's noise. Every
seed's student is exported in every precision; all draw from the same noise and labels. Writes precisions.json and
precisions.md; folders that are in them already stay there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from tqdm import tqdm

from pyard.data.digits import digits_data
from pyard.diffusion.noise import standard_normal
from pyard.evaluation.evaluate_students import DEFAULT_SEED
from pyard.evaluation.features import digits_classifier
from pyard.evaluation.frechet import GaussianStatistics, frechet_distance
from pyard.evaluation.measure import balanced_labels
from pyard.export import export_onnx
from pyard.models.student import Student
from pyard.runtime import OnnxStudent

RESULTS = Path(__file__).parent / "results"
PYTORCH, EXACT = "PyTorch", "fp32"
BATCH_SIZE = 100  # ranges of int8 are those of a batch
PRECISIONS = (EXACT, "fp16", "int8", "int8-static")
METRICS = {"label_accuracy": "label accuracy", "frechet_to_data": "Fréchet to digits", "endpoint_mse": "endpoint MSE"}


def quality(samples: np.ndarray, labels: np.ndarray, ends: np.ndarray) -> dict[str, float]:
    """The `METRICS` of samples [n, 1, 8, 8], clipped as pictures are."""
    classifier = digits_classifier()
    distance = frechet_distance(
        GaussianStatistics.of(classifier.features(samples)), GaussianStatistics.of(classifier.features(digits_data()[0]))
    )
    return {
        "label_accuracy": float((classifier.classify(samples) == labels).mean()),
        "frechet_to_data": distance,
        "endpoint_mse": float(np.square(samples - ends, dtype=np.float64).mean()),
    }


def in_pytorch(student: Student, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Samples of a student before its export."""
    with torch.inference_mode():
        *_, last = student.rollout(torch.from_numpy(noise), torch.from_numpy(labels))
    return last.float().numpy()


def compare(folder: Path, count: int) -> list[dict[str, Any]]:
    """A row for PyTorch and one for each precision, each with the values of every seed."""
    runs = sorted(folder.glob("seed-*/run"))
    if len(runs) < 2:
        raise SystemExit(f"{folder}: found {len(runs)} of seed-*/run; expected at least 2, to measure the spread")
    with np.load(folder.parent / "teacher-samples.npz") as file:
        ends = file["ends"][:count]
    rows: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in (PYTORCH, *PRECISIONS)}
    noise = standard_normal(DEFAULT_SEED, np.arange(len(ends)), ends.shape[1:])
    bar = tqdm(total=len(runs) * len(rows), desc=folder.name)
    with TemporaryDirectory() as name:
        for run in runs:
            student = Student.from_pretrained(run).eval()
            assert student.num_classes is not None
            labels = balanced_labels(len(ends), student.num_classes)
            for kind, row in rows.items():
                if kind == PYTORCH:
                    samples = exact = np.clip(in_pytorch(student, noise, labels), -1, 1)
                else:
                    path = Path(name) / run.parent.name / kind / "student.onnx"
                    export_onnx(student, path, precision=kind, vae=None)  # type: ignore[arg-type]
                    row["bytes"] = path.stat().st_size
                    exported = OnnxStudent(path, providers=["CPUExecutionProvider"], threads=1)
                    samples = np.clip(exported.sample(labels, noise=noise, batch_size=BATCH_SIZE), -1, 1)
                difference = np.abs(samples - exact)
                found = quality(samples, labels, ends)
                found["largest_difference"] = float(difference.max())
                found["rms_difference"] = float(np.square(difference, dtype=np.float64).mean() ** 0.5)
                row.setdefault("seeds", []).append(run.parent.name)
                for metric, value in found.items():
                    row.setdefault(metric, []).append(value)
                bar.update()
    bar.close()
    return list(rows.values())


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = []
    for name, result in results.items():
        rows = {row["kind"]: row for row in result["rows"]}
        exact = rows[EXACT]
        lines += [
            f"`{name}`, {result['count']} samples of each of {len(exact['seeds'])} seeds:",
            "",
            f"| | KB | {' | '.join(METRICS.values())} | largest / RMS difference to PyTorch | within the seeds' spread |",
            f"|---|---|{'---|' * len(METRICS)}---|---|",
        ]
        for precision in PRECISIONS:
            row = rows[precision]
            outside = [METRICS[m] for m in METRICS if not min(exact[m]) <= statistics.mean(row[m]) <= max(exact[m])]
            largest, rms = max(row["largest_difference"]), statistics.mean(row["rms_difference"])
            cells = [
                precision,
                f"{row['bytes'] / 1e3:.0f}",
                *(f"{statistics.mean(row[m]):.4f} ({min(row[m]):.4f} … {max(row[m]):.4f})" for m in METRICS),
                f"{largest:.1e} / {rms:.1e}",
                f"not {', '.join(outside)}" if outside else "yes",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "Mean over the seeds (lowest … highest). Within: the mean lies between the lowest and the highest seed of fp32. Pixels",
        "go from -1 to 1; the endpoint MSE is to the teacher's 25 DDIM steps from the same noise.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with seed-0/run, seed-1/run, ...")
    parser.add_argument("--count", type=int, default=5000, help="samples of each student")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "precisions.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for folder in arguments.folders:
        rows = compare(folder, arguments.count)
        results[folder.name] = {"count": arguments.count, "onnxruntime": onnxruntime.__version__, "rows": rows}
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
