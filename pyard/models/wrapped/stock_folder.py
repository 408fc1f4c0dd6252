"""Writes a student without a history in diffusers' formats: a transformer's folder, a LoRA file, or a PEFT adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyard.models.student import Student
from pyard.models.wrapped.backbone import WrappedBackbone
from pyard.models.wrapped.low_rank import Factors, LowRank, low_rank, stored_factors

LORA_NAME = "pytorch_lora_weights.safetensors"
ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors")


def backbone_of(student: Student) -> WrappedBackbone:
    """The backbone of a student that was made from a diffusers transformer."""
    assert isinstance(student.trunk, WrappedBackbone)
    return student.trunk


def save_transformer(student: Student, folder: Path) -> None:
    """Write the folder of a diffusers transformer: `config.json` and `diffusion_pytorch_model.safetensors`, or its shards."""
    backbone = backbone_of(student)
    transformer = empty_transformer(backbone)
    transformer.load_state_dict(_contiguous(backbone.stock_state(student.heads[0])), assign=True)
    transformer.to(backbone.dtype)  # heads may have been trained in float32 over blocks in bfloat16
    transformer.save_pretrained(str(folder))


def empty_transformer(backbone: WrappedBackbone) -> Any:
    """The diffusers transformer of a backbone's configuration, without weights."""
    with backbone.without_weights():
        return backbone._new(backbone.config.transformer)


def student_additions(student: Student, base: nn.Module, file: Path | None = None, rank: int | None = None) -> LowRank:
    """The difference between a student and the transformer that it was made from, as low-rank additions.

    Args:
        student: a student with one head.
        base: the transformer of its teacher's pipeline, in the student's dtype.
        file: file of the student's weights, which may contain the additions; None: it does not.
        rank: largest rank to keep; see `low_rank`.

    Raises:
        InputError: the student cannot be expressed by low-rank additions.
    """
    backbone = backbone_of(student)
    tensors = base.state_dict()
    linear = frozenset(name for name, module in base.named_modules() if isinstance(module, nn.Linear))
    state = backbone.on_base(backbone.stock_state(student.heads[0]), tensors)
    places = {f"heads.0.{name}": path for name, path in backbone.output_places.items()}
    stored = {} if file is None else stored_factors(file, {**places, "trunk.transformer.": ""})
    return low_rank(state, tensors, linear=linear, rank=rank, stored=stored)


def save_lora(additions: LowRank, pipeline: type[Any], folder: Path) -> None:
    """Write `pytorch_lora_weights.safetensors`, which the pipeline's `load_lora_weights` reads.

    Args:
        additions: additions by layer of the transformer.
        pipeline: diffusers' class of the pipeline.
        folder: an existing folder.
    """
    pipeline.save_lora_weights(
        str(folder),
        transformer_lora_layers=_tensors(additions.factors),
        transformer_lora_adapter_metadata=_lora_config(additions),
    )


def save_adapter(additions: LowRank, folder: Path) -> None:
    """Write an adapter folder for `peft.PeftModel.from_pretrained(transformer, folder)`."""
    from safetensors.torch import save_file

    config = {**_lora_config(additions), "peft_type": "LORA", "task_type": None, "inference_mode": True}
    tensors = {f"base_model.model.{name}": tensor for name, tensor in _tensors(additions.factors).items()}
    (folder / ADAPTER_NAMES[0]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / ADAPTER_NAMES[1], metadata={"format": "pt"})


def with_targets(additions: LowRank, base: nn.Module) -> LowRank:
    """The additions, and empty ones for layers that PEFT would confuse with them, because it matches the ends of names."""
    missing = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
        and name not in additions.factors
        and any(name.endswith(f".{target}") for target in additions.factors)
    }
    empty = {
        name: Factors(module.weight.new_zeros(1, module.in_features), module.weight.new_zeros(module.out_features, 1))
        for name, module in missing.items()
    }
    return dataclasses.replace(additions, factors={**additions.factors, **empty})


def _tensors(factors: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    found = {}
    for name, pair in factors.items():
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = pair.down, pair.up
    return _contiguous(found)


def _lora_config(additions: LowRank) -> dict[str, Any]:
    """Settings of PEFT's LoraConfig; every layer's alpha equals its rank, so additions have weight 1."""
    ranks = additions.ranks
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    # ^ as in diffusers: the whole name, not its end.
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
