"""What the modules inside a wrapped transformer need to know of the pass that runs: its history, its heads, its tokens."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from pyard.models.history import History


@dataclass
class CurrentPass:
    """Shared by a backbone with the attentions and output layers inside its transformer.

    Attributes:
        history: what the lowest attentions remember; None: nothing.
        heads: output layers of the pass's steps; one entry: the same for all.
        samples: B; rows are B * S, a sample's steps side by side.
        tokens: T, image tokens of a row.
    """

    history: History | None = None
    heads: Sequence[nn.Module] = field(default_factory=tuple)
    samples: int = 0
    tokens: int = 0

    @contextlib.contextmanager
    def running(self, history: History | None, heads: Sequence[nn.Module], samples: int, tokens: int) -> Iterator[None]:
        """The pass inside the `with` block; what ran around it goes on after it."""
        before = self.history, self.heads, self.samples, self.tokens
        self.history, self.heads, self.samples, self.tokens = history, heads, samples, tokens
        try:
            yield
        finally:
            self.history, self.heads, self.samples, self.tokens = before

    def again(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Makes a context in which the pass that runs now runs again, for what is recomputed after it ended."""
        return functools.partial(self.running, self.history, self.heads, self.samples, self.tokens)
