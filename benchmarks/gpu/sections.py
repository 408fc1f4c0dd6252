"""The sections of the calls A and B, in the order in which they run, and what each may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POISONED = 70  # exit status of a worker whose CUDA context no longer answers


@dataclass(frozen=True)
class Section:
    """One table of results: `function` of `module` measures it within `limit_s`, at whose end what is left is left out."""

    module: str
    function: str
    limit_s: float


def _section(module: str, function: str, limit_s: float) -> Section:
    return Section(f"benchmarks.gpu.{module}", function, limit_s)


def part_path(parts: Path, section: str) -> Path:
    """Where a section's rows are."""
    return parts / f"{section.replace(' ', '_')}.json"


SECTIONS = {
    "ceilings": _section("operators", "ceilings", 10),
    "attention": _section("attention", "production", 20),
    "own blocks": _section("attention", "own_blocks", 6),
    "rows": _section("operators", "rows", 40),
    "attention shapes": _section("attention", "shapes", 30),
    "small": _section("operators", "small", 6),
    "linear and gelu": _section("operators", "gelu_of_linear", 6),
    "flex": _section("attention", "flex", 20),
    "training": _section("models", "training", 45),
    "training compiled": _section("models", "training_compiled", 50),
    "sampling": _section("models", "sampling", 35),
    "teacher": _section("models", "teacher", 25),
    "sampling compiled": _section("models", "sampling_compiled", 40),
    "text-to-image": _section("text_to_image", "text_to_image", 35),
    "reader": _section("data", "reader", 10),
    "trajectories": _section("data", "trajectories", 45),
}

# Seconds from its start within which a call has ended, its results written. The sections' limits add up to more, since most
# sections end before theirs.
CALL_LIMITS = {"A": 230.0, "B": 250.0, "C": 120.0}

# The checks of A run first, beside one another; these are the timings that follow them.
CALLS = {
    "A": ("ceilings", "attention", "own blocks", "rows", "attention shapes", "small", "linear and gelu", "flex"),
    "B": (
        *("ceilings", "training", "training compiled", "sampling", "teacher", "sampling compiled"),
        *("text-to-image", "reader", "trajectories"),
    ),
}
