"""Runs trials of all commands and ways, adds them to a table, and writes benchmarks/results/crash.json and crash.md.

    python -m benchmarks.crash [--trials 500] [--minutes 60] [--jobs 1] [--commands ...] [--ways ...] [--work DIR] [--name NAME]

Each trial starts a command, stops it at a random moment in one of the ways of `trial.WAYS`, gives it again, and compares every
byte with an undisturbed run (`digest.py` lists what may differ). Trials are drawn by command, way and number: a run that
was stopped goes on, and a later one adds to its table. Power cuts need root and loop devices; where they are not to be had, the
table says so. `--ways` and `--commands` take parts of names.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Run, then write the table."""
    arguments = _arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    from benchmarks.crash import commands, places, trial

    _import_everything()
    work = arguments.work.absolute()
    inputs = work / "inputs"
    commands.write_inputs(inputs, lambda line: _run_line(line, inputs))
    chosen = [command for command in commands.COMMANDS if _named(command.name, arguments.commands)]
    ways = [way for way in trial.WAYS if _named(way, arguments.ways)]
    skipped = {way: reason for way, kind in trial.DISKS.items() if way in ways and (reason := places.can_mount(kind))}
    if trial.SMALL in ways and os.geteuid() != 0:
        skipped[trial.SMALL] = "only root can mount"
    log = work / "trials.jsonl"
    cells = [(command, way) for command in chosen for way in ways if way not in skipped and way not in command.skips]
    done = _read(log)
    counts = {(c.name, way): sum(t["command"] == c.name and t["way"] == way for t in done) for c, way in cells}
    plan = sorted((number, i) for i, (c, way) in enumerate(cells) for number in range(counts[c.name, way], 1000))
    plan = plan[: arguments.trials]
    until = time.monotonic() + 60 * arguments.minutes
    workers = [
        multiprocessing.get_context("fork").Process(
            target=_work, args=(job, arguments.jobs, plan, cells, inputs, work, log, until)
        )
        for job in range(arguments.jobs)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    _report(_read(log), skipped, arguments.results / arguments.name)


def _work(job, jobs, plan, cells, inputs, work, log, until) -> None:  # type: ignore[no-untyped-def]
    from benchmarks.crash.trial import run_trial, undisturbed

    known = {}
    commit = _commit()
    parent = os.getppid()
    for number, i in plan[job::jobs]:
        if time.monotonic() > until or os.getppid() != parent:  # which was told to stop
            break
        command, way = cells[i]
        here = work / f"job{job}"
        if command.name not in known:
            known[command.name] = undisturbed(command, inputs, here)
        seed = zlib.crc32(f"{command.name}/{way}/{number}".encode())
        started = time.monotonic()
        outcome, why = run_trial(command, way, seed, known[command.name], inputs, here)
        line = {"command": command.name, "way": way, "number": number, "commit": commit, "outcome": outcome, "why": why}
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        seconds = time.monotonic() - started
        print(f"{command.name} | {way} | {number}: {outcome} in {seconds:.1f} s {why[-300:]}", file=sys.stderr, flush=True)


def _report(trials: list[dict[str, str]], skipped: dict[str, str], to: Path) -> None:
    from benchmarks.crash.commands import COMMANDS
    from benchmarks.crash.table import table

    rows: dict[tuple[str, str], dict[str, int]] = {}
    for one in trials:
        row = rows.setdefault((one["command"], one["way"]), {"trials": 0, "recovered": 0, "lost": 0, "wrong": 0})
        row["trials"] += 1
        row[one["outcome"]] += 1
    listed = [{"command": command, "way": way, **row} for (command, way), row in rows.items()]
    commits = sorted({one["commit"] for one in trials})
    failures = [one for one in trials if one["outcome"] != "recovered"]
    record = {"commits": commits, "skipped": skipped, "rows": listed, "failures": failures}
    to.parent.mkdir(parents=True, exist_ok=True)
    to.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = table(listed, skipped, commits, {command.name: command.skips for command in COMMANDS})
    to.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def _read(log: Path) -> list[dict[str, str]]:
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _run_line(line: str, place: Path) -> None:
    from benchmarks.crash.process import Running

    running = Running([line.split()], place, ranks=False)
    if not running.wait(600) or running.status:
        running.kill()
        raise RuntimeError(f"{line}: {running.said()}")
    running.said()


def _named(name: str, parts: list[str]) -> bool:
    return not parts or any(part in name for part in parts)


def _commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True, encoding="utf-8", check=False).stdout.strip()


def _import_everything() -> None:
    """So that a forked command begins at once, and is stopped while it works, not while it imports."""
    import importlib

    import torch

    torch.set_num_threads(1)
    from pyard.cli.command_line import COMMANDS

    for module in (
        "accelerate",
        "diffusers.optimization",
        "peft",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "PIL.Image",
        "sklearn.datasets",
        "networkx",
        "torch.onnx._internal.exporter._core",
        "onnxscript.function_libs.torch_lib.ops",
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma",
        "transformers.models.t5.modeling_t5",
        "transformers.models.t5.tokenization_t5",
        "pyard.models.pixart.network",
    ):
        importlib.import_module(module)
    for command in COMMANDS.values():
        importlib.import_module(command.module)
    _shorten_the_demo()
    for module in ("pyard.training.loop", "pyard.training.adversarial", "pyard.training.sharded", "pyard.training.processes"):
        importlib.import_module(module)


def _shorten_the_demo() -> None:
    """A minute's run is too long for a trial: every command is the same, with a hundredth of the updates."""
    import dataclasses

    from pyard.demo import digits, students
    from pyard.evaluation.features import digits_classifier

    teacher = {**(students.QUICK.teacher or {}), "max_steps": 8, "save_every": 4}
    small = dict(trajectories=32, student_steps=4, samples=20, save_every=1, teacher=teacher)
    digits.QUICK = dataclasses.replace(students.QUICK, **small)  # type: ignore[arg-type, attr-defined]
    digits_classifier()  # from a fixed seed, in seconds, and kept as long as the process lives


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--commands", nargs="*", default=[])
    parser.add_argument("--ways", nargs="*", default=[])
    parser.add_argument("--work", type=Path, default=Path("build/crash"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="crash")
    return parser.parse_args()


if __name__ == "__main__":
    main()
