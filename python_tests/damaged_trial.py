"""Damages inputs and reads them, each in a process of its own, and says what was wrong with the answers.

    python damaged_trial.py FOLDER good               reads the good inputs
    python damaged_trial.py FOLDER examine SEED COUNT  reads damaged ones

In a fresh process, because it forks: a child that is forked where OpenMP has computed already may wait for threads that it
does not have. The last line of its output is JSON: `faults`, and how often each status was seen.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from damaged_files import Damage
from damaged_inputs import Input, build, code_was_executed, inputs, run
from damaged_targets import TARGETS
from forked_calls import Outcome, forked

SECONDS, GIB = 10, 2.0
# Imported once, before the processes are forked.
_MODULES = (
    "pyard.evaluation",
    "pyard.training",
    "pyard.export",
    "pyard.estimate.recipe_cost",
    "pyard.estimate.student_cost",
    "pyard.sampling.draw",
    "pyard.teachers.convert",
    "pyard.trajectories",
    "pyard.runtime",
    "pyard.teachers.text_to_image.text_encoder",
    "onnx",
    "diffusers",
    "transformers",
    "torch.distributed.checkpoint",
)


def prepare(base: Path) -> None:
    """Write the good inputs, once, and import what reads them."""
    if not (base / "whole").exists():
        ((_, outcome),) = forked([base], build, workers=1, seconds=600, gib=8)
        if outcome.status:
            sys.exit(outcome.errors)
        (base / "whole").touch()
    for module in _MODULES:
        importlib.import_module(module)


def read_good(base: Path, folder: Path) -> tuple[list[str], Counter[int]]:
    """The calls themselves work, so that what is refused is refused for its damage."""
    calls = [Input(i, target, "", Damage("none", lambda path, rng: None, False), 0) for i, target in enumerate(TARGETS)]

    def call(good: Input) -> int | None:
        shutil.copytree(base / good.target.name, folder / str(good.number))
        return good.target.read(folder / str(good.number))

    outcomes = list(forked(calls, call, workers=2, seconds=60, gib=GIB))
    wrong = [
        f"{good}: status {outcome.status}: {outcome.errors.strip()[-400:]}" for good, outcome in outcomes if outcome.status
    ]
    return wrong, Counter(outcome.status for _, outcome in outcomes)


def fault(damaged: Input, outcome: Outcome, folder: Path) -> str | None:
    """What is wrong with an answer; None: nothing."""
    lines = [line for line in outcome.errors.splitlines() if re.match(r"pyard[\w .]*: error: ", line)]
    if code_was_executed(folder):
        return "code was executed"
    if "Traceback" in outcome.errors or outcome.status not in (0, 2):
        return f"status {outcome.status}"
    if outcome.status == 2 and (len(lines) != 1 or not outcome.errors.rstrip().endswith(lines[0])):
        return f"{len(lines)} lines of error"
    if outcome.status == 0 and damaged.damage.certain and damaged.damage.name not in damaged.target.tolerates:
        return "accepted"
    if outcome.cpu_seconds > SECONDS:
        return f"{outcome.cpu_seconds:.1f} s"
    if outcome.grown_bytes > GIB * 2**30:
        return f"{outcome.grown_bytes / 2**30:.1f} GiB"
    return None


def examine(base: Path, folder: Path, seed: int, count: int) -> tuple[list[str], Counter[int]]:
    found, statuses = [], Counter[int]()

    def call(damaged: Input) -> int | None:
        place = folder / str(damaged.number)
        place.mkdir()
        return run(base, damaged, place)

    for damaged, outcome in forked(inputs(base, seed, count), call, workers=os.cpu_count() or 1, seconds=SECONDS, gib=GIB):
        place = folder / str(damaged.number)
        wrong = fault(damaged, outcome, place)
        if wrong is not None:
            found.append(f"{damaged}: {wrong}: {outcome.errors.strip()[-400:]}")
        statuses[outcome.status] += 1
        shutil.rmtree(place, ignore_errors=True)
    return found, statuses


def main() -> None:
    base, what, *numbers = sys.argv[1:]
    prepare(Path(base))
    with tempfile.TemporaryDirectory() as folder:
        if what == "good":
            faults, statuses = read_good(Path(base), Path(folder))
        else:
            faults, statuses = examine(Path(base), Path(folder), int(numbers[0]), int(numbers[1]))
    print(json.dumps({"faults": faults, "statuses": statuses}))


if __name__ == "__main__":
    main()
