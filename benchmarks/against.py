"""Compares this checkout's speed with another's, in alternating runs on one machine.

    python -m benchmarks.against CHECKOUT [--rounds 5] [--threads 2] [--name against]

CHECKOUT is a folder with another commit and its built operators (`git worktree add`, `python setup.py build_ext --inplace`).
Each round measures both checkouts, in an order that alternates, in processes of their own: the CPU operators and a training
step (`benchmarks.cpu_ops`), drawing in PyTorch and onnxruntime (`pyard bench onnx`), a training of digits from a store
that is there, without checkpoints and with one every 50 updates, and `pyard teach` with as many. The table has medians of
the rounds' ratios, as rates: above 1, this checkout is the faster one.
Writes benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from pyard.bench.machine import processor

HERE = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
# Of two trainings the shorter one's time is taken away: loading, the first updates and the end are in both.
UPDATES = (10, 160)
TEACHER_UPDATES = (10, 510)
SAVE_EVERY = 50
TEACHER = "import sys, pyard.teachers.convert as c, pathlib; c.convert('digits', pathlib.Path(sys.argv[1]), to='dit')"
# The digits' teacher as a file that every commit reads.
LOADED = "import json, sys, time, pyard; teacher = pyard.load_teacher(sys.argv[1], family='dit', num_heads=4)\n"
STORE = LOADED + "pyard.generate_trajectories(teacher, sys.argv[2], count=128, progress=False)"
TRAINING = (
    LOADED
    + """
out, store, times = sys.argv[2], sys.argv[3], []
settings = dict(num_steps=4, batch_size=64, num_trajectories=128, save_every=int(sys.argv[5]), progress=False)
for updates in json.loads(sys.argv[4]):
    started = time.perf_counter()
    pyard.train(teacher, store, out=f"{out}/{updates}", max_steps=updates, **settings)
    times.append(time.perf_counter() - started)
print(json.dumps(times[1] - times[0]))
"""
)
TEACHING = """
import json, sys, time
from pyard.teachers import digits
times = []
for updates in json.loads(sys.argv[2]):
    started = time.perf_counter()
    digits.teach(f"{sys.argv[1]}/{updates}", max_steps=updates, save_every=int(sys.argv[3]), progress=False)
    times.append(time.perf_counter() - started)
print(json.dumps(times[1] - times[0]))
"""
ONNX_WAYS = ("PyTorch eager, native operators", "ONNX fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--name", default="against")
    options = parser.parse_args()
    checkouts = {"other": options.other.resolve(), "this": HERE}
    rounds: list[dict[str, dict[str, float]]] = []
    with TemporaryDirectory() as scratch:
        teacher = Path(scratch, "teacher.pt")
        run(HERE, options.threads, "-c", TEACHER, str(teacher))
        for number in tqdm(range(options.rounds), unit="round"):
            order = list(checkouts) if number % 2 == 0 else list(reversed(checkouts))
            rounds.append(
                {
                    name: dict(seconds(checkouts[name], options.threads, teacher, Path(scratch, f"{number}{name}")))
                    for name in order
                }
            )
            record: dict[str, object] = {
                "machine": {"processor": processor(), "threads": options.threads, "load_average": os.getloadavg()[0]},
                "commits": {name: commit(folder) for name, folder in checkouts.items()},
                "seconds": rounds,
            }
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            (RESULTS / f"{options.name}.md").write_text(table(record, rounds), encoding="utf-8")
    print((RESULTS / f"{options.name}.md").read_text(encoding="utf-8"))


def seconds(checkout: Path, threads: int, teacher: Path, scratch: Path) -> Iterator[tuple[str, float]]:
    """What each piece of work takes in a checkout, median of the calls of one process."""
    scratch.mkdir()
    run(checkout, threads, "-m", "benchmarks.cpu_ops", "--threads", str(threads), "--rounds", "3", "--step-rounds", "1",
        "--name", "against_ops")  # fmt: skip
    for work in json.loads((checkout / "benchmarks/results/against_ops.json").read_text(encoding="utf-8"))["measurements"]:
        yield work["name"], statistics.median(work["seconds"]["pyard"])
    for path in checkout.glob("benchmarks/results/against_ops.*"):
        path.unlink()
    ways = json.dumps(ONNX_WAYS)
    run(checkout, threads, "-m", "pyard", "bench", "onnx", "--models", "[DiT-S/2]", "--batch_sizes", "[1]", "--ways", ways,
        "--rounds", "3", "--threads", str(threads), "--out", str(scratch), "--progress", "false")  # fmt: skip
    for row in json.loads((scratch / "onnx.json").read_text(encoding="utf-8"))["DiT-S/2"]["rows"]:
        yield f"drawing, DiT-S/2, {row['way']}", row["seconds_per_image"]
    run(checkout, threads, "-c", STORE, str(teacher), str(scratch / "store"))
    for save_every, told in ((1000, "no checkpoints"), (SAVE_EVERY, f"a checkpoint every {SAVE_EVERY}")):
        runs = str(scratch / f"runs-{save_every}")
        printed = run(
            checkout, threads, "-c", TRAINING, str(teacher), runs, str(scratch / "store"), json.dumps(UPDATES), str(save_every)
        )
        yield f"training of digits, {UPDATES[1] - UPDATES[0]} updates of 64, {told}", float(printed.splitlines()[-1])
    printed = run(checkout, threads, "-c", TEACHING, str(scratch / "taught"), json.dumps(TEACHER_UPDATES), str(SAVE_EVERY))
    updates = TEACHER_UPDATES[1] - TEACHER_UPDATES[0]
    yield f"teach, {updates} updates of 64, a checkpoint every {SAVE_EVERY}", float(printed.splitlines()[-1])


def run(checkout: Path, threads: int, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(arguments)[:200]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def commit(checkout: Path) -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, encoding="utf-8", check=True
    ).stdout.strip()


def table(record: dict[str, object], rounds: list[dict[str, dict[str, float]]]) -> str:
    """The ratios for people."""
    lines = [f"- {name}: {value}" for name, value in record.items() if name != "seconds"]
    lines += ["", "| work | other, ms | this, ms | ratio | of the rounds |", "|---|---|---|---|---|"]
    medians = []
    for work in (work for work in rounds[0]["this"] if work in rounds[0]["other"]):  # some work is newer than the other
        ratios = [both["other"][work] / both["this"][work] for both in rounds]
        medians.append(statistics.median(ratios))
        other, this = (statistics.median(both[name][work] for both in rounds) * 1e3 for name in ("other", "this"))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {work} | {other:.4g} | {this:.4g} | {medians[-1]:.2f} | {spread} |")
    lines.append(f"| median | | | {statistics.median(medians):.3f} | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
