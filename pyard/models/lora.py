"""Low-rank training of a student (Hu et al. 2021) through PEFT: the blocks' matrices get small trainable additions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from pyard.errors import InputError

if TYPE_CHECKING:
    from pyard.models.student import Student


def add_lora(student: Student, rank: int) -> None:
    """Freeze a student's blocks and embeddings and add trainable matrices of this rank to every linear layer of its blocks.

    The additions start at zero, so the student computes what it did. Heads and the history's bias, which are new to a student
    and small, are trained in full.

    Args:
        student: changed in place.
        rank: of the additions; alpha is the rank too, so that they enter with weight 1.

    Raises:
        InputError: PEFT is not installed, a rank below 1, or blocks without linear layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("lora_rank needs PEFT; install it with: pip install 'peft>=0.17'") from None
    if rank < 1:
        raise InputError(f"lora_rank is {rank}; expected at least 1")
    targets = student.trunk.lora_targets()
    if not targets:
        raise InputError(f"lora_rank: the blocks of {type(student.trunk).__name__} have no linear layers")
    student.trunk.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), student.trunk)
    # Over a base in bfloat16, too: the updates of what is trained would vanish in it.
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merge_lora(student: Student) -> None:
    """Add the low-rank matrices to the weights they belong to: the student is a plain one again, all of it trainable.

    Args:
        student: changed in place; left alone if it has no additions.
    """
    merge_adapters(student.trunk)
    student.requires_grad_(True)


def merge_adapters(module: nn.Module) -> None:
    """Add the low-rank matrices of PEFT's layers to their weights, and put plain layers back, in place."""
    layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        base.weight.data = base.weight.data.clone()  # its memory may be the teacher's, too
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, layer.get_base_layer())
