"""Adding a published LoRA to a diffusers transformer: one of its pipeline's loader, or an adapter folder of PEFT."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyard.errors import InputError
from pyard.models.pretrained import PICKLED_WEIGHTS
from pyard.models.wrapped.low_rank import Factors
from pyard.storage.numbers import whole_number
from pyard.storage.pickles import read_pickle, require_sound
from pyard.storage.reading import read_object
from pyard.storage.tensor_files import read_safetensors, require_finite

# diffusers' own name of a LoRA, and parts of names that are no LoRA's.
_USUAL_NAME = "pytorch_lora_weights"
_OTHER_FILES = ("scheduler", "optimizer", "checkpoint")
# How PEFT can initialise factors without changing the weights to which they are added.
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva")
_MERGE_IT = "merge it into the transformer with PEFT (merge_and_unload), save that, and give it as the transformer"


@dataclass(frozen=True)
class MergedLora:
    """What a LoRA changed of a transformer.

    Attributes:
        factors: what it added to linear layers, by the name of the layer.
        others: what it changed besides, which no such addition expresses: names with the kind of the change.
    """

    factors: Mapping[str, Factors]
    others: tuple[str, ...] = ()


def add_stock_lora(transformer: Any, pipeline: type[Any], path: Path) -> MergedLora:
    """Add a LoRA to the weights of a transformer, in place.

    Args:
        transformer: the transformer, as read.
        pipeline: class of its diffusers pipeline, whose loader reads the LoRA file.
        path: a LoRA that the pipeline's `load_lora_weights` reads, or an adapter folder of PEFT.

    Returns:
        What was changed.

    Raises:
        InputError: there is no LoRA, or it is for another model.
    """
    if not path.exists():
        raise InputError(f"lora {path}: no such file or folder")
    if (path / "adapter_config.json").is_file():
        return _add_peft_adapter(transformer, path)
    if not hasattr(pipeline, "lora_state_dict"):
        raise InputError(f"lora {path}: {pipeline.__name__} does not read LoRA files; expected an adapter folder of PEFT")
    before = {name: id(module) for name, module in transformer.named_modules()}
    file = path if path.is_file() else _only_lora(path)
    if file.suffix == ".safetensors":
        tensors = read_safetensors(file)
        require_finite(tensors, file)
        _require_transformer_alone(tensors, file)
    else:
        require_sound(file)
    try:
        # Some files have the weights of their additions (alpha) as tensors, others in their metadata.
        has_alphas = "network_alphas" in inspect.signature(pipeline.load_lora_into_transformer).parameters
        state, *alphas, metadata = pipeline.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            local_files_only=True,
            return_lora_metadata=True,
            **({"return_alphas": True} if has_alphas else {}),
        )
        _require_transformer_alone(state, file)  # pickles, too
        pipeline.load_lora_into_transformer(state, *alphas, transformer=transformer, metadata=metadata)
    except InputError:
        raise
    except Exception as error:  # as in read_pretrained
        raise InputError(f"lora {path}: {pipeline.__name__} cannot read it: {' '.join(str(error).split())[:300]}") from None
    if before == {name: id(module) for name, module in transformer.named_modules()}:
        raise InputError(f"lora {path}: none of its layers belongs to this {type(transformer).__name__}")
    found = _loaded(transformer)
    transformer.fuse_lora()
    transformer.unload_lora()
    return found


def _only_lora(folder: Path) -> Path:
    """The LoRA in a folder, of which diffusers would take any if there are several."""
    for patterns in (("*.safetensors",), PICKLED_WEIGHTS):
        files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
        files = [file for file in files if not any(part in file.name for part in _OTHER_FILES)]
        files = [file for file in files if file.stem.endswith(_USUAL_NAME)] or files
        if len(files) > 1:
            raise InputError(f"lora {folder}: it holds {', '.join(file.name for file in files)}; give one of these files")
        if files:
            return files[0]
    raise InputError(f"lora {folder}: there is no LoRA in it; expected a .safetensors file, or an adapter folder of PEFT")


def _loaded(transformer: nn.Module) -> MergedLora:
    """What the adapter that was loaded into a transformer, and not merged yet, will change."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    factors: dict[str, Factors] = {}
    others: list[str] = []
    for name, layer in transformer.named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            others.append(f"{name} (all of its weights)")
        elif isinstance(layer, BaseTunerLayer) and not isinstance(layer, Linear):
            others.append(f"{name} ({type(layer).__module__.split('.')[2]}.{type(layer).__name__})")
        elif isinstance(layer, Linear):
            for adapter in layer.active_adapters:
                down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                factors[name] = Factors(down.detach().clone(), up.detach() * layer.scaling[adapter])
                if adapter in layer.lora_variant:  # DoRA, for one
                    others.append(f"{name} ({type(layer.lora_variant[adapter]).__name__})")
                if layer.lora_bias[adapter]:
                    others.append(f"{name} (its bias)")
    return MergedLora(factors, tuple(others))


