"""Damaged inputs of every kind are answered in one line or correctly, within 10 seconds and 2 GiB, and run no code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from covering import repetitions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory and asks /proc for it")

SEED = 2026


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("good")


def trial(base: Path, *words: object) -> dict[str, Any]:
    script = Path(__file__).with_name("damaged_trial.py")
    command = [sys.executable, str(script), str(base), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=2400)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_good_inputs_are_read(base: Path) -> None:
    found = trial(base, "good")
    assert not found["faults"], "\n".join(found["faults"])
    assert set(found["statuses"]) == {"0"}


@pytest.mark.slow
def test_damaged_inputs(base: Path) -> None:
    """1200 with PYARD_TEST_PRODUCTS=1."""
    count = repetitions(1200, in_ci=500)
    found = trial(base, "examine", SEED, count)
    refused, read = (found["statuses"].get(status, 0) for status in ("2", "0"))
    print(f"{count} damaged inputs: {refused} refused in one line, {read} read, {len(found['faults'])} faults")
    assert not found["faults"], f"{len(found['faults'])} faults:\n" + "\n".join(found["faults"])
    assert refused > count / 2
