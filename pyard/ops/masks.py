"""The masks M1-M4 of ARD (arXiv 2504.11295, figure 1b) as predicates: which blocks a block attends to.

Blocks are counted from x_T (block 0) towards x_0. Every fast implementation must agree with `visible` exactly.
"""

from __future__ import annotations

from typing import Literal, get_args

from pyard.errors import InputError

Mask = Literal["diagonal", "window", "anchor", "causal"]
MASKS: tuple[Mask, ...] = get_args(Mask)


def mask_number(mask: str) -> int:
    """A mask's number in the compiled operators: its index in `MASKS`. Strings leak memory in torch's stable ABI."""
    return MASKS.index(mask)  # type: ignore[arg-type]


def check_mask(mask: str, window: int | None) -> None:
    """Refuses unknown masks, a `window` mask without a width and a width with any other mask.

    Args:
        mask: One of `diagonal | window | anchor | causal`.
        window: number of blocks that a block attends to, including itself; only for `window`.

    Raises:
        InputError: Naming what was found and what is allowed.
    """
    if mask not in MASKS:
        raise InputError(f"mask is {mask!r}, expected one of {', '.join(MASKS)}")
    if mask == "window":
        if window is None or window < 1:
            raise InputError(f"mask 'window' needs window >= 1 (blocks seen, the own one included), found {window}")
    elif window is not None:
        raise InputError(f"window={window} is for mask 'window', found mask {mask!r}: leave window out")


def visible(mask: str, q_step: int, kv_step: int, window: int | None = None) -> bool:
    """Whether the tokens of block `q_step` attend to those of block `kv_step`.

    Args:
        mask: M1 `diagonal` (own block), M2 `window` (the last `window` blocks), M3 `anchor` (own block and block 0),
            M4 `causal` (own and all earlier blocks).
        q_step: Block of the query, from 0.
        kv_step: Block of the key, from 0.
        window: See `check_mask`.
    """
    check_mask(mask, window)
    if mask == "diagonal":
        return kv_step == q_step
    if mask == "anchor":
        return kv_step in (0, q_step)
    if mask == "window":
        assert window is not None
        return q_step - window < kv_step <= q_step
    return kv_step <= q_step


def visible_steps(mask: str, q_step: int, window: int | None = None) -> list[int]:
    """The blocks that block `q_step` attends to, in ascending order; the last one is `q_step` itself."""
    return [kv_step for kv_step in range(q_step + 1) if visible(mask, q_step, kv_step, window)]
