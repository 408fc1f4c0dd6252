"""The state of the running pass that modules inside a wrapped transformer need: its history, heads and tokens."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from pyard.models.history import History


@dataclass
class CurrentPass:
    """State that a backbone shares with the attentions and output layers inside its transformer.

    Attributes:
        history: the history of the lowest attentions; None: there is none.
        heads: output layers for each step of the pass; a single entry is used for all steps.
        samples: B; there are B * S rows, in which the steps of a sample are consecutive.
        tokens: T, the number of image tokens in a row.
        attended: an entry for each attention that has seen the history in this pass.
    """

    history: History | None = None
    heads: Sequence[nn.Module] = field(default_factory=tuple)
    samples: int = 0
    tokens: int = 0
    attended: list[None] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self, history: History | None, heads: Sequence[nn.Module], samples: int, tokens: int) -> Iterator[None]:
        """Set the state for the pass inside the `with` block, and restore the previous state after it."""
        before = self.history, self.heads, self.samples, self.tokens, self.attended
        self.history, self.heads, self.samples, self.tokens, self.attended = history, heads, samples, tokens, []
        try:
            yield
        finally:
            self.history, self.heads, self.samples, self.tokens, self.attended = before

    def again(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Return a function that makes a context with the state of the current pass, to recompute parts of it later."""
        return functools.partial(self.running, self.history, self.heads, self.samples, self.tokens)
