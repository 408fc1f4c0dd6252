"""Times on a GPU without waiting between calls, and rows that are on disk as soon as they are measured.

Some calls are captured into one CUDA graph, the graph is replayed several times without a pause, and events between the replays
are read at the end: the time has no share of Python's or of the launches', and the device never waits for the host. Where a
call cannot be captured, or where its launches are part of the question, groups of plain calls take the place of replays. On a
CPU one call is timed by the clock: there the question is only whether it runs.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.sections import POISONED

NO_TIME = "no time"
SLOW_MS = 500.0


@dataclass(frozen=True)
class Setting:
    """Where the sections run: `device` is `cuda` or `cpu`; `smoke` takes tiny sizes, since only whether it runs is asked."""

    device: str
    smoke: bool

    @property
    def half(self) -> torch.dtype:
        """bfloat16, or float32 in a smoke run: a CPU may have no instructions for the former."""
        return torch.float32 if self.smoke else torch.bfloat16


@dataclass(frozen=True)
class Time:
    """Of one call: the median in milliseconds, the spread of the groups (largest less smallest, over the median), and how."""

    ms: float
    spread: float
    method: str  # `graph`, `calls` or `clock`

    def row(self, prefix: str = "") -> dict[str, Any]:
        """As columns."""
        return {f"{prefix}ms": self.ms, f"{prefix}spread": self.spread, f"{prefix}method": self.method}


def time_call(function: Callable[[], object], device: str, *, graph: bool = True, budget_s: float = 0.3) -> Time:
    """The time of a call.

    Args:
        function: the work; its inputs stay where they are.
        device: `cuda` or `cpu`.
        graph: whether it may be captured; otherwise, and where that fails, groups of plain calls are timed.
        budget_s: about how long the timed calls may take; three groups are timed in any case, two of calls of half a second.
    """
    if device == "cpu":
        start_s = time.perf_counter()
        function()
        return Time((time.perf_counter() - start_s) * 1e3, 0.0, "clock")
    estimate_ms = _warm_up(function, torch.cuda.Stream() if graph else torch.cuda.current_stream())
    calls = max(1, min(50, math.ceil(2.0 / estimate_ms)))
    # Seconds of device time are dear: a call that takes one is timed twice.
    rounds = 2 if estimate_ms > SLOW_MS else max(3, min(30, round(budget_s * 1e3 / (calls * estimate_ms))))
    if graph:
        try:
            replay = captured(function, calls).replay
        except RuntimeError:
            torch.cuda.synchronize()
        else:
            return _time_groups(replay, calls, rounds, "graph")

    def group() -> None:
        for _ in range(calls):
            function()

    return _time_groups(group, calls, rounds, "calls")


def captured(function: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of some calls, which the function must have been warmed up for."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def _warm_up(function: Callable[[], object], stream: torch.cuda.Stream) -> float:
    """Calls that are not counted, on another stream where a capture follows; returns about how many milliseconds one takes."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles, loads, chooses algorithms
        stream.synchronize()
        start_s = time.perf_counter()
        function()
        stream.synchronize()
        first_ms = (time.perf_counter() - start_s) * 1e3
        if first_ms < SLOW_MS:
            for _ in range(2):
                function()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what torch keeps for one stream is of no use to another
    return max(first_ms, 1e-3)


def _time_groups(group: Callable[[], object], calls: int, rounds: int, method: str) -> Time:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    group()
    events[0].record()
    for event in events[1:]:
        group()
        event.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) / calls for before, after in itertools.pairwise(events)]
    median = statistics.median(times)
    return Time(median, (max(times) - min(times)) / median, method)


class NotTakenError(Exception):
    """A way that does not exist for some input: its row says so and is no failure."""


class Results:
    """Rows of one section, written after each, so that a time limit costs only what is not measured yet.

    Args:
        path: the JSON file; rows that it has are kept and not measured again.
        section: its name.
        deadline_s: of `time.monotonic`; rows that come after it are left out.
        smoke: whether rows take no time worth estimating.
    """

    def __init__(self, path: Path, section: str, deadline_s: float, smoke: bool = False):
        self.path, self.section, self.deadline_s, self.smoke = path, section, deadline_s, smoke
        self.rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []

    def measure(self, name: str, run: Callable[[], dict[str, Any]], needs_s: float = 0.0) -> None:
        """Adds a row: what `run` returns, or the error that it raised, since one failure must not cost the rest.

        Args:
            name: of the row.
            run: measures it.
            needs_s: about how long it takes; it is left out where less time is left.
        """
        if any(row["name"] == name for row in self.rows):
            return
        if time.monotonic() + (0 if self.smoke else needs_s) > self.deadline_s:
            self._add({"name": name, "left_out": NO_TIME})
            return
        start_s = time.monotonic()
        try:
            row = {"name": name, **run()}
        except NotTakenError as reason:
            row = {"name": name, "left_out": str(reason)}
        except Exception as error:
            first_line = str(error).splitlines()[0] if str(error) else ""
            row = {"name": name, "error": f"{type(error).__name__}: {first_line}"[:300]}
        row["took_s"] = round(time.monotonic() - start_s, 2)
        self._add(row)
        gc.collect()
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:  # an illegal address: every later call in this process would fail, too
                raise SystemExit(POISONED) from None

    def summary(self) -> str:
        """`ok`, or how many rows failed and how many were left out for want of time."""
        failed = sum("error" in row for row in self.rows)
        late = sum(row.get("left_out") == NO_TIME for row in self.rows)
        found = [f"{failed} rows failed"] * bool(failed) + [f"{late} rows left out: no time"] * bool(late)
        return ", ".join(found) or "ok"

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(self.section, json.dumps(row), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"section": self.section, "rows": self.rows}) + "\n", encoding="utf-8")
        partial.replace(self.path)


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """Fills in `peak_memory_gb`: the most that torch had allocated inside the block, what was there before included."""
    peak: dict[str, float] = {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield peak
    if device == "cuda":
        peak["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
