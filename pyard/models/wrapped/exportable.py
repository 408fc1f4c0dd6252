"""Functions that diffusers transformers call, in a form that torch.export and ONNX can express.

Some of them rotate queries and keys with `view_as_complex`, a product, and `view_as_real`, but ONNX has no complex numbers.
Within `ExportableCalls`, the same unchanged code computes the product with pairs of real numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Rotation:
    """Pairs of real numbers that represent complex ones, with the operations that rotary embeddings use.

    Args:
        pairs: float32 [..., 2], real and imaginary parts.
    """

    def __init__(self, pairs: torch.Tensor):
        self.pairs = pairs

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Torch only passes an argument that is not a tensor to a mode if it has this method.
        return NotImplemented

    def unsqueeze(self, dim: int) -> Rotation:
        """Insert a dimension before `dim`, which is counted from the front."""
        return Rotation(self.pairs.unsqueeze(dim))

    def __mul__(self, other: Rotation) -> Rotation:
        a, b = self.pairs.unbind(-1)
        c, d = other.pairs.unbind(-1)
        return Rotation(torch.stack([a * c - b * d, a * d + b * c], dim=-1))


class ExportableCalls(TorchFunctionMode):
    """A context where `view_as_complex` gives a `Rotation`, `view_as_real` its pairs, and `as_tensor` keeps sizes symbolic."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.view_as_complex:
            return Rotation(args[0])
        if func is torch.view_as_real and isinstance(args[0], Rotation):
            return args[0].pairs
        if func is torch.as_tensor and isinstance(args[0], torch.SymInt):
            return torch.scalar_tensor(args[0], dtype=torch.int64)  # type: ignore[arg-type]
        return func(*args, **(kwargs or {}))
