"""Damaged inputs of every kind are answered in one line or correctly, within 10 seconds and 2 GiB, and run no code."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from damaged_files import Damage
from damaged_inputs import Input, build, code_was_executed, inputs, run
from damaged_targets import TARGETS
from forked_calls import Outcome, forked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory and asks /proc for it")

SEED = 2026
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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    # In a process of its own: forked processes must not find the threads of libraries that have computed already.
    ((_, outcome),) = forked([folder], build, workers=1, seconds=600, gib=8)
    assert outcome.status == 0, outcome.errors
    for module in _MODULES:
        importlib.import_module(module)
    return folder


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


def test_good_inputs_are_read(base: Path, tmp_path: Path) -> None:
    """The calls themselves work, so that what is refused is refused for its damage."""
    calls = [Input(i, target, "", Damage("none", lambda path, rng: None, False), 0) for i, target in enumerate(TARGETS)]

    def call(good: Input) -> int | None:
        shutil.copytree(base / good.target.name, tmp_path / str(good.number))
        return good.target.read(tmp_path / str(good.number))

    for good, outcome in forked(calls, call, workers=2, seconds=60, gib=GIB):
        assert outcome.status == 0, (good, outcome.errors)


def test_a_few_damaged_inputs(base: Path, tmp_path: Path) -> None:
    faults, _ = examine(base, tmp_path, SEED + 1, 40)
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_a_thousand_damaged_inputs(base: Path, tmp_path: Path) -> None:
    faults, statuses = examine(base, tmp_path, SEED, 1200)
    print(f"1200 damaged inputs: {statuses[2]} refused in one line, {statuses[0]} read, {len(faults)} faults")
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults)
    assert statuses[2] > 600
