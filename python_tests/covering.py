"""Which settings of a product to test where all of them would take too long."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest

_EVERYTHING = os.environ.get("PYARD_TEST_PRODUCTS") == "1"

# For what other tests cover, in other combinations, and what would take CI too long.
with_products = pytest.mark.skipif(not _EVERYTHING, reason="runs with PYARD_TEST_PRODUCTS=1")


def repetitions(most: int, in_ci: int) -> int:
    """How often to repeat a random trial, such as a kill: `most` with PYARD_TEST_PRODUCTS=1, else `in_ci`."""
    return most if _EVERYTHING else in_ci


def covering(product: list[dict[str, Any]], together: int = 2) -> list[dict[str, Any]]:
    """Settings of a product in which every two (or `together`) values occur that do so anywhere in it, picked greedily.

    With PYARD_TEST_PRODUCTS=1, the whole product.
    """
    if _EVERYTHING:
        return product
    groups = [set(itertools.combinations(sorted((k, str(v)) for k, v in one.items()), together)) for one in product]
    left, picked = set().union(*groups), []
    while left:
        best = max(range(len(product)), key=lambda i: len(groups[i] & left))
        picked.append(product[best])
        left -= groups[best]
    return picked
