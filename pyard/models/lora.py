"""Low-rank training of a student (Hu et al. 2021) through PEFT: the blocks' matrices get small trainable additions."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from pyard.errors import InputError
from pyard.models.student_config import LoraHeads
from pyard.storage.trained import sharing

if TYPE_CHECKING:
    from pyard.models.student import Student


@dataclass(frozen=True)
class LoraSettings:
    """The settings of a student's low-rank additions.

    Args:
        rank: rank of the additions; alpha equals the rank, so they have weight 1.
        heads: how the output layers are trained: all their weights (`whole`), low-rank additions to their linear layers
            (`lora`), or not at all (`frozen`). With the last two, a stock LoRA can express the student.
    """

    rank: int
    heads: LoraHeads = "whole"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora_rank is {self.rank}; expected at least 1")
        if self.heads not in get_args(LoraHeads):
            raise InputError(f"lora_heads is {self.heads!r}; expected one of {', '.join(get_args(LoraHeads))}")


def add_lora(student: Student, rank: int, heads: LoraHeads = "whole") -> None:
    """Freeze a student's blocks and embeddings and add trainable matrices of this rank to the linear layers of its blocks.

    The additions start at zero, so the student's results do not change. The trained tensors are the additions, the output
    layers as `heads` says, and the history's bias; they are float32, whatever dtype the frozen weights have.

    Args:
        student: changed in place.
        rank, heads: as in `LoraSettings`.

    Raises:
        InputError: PEFT is not installed, the rank is below 1, or the blocks have no linear layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("lora_rank needs PEFT; install it with: pip install 'peft>=0.17'") from None
    settings = LoraSettings(rank, heads)
    targets = student.trunk.lora_targets()
    if not targets:
        raise InputError(f"lora_rank: the blocks of {type(student.trunk).__name__} have no linear layers")
    student.trunk.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), student.trunk)
    student.heads.requires_grad_(heads == "whole")
    if heads == "lora":
        layers = [name for name, layer in student.heads.named_modules() if isinstance(layer, nn.Linear)]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), student.heads)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    student.lora = settings


def merge_lora(student: Student) -> None:
    """Merge the low-rank matrices into the weights they belong to, so that the student has none and all of it is trainable.

    The sums are new tensors, so weights that are shared with a teacher or another student do not change.

    Args:
        student: changed in place; unchanged if it has no additions.
    """
    merge_adapters(student.trunk)
    merge_adapters(student.heads)
    student.requires_grad_(True)
    student.lora = None


def merged(student: Student) -> Student:
    """A student with merged weights, which shares all other weights with this student."""
    with sharing([*student.parameters(), *student.buffers()]):
        whole = copy.deepcopy(student)
    merge_lora(whole)
    return whole


def merge_adapters(module: nn.Module) -> None:
    """Merge the low-rank matrices of PEFT's layers into their weights, and replace these layers by plain ones, in place."""
    layers: dict[str, Any] = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    for name, layer in layers.items():
        plain = layer.get_base_layer()
        for own, parameter in list(plain.named_parameters(recurse=False)):
            setattr(plain, own, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, plain)
