"""What a text encoder is, and what it gives for each text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch


class Encoded(NamedTuple):
    """What a text encoder makes of one text.

    Args:
        tensors: `tokens` [n, D], n at least 1, without padding where the model masks padding; and `pooled` [E] if the model is
            conditioned on one.
        cut: whether the text was longer than the encoder's limit, so that its end is not in the tensors.
    """

    tensors: dict[str, torch.Tensor]
    cut: bool


class TextEncoder(Protocol):
    """Turns texts into embeddings. One with a method `free` is told when it is no longer needed."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever embeddings may: of tokenizers, weights, templates, the limit of tokens. Cheap: loads no weights."""
        ...

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """The embedding of each text, on the CPU, in the encoder's own dtype."""
        ...
