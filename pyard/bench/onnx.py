"""How fast a student draws in PyTorch and in onnxruntime, beside the rate of bare matrix products: `pyard bench onnx`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pyard.bench.machine import processor
from pyard.cost.flops import student_flops
from pyard.diffusion.noise import standard_normal, uniform_labels
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.export import export_onnx
from pyard.export.files import data_files
from pyard.models.backbone import Denoiser
from pyard.models.student import Student
from pyard.models.student_config import HISTORY_SWITCHED_OFF
from pyard.storage.files import write_text
from pyard.storage.reading import read_object
from pyard.storage.typed import checked
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.teachers.published import network_of
from pyard.version import __version__

MODELS = ("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2")  # latents of 32 x 32 x 4 in patches of 2 are 256 tokens
NUM_STEPS = 4
PLAIN, NATIVE = "PyTorch eager, plain", "PyTorch eager, native operators"
# way of drawing -> the worker's kind of it, the backend of pyard's operators in it
WAYS = {
    PLAIN: ("eager", "reference"),
    NATIVE: ("eager", "auto"),
    "torch.compile": ("compile", "reference"),
    "ONNX fp32": ("onnx", ""),
    "ONNX int8": ("onnx", ""),
    "ONNX int8-static": ("onnx", ""),
}


@checked("bench")
def bench_onnx(
    models: list[str] | None = None,
    batch_sizes: list[int] | None = None,
    *,
    ways: list[str] | None = None,
    rounds: int = 5,
    threads: int = 2,
    out: Path = Path("benchmarks/results"),
    progress: bool = True,
) -> None:
    """Time students with random weights in PyTorch and onnxruntime; write a JSON file and a Markdown table.

    Every way of drawing is a process of its own. They take turns, and every turn also times bare matrix products, so that
    ratios hold even if other programs disturb the machine. Models already in the file are kept.

    Example: pyard bench onnx --models '[DiT-S/2]' --batch-sizes '[1]'

    Args:
        models: some of DiT-S/2, DiT-B/2, DiT-L/2, DiT-XL/2; none: the first two.
        batch_sizes: samples per call; none: 1 and 8.
        ways: ways of drawing, some of 'PyTorch eager, plain', 'PyTorch eager, native operators', torch.compile, 'ONNX fp32',
            'ONNX int8', 'ONNX int8-static'; samples are compared with those of the first; none: all.
        rounds: timed calls of each way.
        threads: CPU threads of each process.
        out: folder for `onnx.json` and `onnx.md`.
        progress: show a progress bar.

    Raises:
        InputError: an unknown model or way.
    """
    models, batch_sizes, ways = models or list(MODELS[:2]), batch_sizes or [1, 8], ways or list(WAYS)
    for names, known in ((models, MODELS), (ways, tuple(WAYS))):
        for name in names:
            if name not in known:
                raise InputError(f"bench onnx: unknown {name!r}; expected some of {', '.join(known)}")
    file = out / "onnx.json"
    results = read_object(file) if file.exists() else {}
    for model in models:
        rows = _bench_model(model, batch_sizes, ways, rounds, threads, progress)
        results[model] = {"machine": _machine(threads), "rows": rows}
        write_text(file, json.dumps({name: results[name] for name in MODELS if name in results}, indent=1) + "\n")
        write_text(file.with_suffix(".md"), table(results))
    print(table(results))


def random_student(model: str) -> Student:
    """A student of a published network as `pyard.train` makes it by default (S = 4, N = L / 4); all parameters are random."""
    torch.manual_seed(0)
    network, schedule = network_of(model)
    trunk = network.trunk
    teacher = NetworkTeacher(Denoiser(type(trunk)(trunk.config)), schedule)  # type: ignore[call-arg]
    layers = trunk.config.depth // 4
    student = Student.from_teacher(
        teacher, TimeGrid.build(schedule, NUM_STEPS), history_layers=layers, history_bias=HISTORY_SWITCHED_OFF
    )
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return student.eval()


class _Worker:
    """A child process that answers one line to each line."""

    def __init__(self, stack: ExitStack, kind: str, path: str, threads: int, backend: str = ""):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **({"PYARD_BACKEND": backend} if backend else {})}
        command = [sys.executable, "-m", "pyard.bench.worker", kind, path, str(threads)]
        pipe = subprocess.PIPE
        self.process = stack.enter_context(
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, encoding="utf-8")
        )
        stack.callback(self.process.kill)
        self.load_seconds = float(self._read()["seconds"])

    def ask(self, **request: str) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a benchmark process ended early; its message is above")
        answer: dict[str, float] = json.loads(line)
        return answer


def _bench_model(
    model: str, batch_sizes: list[int], ways: list[str], rounds: int, threads: int, progress: bool
) -> list[dict[str, Any]]:
    student = random_student(model)
    operations = student_flops(student)
    rows = []
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        student.save_pretrained(folder / "student")
        files = {way: _file(student, way, folder) for way in ways}
        width = student.trunk.hidden_size
        # The size of the MLP's first product at batch 8, where bare products are at their fastest.
        sgemm = _Worker(stack, "sgemm", json.dumps([8 * student.trunk.tokens_per_step(), width, 4 * width]), threads)
        workers = {way: _Worker(stack, WAYS[way][0], str(files[way]), threads, WAYS[way][1]) for way in ways}
        bar = tqdm(total=len(batch_sizes) * len(ways) * (rounds + 1), desc=model, disable=not progress)
        for size in batch_sizes:
            inputs = folder / f"inputs{size}.npz"
            index = np.arange(size)
            noise, labels = standard_normal(0, index, student.sample_shape), uniform_labels(0, index, 1000)
            np.savez(inputs, noise=noise, labels=labels)
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            rates, peak, first = [], {}, {}
            for turn in range(rounds + 1):
                rates += [sgemm.ask()["rate"]]
                for way, worker in workers.items():
                    answer = worker.ask(inputs=str(inputs), samples=str(folder / f"{way} {size}.npy"))
                    bar.update()
                    if turn == 0:  # what is compiled or packed in the first call is no part of a call
                        first[way] = answer["seconds"]
                        continue
                    seconds[way].append(answer["seconds"])
                    peak[way] = answer["peak_bytes"]
            exact = np.load(folder / f"{ways[0]} {size}.npy")
            for way in ways:
                found = np.load(folder / f"{way} {size}.npy")
                floors = [operations * size / rate for rate in rates[1:]]
                rows.append(
                    dict(
                        model=model,
                        batch_size=size,
                        way=way,
                        seconds_per_image=statistics.median(seconds[way]) / size,
                        speed_over={
                            rival: _median_ratio(seconds[rival], seconds[way]) for rival in (PLAIN, NATIVE) if rival in seconds
                        },
                        fraction_of_sgemm=_median_ratio(floors, seconds[way]),
                        best_fraction_of_sgemm=operations * size / max(rates) / min(seconds[way]),
                        peak_megabytes=peak[way] / 1e6,
                        file_megabytes=_size(files[way]) / 1e6,
                        load_seconds=workers[way].load_seconds,
                        first_call_seconds=first[way],
                        max_error=float(np.abs(found - exact).max() / np.abs(exact).max()),
                        calls_seconds=seconds[way],
                        sgemm_gigaflops=[rate / 1e9 for rate in rates],
                    )
                )
        bar.close()
    return rows


def _file(student: Student, way: str, folder: Path) -> Path:
    if WAYS[way][0] != "onnx":
        return folder / "student"
    precision = way.removeprefix("ONNX ")
    path = folder / precision / "student.onnx"
    export_onnx(student, path, precision=precision, calibration=8, vae=None)  # type: ignore[arg-type]
    return path


def _size(path: Path) -> int:
    if path.is_file():
        return sum(file.stat().st_size for file in (path, *data_files(path)))
    return (path / "model.safetensors").stat().st_size


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _machine(threads: int) -> dict[str, Any]:
    import onnxruntime

    versions = {"pyard": __version__, "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {"cpu": processor(), "cores": os.cpu_count(), "threads": threads, "load_average": load, "versions": versions}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"""`pyard bench onnx`: students with random weights, 256 tokens, S = {NUM_STEPS}, N = L/4. Medians of calls in turns;
