"""Reading a diffusers transformer: from a pipeline's folder, or a fine-tuned replacement, with an optional LoRA."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyard.errors import InputError
from pyard.models.pretrained import (
    FACTORS,
    PICKLED_WEIGHTS,
    check_config,
    layers_without_a_place,
    only_variant,
    read_pretrained,
)
from pyard.models.wrapped.low_rank import Factors
from pyard.storage.numbers import whole_number
from pyard.storage.pickles import require_sound
from pyard.storage.reading import read_object, reading
from pyard.storage.tensor_files import read_safetensors, require_finite

_NAME = "diffusion_pytorch_model"
# Prefixes that checkpoints add to a transformer's own names.
_PREFIXES = ("model.diffusion_model.", "transformer.", "module.", "model.", "")
# Published folders name the class that diffusers had before it split it: PixArt's do, and so do DiT's.
_CLASS_SINCE = {("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel"}


def read_transformer(
    kind: type[Any],
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    replacement: Path | None = None,
) -> Any:
    """Read a transformer in the dtype in which it will compute.

    Args:
        kind: name of its diffusers class.
        folder: folder of the pipeline's own transformer, with `config.json`; its weights may be sharded.
        dtype: dtype of the weights.
        variant: variant of the weights, such as `fp16`; None: the files without a variant, or else the only variant there is.
        replacement: a fine-tuned transformer to read instead: a folder, or a single `.safetensors` with diffusers' tensor names
            or, if diffusers can convert them, the original ones.

    Raises:
        InputError: files are missing or damaged, or belong to another class or size.
    """
    if replacement is not None and not replacement.exists():
        raise InputError(f"transformer {replacement}: no such file or folder")
    if replacement is not None and replacement.is_file():
        return _from_single_file(kind, replacement, folder, dtype)
    folder = folder if replacement is None else transformer_folder(replacement)
    config = _config(folder)
    found = config.get("_class_name")
    if kind.__name__ not in (found, _CLASS_SINCE.get((str(found), str(config.get("norm_type"))))):
        raise InputError(f"{folder} holds a {found!s:.60}; expected a {kind.__name__}")
    return read_pretrained(kind, folder, whole=True, torch_dtype=dtype, variant=variant or only_variant(folder, _NAME)).eval()


def add_stock_lora(transformer: Any, pipeline: type[Any], path: Path) -> dict[str, Factors]:
    """Add a LoRA to the weights of a transformer, in place.

    Args:
        transformer: the transformer, as read.
        pipeline: class of its diffusers pipeline, whose loader reads the LoRA file.
        path: a LoRA that the pipeline's `load_lora_weights` reads, or an adapter folder of PEFT.

    Returns:
        What was added to each linear layer, by its name.

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
    for file in (
        [path] if path.is_file() else sorted(f for kind in ("*.safetensors", *PICKLED_WEIGHTS) for f in path.glob(kind))
    ):
        if file.suffix == ".safetensors":
            tensors = read_safetensors(file)
            require_finite(tensors, file)
            _require_transformer_alone(tensors, file)
        else:
            require_sound(file)
    try:
        where = {"weight_name": path.name} if path.is_file() else {}
        # Some files have the weights of their additions (alpha) as tensors, others in their metadata.
        has_alphas = "network_alphas" in inspect.signature(pipeline.load_lora_into_transformer).parameters
        state, *alphas, metadata = pipeline.lora_state_dict(
            str(path.parent if path.is_file() else path),
            local_files_only=True,
            return_lora_metadata=True,
            **({"return_alphas": True} if has_alphas else {}),
            **where,
        )
        _require_transformer_alone(state, path)  # pickles, too
        pipeline.load_lora_into_transformer(state, *alphas, transformer=transformer, metadata=metadata)
    except InputError:
        raise
    except Exception as error:  # as in read_pretrained
        raise InputError(f"lora {path}: {pipeline.__name__} cannot read it: {' '.join(str(error).split())[:300]}") from None
    if before == {name: id(module) for name, module in transformer.named_modules()}:
        raise InputError(f"lora {path}: none of its layers belongs to this {type(transformer).__name__}")
    factors = _factors(transformer)
    transformer.fuse_lora()
    transformer.unload_lora()
    return factors


def _factors(transformer: nn.Module) -> dict[str, Factors]:
    """What the LoRA that was loaded into a transformer adds to its linear layers; its weight is in `up`."""
    from peft.tuners.lora import Linear

    found = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, Linear):
            for adapter in layer.active_adapters:
                down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                found[name] = Factors(down.detach().clone(), up.detach() * layer.scaling[adapter])
    return found


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