def _require_transformer_alone(names: Iterable[str], file: Path) -> None:
    """Refuse what would be left out, so that the teacher would not be the model that the file makes of the pipeline."""
    names = list(names)
    if any(name.startswith(("text_encoder", "lora_te")) for name in names):
        raise InputError(
            f"lora {file}: it also changes the text encoders, which pyard reads unchanged; fuse it into a copy of the pipeline "
            "with diffusers (load_lora_weights, fuse_lora, save_pretrained), and give that folder"
        )
    if any("dora_scale" in name for name in names):
        raise InputError(f"lora {file}: it is a DoRA, which diffusers reads as if it were a LoRA; fuse it into the transformer")


def _add_peft_adapter(transformer: Any, path: Path) -> MergedLora:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    from pyard.models.lora import merge_adapters

    tensors = _adapter_tensors(path)
    _check_adapter(path / "adapter_config.json", tensors)
    try:
        config = LoraConfig.from_pretrained(str(path))
        inject_adapter_in_model(config, transformer)
        result = set_peft_model_state_dict(transformer, tensors)
    except Exception as error:  # as in read_pretrained
        raise InputError(f"lora {path}: PEFT cannot read it: {' '.join(str(error).split())[:300]}") from None
    if result.unexpected_keys:
        raise InputError(f"lora {path}: {result.unexpected_keys[0]} is not a layer of this {type(transformer).__name__}")
    found = _loaded(transformer)
    others = [*found.others, *(name for name in tensors if "lora_" not in name)]  # biases of layers with factors
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in _PLAIN_STARTS:
        others.append(f"the weights to which it is added ({config.init_lora_weights})")
    merge_adapters(transformer)
    _unwrap(transformer, path)
    return replace(found, others=tuple(others))


def _adapter_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in an adapter folder, by their names in the model."""
    file, pickled = path / "adapter_model.safetensors", path / "adapter_model.bin"
    if pickled.is_file() and not file.is_file():  # as PEFT wrote before 0.7
        file, content = pickled, read_pickle(pickled)
        if not isinstance(content, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
            raise InputError(f"{file}: expected the tensors of a PEFT adapter by name")
    else:
        content = read_safetensors(file)
    require_finite(content, file)
    return {name.removeprefix("base_model.model."): tensor for name, tensor in content.items()}


def _unwrap(transformer: nn.Module, path: Path) -> None:
    """Put the layers that an adapter holds whole in their places, and refuse what is neither such a layer nor merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, ModulesToSaveWrapper):
            transformer.set_submodule(name, next(iter(layer.modules_to_save.values())))
    for name, layer in transformer.named_modules():
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise InputError(f"lora {path}: {name} is a {type(layer).__name__}, which pyard does not merge; {_MERGE_IT}")


def _check_adapter(file: Path, tensors: Mapping[str, Any]) -> None:
    """Raise an InputError if an adapter is no LoRA, or declares a higher rank than its tensors have, which takes memory."""
    config = read_object(file, "the configuration of a PEFT adapter")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"{file}: an adapter of type {kind!s:.40}; expected LORA, or {_MERGE_IT}")
    patterns = config.get("rank_pattern")
    ranks = [config.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else ())]
    most = max((min(tensor.shape) for tensor in tensors.values() if tensor.ndim > 1), default=0)
    for rank in ranks:
        whole_number(f"{file}: a rank", rank, 1, max(most, 1))
