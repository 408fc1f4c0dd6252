from __future__ import annotations

import pytest

from pyard.errors import InputError
from pyard.ops import check_mask, visible, visible_steps

# Rows are queries, columns keys; as drawn in figure 1b of the paper, window 2.
FIGURE = {
    "diagonal": ["1000", "0100", "0010", "0001"],
    "window": ["1000", "1100", "0110", "0011"],
    "anchor": ["1000", "1100", "1010", "1001"],
    "causal": ["1000", "1100", "1110", "1111"],
}


@pytest.mark.parametrize("mask", FIGURE)
def test_masks_are_those_of_the_figure(mask: str) -> None:
    window = 2 if mask == "window" else None
    for q_step, row in enumerate(FIGURE[mask]):
        expected = [kv_step for kv_step, seen in enumerate(row) if seen == "1"]
        assert [kv_step for kv_step in range(4) if visible(mask, q_step, kv_step, window)] == expected
        assert visible_steps(mask, q_step, window) == expected


def test_wide_windows_are_causal_and_narrow_ones_diagonal() -> None:
    for q_step in range(6):
        assert visible_steps("window", q_step, 6) == visible_steps("causal", q_step)
        assert visible_steps("window", q_step, 1) == visible_steps("diagonal", q_step)


@pytest.mark.parametrize(
    ("mask", "window", "message"),
    [
        ("full", None, "mask is 'full', expected one of diagonal, window, anchor, causal"),
        ("window", None, "needs window >= 1"),
        ("window", 0, "found 0"),
        ("causal", 2, "window=2 is for mask 'window', found mask 'causal'"),
    ],
)
def test_wrong_masks_are_named(mask: str, window: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_mask(mask, window)
