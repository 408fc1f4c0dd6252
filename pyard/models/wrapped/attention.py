"""A history for the self-attentions of any diffusers transformer, without changes to its code.

All of them end in scaled_dot_product_attention, after QK norm and rotary embedding. While one of the lowest N blocks'
attentions runs, the image keys and values of earlier steps are prepended to the arguments of that call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyard.errors import InputError
from pyard.models.history import History
from pyard.models.wrapped.current_pass import CurrentPass


def remember(attention: nn.Module, place: Place) -> None:
    """Let an attention module see the history; its weights, their names and its code do not change."""
    attention.__class__ = _remembering(type(attention))  # type: ignore[arg-type]
    attention.history_place = place  # type: ignore[assignment]


class Place:
    """The position of a self-attention in the network.

    Args:
        current: the pass that is running.
        block: number of its block, in order of execution.
        attention: its number among all self-attentions, in order of execution.
        image_first: whether image tokens come before the text tokens, or after them.
    """

    def __init__(self, current: CurrentPass, block: int, attention: int, image_first: bool):
        self.current, self.block, self.attention, self.image_first = current, block, attention, image_first


@functools.cache
def _remembering(kind: type[nn.Module]) -> type[nn.Module]:
    class Remembering(kind):  # type: ignore[misc, valid-type]
        history_place: Place

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            place = self.history_place
            history = place.current.history
            if history is None or place.block >= history.layers:
                return super().forward(*args, **kwargs)
            calls: list[None] = []  # one for each; torch.compile does not show what a mode counts in its attributes
            with _WithHistory(history, place, calls):
                output = super().forward(*args, **kwargs)
            if len(calls) != 1:
                raise InputError(
                    f"history: {kind.__name__} called scaled_dot_product_attention {len(calls)} times, expected once: an "
                    "attention backend or cache that bypasses it cannot see earlier steps; use the native backend, and no cache"
                )
            place.current.attended.append(None)
            return output

    Remembering.__name__, Remembering.__qualname__ = f"Remembering{kind.__name__}", f"Remembering{kind.__qualname__}"
    return Remembering


class _WithHistory(TorchFunctionMode):
    """A context in which scaled_dot_product_attention is replaced by `History.attend_rows`."""

    def __init__(self, history: History, place: Place, calls: list[None]):
        super().__init__()
        self.history, self.place, self.calls = history, place, calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:
            return torch.unflatten(*args, **kwargs)  # the method is written in Python, and torch.compile cannot follow it here
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls.append(None)
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        tokens = self.place.current.tokens
        image = slice(0, tokens) if self.place.image_first else slice(key.shape[2] - tokens, key.shape[2])
        if is_causal or dropout_p:
            raise InputError("history: this attention is causal or has dropout; expected neither")
        return self.history.attend_rows(
            self.place.attention, query, key, value, image=image, attn_mask=attn_mask, scale=scale
        )  # fmt: skip
