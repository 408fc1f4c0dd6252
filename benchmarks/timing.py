"""Times rivals side by side: in turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

Clock = Literal["wall", "cpu"]
# `cpu` counts this process's own time on a processor: with one thread it is what `wall` shows on an idle machine.
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Measurement:
    """One piece of work and everybody who did it.

    Args:
        name: what was done.
        ours: the rival that the ratios are of.
        flops, bytes: what the work needs at least: multiplications and additions, memory read and written.
        seconds: by rival, one time per round.
    """

    name: str
    ours: str
    flops: float = 0.0
    bytes: float = 0.0
    aim: dict[str, float] = field(default_factory=dict)  # rival -> speed-up to reach
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, rival: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[rival])

    def speedup(self, rival: str) -> float:
        """How many times faster ours is: the median over the rounds of the ratio within a round."""
        return statistics.median(b / a for a, b in zip(self.seconds[self.ours], self.seconds[rival], strict=True))


def measure(measurement: Measurement, rivals: dict[str, Callable[[], object]], rounds: int, clock: Clock) -> Measurement:
    """Fills in `seconds`: one untimed round, then `rounds` rounds in which everybody works once."""
    read = CLOCKS[clock]
    measurement.seconds = {name: [] for name in rivals}
    for round_ in range(rounds + 1):
        for name, work in rivals.items():
            start = read()
            work()
            if round_:
                measurement.seconds[name].append(read() - start)
    return measurement


@dataclass(frozen=True)
class Rates:
    """What this machine can do, measured in the same run.

    Args:
        sgemm: FLOP/s of torch's float32 matrix product at the shape of a DiT-S/2's MLP.
        memcpy: bytes/s read and written by a copy that leaves every cache.
    """

    sgemm: float
    memcpy: float

    def floor(self, measurement: Measurement) -> float:
        """Seconds below which the work cannot be done at these rates."""
        return max(measurement.flops / self.sgemm, measurement.bytes / self.memcpy)


def measure_rates(rounds: int, clock: Clock) -> Rates:
    """The fastest of some repetitions: a rate is a property of the machine, not of what else it does."""
    rows, inner, columns = 4096, 384, 1536
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    source, destination = torch.empty(48 << 18), torch.empty(48 << 18)  # 48 MiB each
    measurement = measure(
        Measurement("rates", "sgemm"),
        {"sgemm": lambda: torch.nn.functional.linear(x, weight), "memcpy": lambda: destination.copy_(source)},
        rounds,
        clock,
    )
    sgemm = 2 * rows * inner * columns / min(measurement.seconds["sgemm"])
    memcpy = 2 * 4 * source.numel() / min(measurement.seconds["memcpy"])
    return Rates(sgemm, memcpy)
