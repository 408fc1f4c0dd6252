"""Times on a GPU by events, on a CPU by the clock; results as JSON, one file per step of gpu_check.sh."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def options(description: str) -> argparse.Namespace:
    """The flags of every step."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does every line run?")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    return parser.parse_args()


def median_ms(function: Callable[[], object], device: str, budget_s: float = 0.5) -> float:
    """The median time of a call in milliseconds, after three calls that are not counted; on a CPU, one call: it ran."""
    if device == "cpu":
        start_s = time.perf_counter()
        function()
        return (time.perf_counter() - start_s) * 1e3
    for _ in range(3):
        function()
    times = []
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stop = time.perf_counter() + budget_s
    while len(times) < 100 and (len(times) < 5 or time.perf_counter() < stop):
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


class Results:
    """Rows of one step, written after each, so that a time limit costs only what is not measured yet."""

    def __init__(self, path: Path, step: str):
        self.path, self.step = path, step
        self.rows: list[dict[str, Any]] = []

    def measure(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Adds a row: what `run` returns, or the error that it raised, since one failure must not cost the rest."""
        try:
            row = {"name": name, **run()}
        except Exception as error:
            row = {"name": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.rows.append(row)
        print(self.step, json.dumps(row), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"step": self.step, "rows": self.rows}, indent=2) + "\n", encoding="utf-8")
