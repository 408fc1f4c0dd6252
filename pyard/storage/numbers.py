"""Numbers that come from files and callers: checked before anything is computed or allocated with them."""

from __future__ import annotations

import math
import operator
from typing import Any

from pyard.errors import InputError


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """A whole number of any kind (Python's, numpy's) as a Python int; an InputError names what is out of range."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}; expected a whole number") from None
    if not low <= found <= high:
        raise InputError(f"{name} is {found}; expected {low} to {high}")
    return found


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number of any kind as a Python float (an int stays one); an InputError names what is out of range."""
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        found = value if type(value) in (int, float) else float(value)
        float(found)
    except OverflowError:
        raise InputError(f"{name} is a number of {len(str(value))} digits; expected one that a float can hold") from None
    except (TypeError, ValueError):
        raise InputError(f"{name} is {value!r}; expected a number") from None
    if not math.isfinite(found) or not low <= found <= high:
        bounds = "a finite number" if math.isinf(high) else f"{low:g} to {high:g}"
        raise InputError(f"{name} is {found:g}; expected {bounds}")
    return found  # type: ignore[no-any-return]