ratios are medians of each turn's own ratio. Fraction of sgemm: time that bare products with the same number of operations
take, over the time taken. Plain: every operator in PyTorch's own. Load: of the whole machine at the end, the benchmark
included."""
    ]
    for model, result in results.items():
        machine, rows = result["machine"], result["rows"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        sgemm = statistics.median(rate for row in rows for rate in row["sgemm_gigaflops"])
        lines.append(
            f"""
{model}: {machine["cpu"]}, {machine["cores"]} cores, {machine["threads"]} threads, load {machine["load_average"]}; {versions};
{len(rows[0]["calls_seconds"])} calls; sgemm {sgemm:.0f} GFLOP/s.

| batch | | s/image | over plain | over native | fraction of sgemm | peak MB | file MB | load s | max error |
|---|---|---|---|---|---|---|---|---|---|"""
        )
        for row in rows:
            ratios = " | ".join(f"{row['speed_over'][way]:.2f}x" if way in row["speed_over"] else "" for way in (PLAIN, NATIVE))
            lines.append(
                f"| {row['batch_size']} | {row['way']} | {row['seconds_per_image']:.3f} | {ratios} "
                f"| {row['fraction_of_sgemm']:.0%} | {row['peak_megabytes']:.0f} | {row['file_megabytes']:.0f} "
                f"| {row['load_seconds']:.2f} | {row['max_error']:.1e} |"
            )
    return "\n".join(lines) + "\n"
