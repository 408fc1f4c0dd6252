"""The output layers of a diffusers transformer as a head, of which a student has one, or one for each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pyard.models.backbone import apply_heads
from pyard.models.wrapped.current_pass import CurrentPass


class OutputLayers(nn.Module):
    """The layers after the last block.

    Args:
        layers: modules or parameter tables, by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module | nn.Parameter]):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


class LayerSlot(nn.Module):
    """Replaces an output layer in the transformer, and runs the layer of the current pass's heads.

    Args:
        name: name of the layer in `OutputLayers`.
        current: the pass.
    """

    def __init__(self, name: str, current: CurrentPass):
        super().__init__()
        self.name, self.current = name, current

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        layers = [getattr(head, self.name) for head in self.current.heads]
        # Trained output layers are float32, whatever dtype the frozen blocks below them have.
        dtype = next((parameter.dtype for parameter in layers[0].parameters()), None)
        if dtype is not None:
            args = tuple(_cast(tensor, dtype) for tensor in args)
            kwargs = {name: _cast(tensor, dtype) for name, tensor in kwargs.items()}
        if len(layers) == 1:
            output: torch.Tensor = layers[0](*args, **kwargs)
            return output
        return apply_heads([_named(layer, len(args), tuple(kwargs)) for layer in layers], *args, *kwargs.values())


class TableSlot(nn.Module):
    """Replaces a parameter table [n, D] in the transformer, which uses its `table[None]` and its device.

    Args:
        name: name of the table in `OutputLayers`.
        current: the pass.
    """

    def __init__(self, name: str, current: CurrentPass):
        super().__init__()
        self.name, self.current = name, current

    def __getitem__(self, index: None) -> torch.Tensor:  # [1, n, D], or a row's own [B*S, n, D]
        tables = torch.stack([getattr(head, self.name) for head in self.current.heads])
        return tables if len(tables) == 1 else tables.repeat(self.current.samples, 1, 1)

    @property
    def device(self) -> torch.device:
        """The device of the table."""
        device: torch.device = getattr(self.current.heads[0], self.name).device
        return device


def take_output(transformer: nn.Module, places: Mapping[str, str], current: CurrentPass) -> OutputLayers:
    """Replace a transformer's output layers by slots.

    Args:
        transformer: changed in place.
        places: paths in the transformer, by name in `OutputLayers`.
        current: the pass that the slots use.

    Returns:
        The layers that were replaced.
    """
    layers: dict[str, nn.Module | nn.Parameter] = {}
    for name, path in places.items():
        owner, own = _owner(transformer, path)
        layer = layers[name] = getattr(owner, own)
        delattr(owner, own)
        owner.add_module(own, TableSlot(name, current) if isinstance(layer, nn.Parameter) else LayerSlot(name, current))
    return OutputLayers(layers)


def put_output(transformer: nn.Module, places: Mapping[str, str], head: nn.Module) -> None:
    """The reverse of `take_output`, in place."""
    for name, path in places.items():
        owner, own = _owner(transformer, path)
        layer = getattr(head, name)
        delattr(owner, own)
        if isinstance(layer, nn.Parameter):
            owner.register_parameter(own, layer)
        else:
            owner.add_module(own, layer)


def _owner(transformer: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, own = path.rpartition(".")
    return transformer.get_submodule(parent), own


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _named(layer: nn.Module, unnamed: int, names: tuple[str, ...]) -> Callable[..., Any]:
    """Call the layer with its last arguments by position."""
    return lambda *rows: layer(*rows[:unnamed], **dict(zip(names, rows[unnamed:], strict=True)))
