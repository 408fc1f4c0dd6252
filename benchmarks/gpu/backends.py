"""Which backends are compared: all that pyard.ops names, so that a new one needs no line here."""

from __future__ import annotations

from pyard import ops

# `auto` and `sdpa` stand for one of the rest; FlexAttention compiles for each shape and is measured by itself.
_NOT_COMPARED: tuple[ops.Backend, ...] = ("auto", "sdpa", "flex")
_PLAIN: ops.Backend = "reference"


def attention_backends() -> list[ops.Backend]:
    """For attention and whole models, the plain one first."""
    others = [name for name in ops.BACKENDS if name not in (_PLAIN, *_NOT_COMPARED)]
    return [_PLAIN, *others]


def row_backends(smoke: bool) -> list[tuple[str, ops.Backend, bool]]:
    """For operators that are not attention: name of the way, backend, and whether it is compiled by `torch.compile`."""
    ways: list[tuple[str, ops.Backend, bool]] = [("native", "native", False), ("plain", _PLAIN, False)]
    return ways if smoke else [*ways, ("plain compiled", _PLAIN, True)]
