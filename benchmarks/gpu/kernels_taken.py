"""Which of PyTorch's attention kernels a call takes, seen where PyTorch dispatches to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _Attentions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1]
        if "attention" in name and "backward" not in name:
            self.seen[name.strip("_").removeprefix("scaled_dot_product_")] += 1
        return function(*args, **(kwargs or {}))


def attentions_of(function: Callable[[], object]) -> str:
    """`flash_attention x 4`: the attention operators that a call dispatches to, pyard's own included."""
    try:
        with _Attentions() as mode:
            function()
    except Exception as error:  # FlexAttention, for one, may refuse to be watched
        return f"not known: {type(error).__name__}"
    return ", ".join(f"{name} x {count}" for name, count in mode.seen.items()) or "no fused kernel"
