"""Counts of yes with confidence intervals, by category."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyard.data.captioned_scenes.prompt import Prompt
from pyard.data.captioned_scenes.vocabulary import CATEGORIES
from pyard.errors import InputError

_Z = 1.959963984540054  # the 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Proportion:
    """How many of several independent trials succeeded.

    Args:
        yes: successes.
        total: trials, at least 1.
    """

    yes: int
    total: int

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.yes <= self.total:
            raise InputError(f"{self.yes} of {self.total}; expected at least one trial, and no more successes than trials")

    @property
    def value(self) -> float:
        """The observed proportion."""
        return self.yes / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (Wilson 1927), which is sensible at 0, at 1 and for few trials."""
        n, p = self.total, self.value
        centre = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
        half = _Z / (1 + _Z * _Z / n) * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
        # At 0 and 1 the formula's bound is exact; rounding must not move it.
        return (0.0 if self.yes == 0 else centre - half, 1.0 if self.yes == n else centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def adherence(followed: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, Proportion]:
    """How often prompts were followed, by category and over `all`.

    Args:
        followed: bool [n], from `follow_prompts`.
        prompts: the n prompts.

    Returns:
        The categories that occur, in the order of `CATEGORIES`, then `all`.

    Raises:
        InputError: no prompts, or another number of them.
    """
    if followed.shape != (len(prompts),) or not len(prompts):
        raise InputError(f"{followed.shape} answers for {len(prompts)} prompts; expected one for each, and at least one")
    found = np.array([prompt.category for prompt in prompts])
    by_category = {name: followed[found == name] for name in CATEGORIES}
    groups = {name: answers for name, answers in by_category.items() if len(answers)} | {"all": followed}
    return {name: Proportion(int(answers.sum()), len(answers)) for name, answers in groups.items()}
