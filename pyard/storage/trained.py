"""What training changes of a module, and what copies of it can share: all that is frozen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


@contextlib.contextmanager
def sharing(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """While the block runs, copies of modules (`copy.deepcopy`) share these tensors; parameters among them are frozen there."""
    shared = list(tensors)
    for tensor in shared:
        tensor.__deepcopy__ = functools.partial(_shared, tensor)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for tensor in shared:
            del tensor.__deepcopy__


def _shared(tensor: torch.Tensor, memo: object) -> torch.Tensor:
    plain = tensor.detach()
    return nn.Parameter(plain, requires_grad=False) if isinstance(tensor, nn.Parameter) else plain


def shareable(module: nn.Module) -> list[torch.Tensor]:
    """What copies of a module can share while it trains: its frozen parameters, and with them its buffers, which are constants.

    A module without frozen parameters shares nothing.
    """
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    return [*frozen, *module.buffers()] if frozen else []


def trained_names(module: nn.Module) -> list[str]:
    """The tensors of a module's state that training can change: all of them, or the trained parameters where some are frozen.

    Then buffers are left out as well: they are constants, and come back with the frozen parameters.
    """
    parameters = dict(module.named_parameters())
    if all(parameter.requires_grad for parameter in parameters.values()):
        return list(module.state_dict())
    return [name for name, parameter in parameters.items() if parameter.requires_grad]


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained of a module, or of what an EMA averages (`trained_names`), on the CPU."""
    module = module.module if isinstance(module, AveragedModel) else module
    state = module.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    addresses: set[int] = set()
    for name in trained_names(module):
        kept = state[name].detach().cpu().contiguous()
        # safetensors refuses a weight that has two names, such as T5's embedding.
        tensors[name] = kept.clone() if kept.data_ptr() in addresses else kept
        addresses.add(kept.data_ptr())
    return tensors


def load_trained(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore what `tensors_of` returned.

    Raises:
        RuntimeError: tensors that are missing, unknown or of another size.
    """
    missing = sorted(set(trained_names(module)) - tensors.keys())
    unknown = sorted(tensors.keys() - module.state_dict().keys())
    if missing or unknown:
        raise RuntimeError(f"missing tensors: {missing[:3]}; unknown tensors: {unknown[:3]}")
    module.load_state_dict(dict(tensors), strict=False)