def _add_peft_adapter(transformer: Any, path: Path) -> dict[str, Factors]:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    from pyard.models.lora import merge_adapters

    file = path / "adapter_model.safetensors"
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in read_safetensors(file).items()}
    require_finite(tensors, file)
    _check_ranks(path / "adapter_config.json", tensors)
    try:
        inject_adapter_in_model(LoraConfig.from_pretrained(str(path)), transformer)
        result = set_peft_model_state_dict(transformer, tensors)
    except Exception as error:  # as in read_pretrained
        raise InputError(f"lora {path}: PEFT cannot read it: {' '.join(str(error).split())[:300]}") from None
    if result.unexpected_keys:
        raise InputError(f"lora {path}: {result.unexpected_keys[0]} is not a layer of this {type(transformer).__name__}")
    factors = _factors(transformer)
    merge_adapters(transformer)
    return factors


def _from_single_file(kind: type[Any], file: Path, folder: Path, dtype: torch.dtype) -> Any:
    from accelerate import init_empty_weights

    tensors = read_safetensors(file)
    require_finite(tensors, file)
    config = _config(folder)
    check_config(config, folder / "config.json", {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with reading(folder, f"not a configuration of {kind.__name__}", RuntimeError), init_empty_weights(include_buffers=False):
        transformer: nn.Module = kind.from_config(config)
    wanted = transformer.state_dict()
    _require_unquantised(tensors, file)
    for prefix in _PREFIXES:
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if wanted.keys() <= own.keys():
            differing = [name for name, tensor in wanted.items() if tensor.shape != own[name].shape]
            if differing:
                sizes = f"{tuple(own[differing[0]].shape)}, expected {tuple(wanted[differing[0]].shape)}"
                raise InputError(f"transformer {file}: {differing[0]} is {sizes}; it has a different size than {folder}")
            left = layers_without_a_place(own, wanted)
            if left:
                raise InputError(
                    f"transformer {file}: it has {len(left)} tensors that the {kind.__name__} of {folder} has no place for, "
                    f"such as {left[0]}; if it has more layers, give a folder with its own config.json"
                )
            transformer.load_state_dict({name: own[name].clone() for name in wanted}, assign=True)
            return transformer.to(dtype).eval()
    if not hasattr(kind, "from_single_file"):
        missing = sorted(wanted.keys() - tensors.keys())
        raise InputError(f"transformer {file}: it lacks {len(missing)} tensors of a {kind.__name__}, such as {missing[0]}")
    try:
        transformer = kind.from_single_file(str(file), config=str(folder), torch_dtype=dtype, local_files_only=True).eval()
    except Exception as error:  # as in read_pretrained
        found = " ".join(str(error).split())[:300]
        raise InputError(f"transformer {file}: diffusers cannot read it as a {kind.__name__}: {found}") from None
    _require_no_more_blocks(tensors, transformer, file, folder)
    return transformer


def _require_unquantised(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Refuse weights that mean nothing without the factors beside them, which nobody here multiplies by."""
    factors = [name for name in tensors if FACTORS.search(name)]
    packed = [name for name, tensor in tensors.items() if tensor.dtype in (torch.int8, torch.uint8) and tensor.ndim > 0]
    if factors or packed:
        raise InputError(
            f"transformer {file}: it is quantised ({(factors or packed)[0]}), and its weights mean nothing without their "
            "factors; give the file in bfloat16, float16 or float32"
        )


def _require_no_more_blocks(tensors: Mapping[str, torch.Tensor], transformer: nn.Module, file: Path, folder: Path) -> None:
    """diffusers' converters join, split and rename tensors and drop the rest; what counts is the numbers in all of them."""
    own = next(
        (kept for prefix in _PREFIXES if (kept := [tensor for name, tensor in tensors.items() if name.startswith(prefix)])), []
    )
    found, kept = sum(tensor.numel() for tensor in own), sum(tensor.numel() for tensor in transformer.state_dict().values())
    if found > 1.01 * kept:
        raise InputError(
            f"transformer {file}: it has {found / 1e6:.4g} M numbers, and a transformer with the config.json of {folder} has "
            f"{kept / 1e6:.4g} M; if it has more layers, give a folder with its own config.json"
        )


def transformer_folder(folder: Path) -> Path:
    """The folder itself, or if it is a pipeline, the folder of its transformer."""
    return folder / "transformer" if (folder / "model_index.json").is_file() else folder


def _check_ranks(file: Path, tensors: Mapping[str, Any]) -> None:
    """Raise an InputError if an adapter declares a higher rank than its tensors have, before memory is taken for it."""
    config = read_object(file, "the configuration of a PEFT adapter")
    patterns = config.get("rank_pattern")
    ranks = [config.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else ())]
    most = max((min(tensor.shape) for tensor in tensors.values() if tensor.ndim > 1), default=0)
    for rank in ranks:
        whole_number(f"{file}: a rank", rank, 1, max(most, 1))


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: expected the folder of a diffusers transformer; there is no config.json")
    return read_object(folder / "config.json", "the configuration of a diffusers transformer")
