"""Measures the CPU operators and a training step against plain PyTorch, beside this machine's own rates.

    python -m benchmarks.cpu_ops [--only WORD] [--threads 2] [--clock wall|cpu] [--rounds 15]

Writes benchmarks/results/NAME.json and NAME.md, unless only a part was measured and --name not given.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.operators import all_cases
from benchmarks.timing import Measurement, Rates, measure, measure_rates
from benchmarks.training_step import training_step
from pyard.bench.machine import processor
from pyard.ops.backend import library

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure only what has this word in its name")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine, with --threads 1")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--step-rounds", type=int, default=5, help="rounds of whole training steps")
    parser.add_argument("--name", help="name of the files in benchmarks/results (cpu_ops; with --only, none are written)")
    options = parser.parse_args()
    if library is None:
        parser.error("the native operators are not built; `pyard doctor` says why")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    load_before = os.getloadavg()[0]
    rates = measure_rates(options.rounds, options.clock)
    done = []
    for measurement, rivals in all_cases():
        if options.only in measurement.name:
            done.append(measure(measurement, rivals, options.rounds, options.clock))
            print(row(done[-1], rates), flush=True)
    if options.only in "training step":
        done.append(measure(*training_step(), options.step_rounds, options.clock))
        print(row(done[-1], rates), flush=True)

    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "clock": options.clock,
        "instruction_set": library.active_instruction_set,
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_before_and_after": [load_before, os.getloadavg()[0]],
        **asdict(rates),
    }
    name = options.name or ("" if options.only else "cpu_ops")
    if not name:
        return
    RESULTS.mkdir(exist_ok=True)
    record = {"machine": machine, "measurements": [asdict(measurement) for measurement in done]}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(table(machine, done, rates), encoding="utf-8")


def table(machine: dict[str, object], measurements: list[Measurement], rates: Rates) -> str:
    """The results for people."""
    facts = [f"- {name}: {value:.4g}" if isinstance(value, float) else f"- {name}: {value}" for name, value in machine.items()]
    head = [
        "| work | pyard, ms | of its floor | speed-up over (aim) |",
        "|---|---|---|---|",
    ]
    notes = [
        "The floor is the larger of useful FLOPs at the measured sgemm rate (FLOP/s above) and bytes that must be read and",
        "written at the measured memcpy rate (bytes/s above); caches can beat the second. Speed-ups are medians over rounds of",
        "the ratio within a round.",
    ]
    return "\n".join(["# CPU operators", "", *facts, "", *notes, "", *head, *(row(m, rates) for m in measurements), ""])


def row(measurement: Measurement, rates: Rates) -> str:
    floor, ours = rates.floor(measurement), measurement.median(measurement.ours)
    speedups = []
    for rival in measurement.seconds:
        if rival != measurement.ours:
            aim = f" (aim {measurement.aim[rival]:g})" if rival in measurement.aim else ""
            speedups.append(f"{rival}: {measurement.speedup(rival):.2f}x{aim}")
    share = f"{floor / ours:.0%}" if floor else ""
    return f"| {measurement.name} | {1e3 * ours:.3g} | {share} | {', '.join(speedups)} |"


if __name__ == "__main__":
    main()
