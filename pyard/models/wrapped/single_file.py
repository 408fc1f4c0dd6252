"""Reading a transformer from a single file, in diffusers' names or in those that diffusers converts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyard.errors import InputError
from pyard.models.pretrained import FACTORS, GUIDANCE, check_config, layers_without_a_place
from pyard.storage.reading import reading
from pyard.storage.tensor_files import read_safetensors, require_finite

# Prefixes that checkpoints add to a transformer's own names.
_PREFIXES = ("model.diffusion_model.", "transformer.", "module.", "model.", "")


def read_single_file(kind: type[Any], file: Path, folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Read the transformer in a `.safetensors` file, whose size is that of another one's configuration.

    Args:
        kind: its diffusers class.
        file: the file; its tensors may have a prefix, and other components of a pipeline may be beside them.
        folder: folder of the other transformer.
        config: the other transformer's configuration.
        dtype: dtype of the weights.

    Raises:
        InputError: the file is damaged, or belongs to another class or size.
    """
    from accelerate import init_empty_weights

    tensors = read_safetensors(file)
    require_finite(tensors, file)
    check_config(config, folder / "config.json", {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with reading(folder, f"not a configuration of {kind.__name__}", RuntimeError), init_empty_weights(include_buffers=False):
        transformer: nn.Module = kind.from_config(config)
    wanted = transformer.state_dict()
    own = _own_tensors(tensors, wanted)
    _require_unquantised(own, file)
    _require_no_other_guidance(own, wanted, file, folder)
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
        raise _lacking(file, kind, sorted(wanted.keys() - own.keys()))
    parameters = {name for name, _ in transformer.named_parameters()}
    try:
        transformer = kind.from_single_file(str(file), config=str(folder), torch_dtype=dtype, local_files_only=True).eval()
    except Exception as error:  # as in read_pretrained
        missing = _missing(kind, config, own, parameters)
        if missing:
            raise _lacking(file, kind, missing) from None
        found = f"there is no {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise InputError(f"transformer {file}: diffusers cannot read it as a {kind.__name__}: {found}") from None
    unread = sorted(name for name, parameter in transformer.named_parameters() if parameter.is_meta)
    if unread:
        raise _lacking(file, kind, unread)
    _require_no_more_blocks(own, transformer, file, folder)
    return transformer


def _own_tensors(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The transformer's tensors without their prefix; those of a pipeline's other components are under other prefixes."""
    parts = [
        part
        for prefix in _PREFIXES
        if (part := {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)})
    ]
    return next((part for part in parts if wanted.keys() <= part.keys()), parts[0] if parts else {})


def _missing(kind: type[Any], config: dict[str, Any], own: Mapping[str, torch.Tensor], parameters: set[str]) -> list[str]:
    """The parameters that a file lacks, in diffusers' names; none if it is of neither layout."""
    missing = [parameters - own.keys()]
    try:
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        convert = SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]["checkpoint_mapping_fn"]
        missing.append(parameters - convert(config=config, checkpoint=dict(own)).keys())
    except Exception:  # what the file lacks can make a converter raise anything
        pass
    fewest = min(missing, key=len)
    return sorted(fewest) if len(fewest) < len(parameters) / 2 else []


def _lacking(file: Path, kind: type[Any], missing: list[str]) -> InputError:
    return InputError(f"transformer {file}: it lacks {len(missing)} tensors of a {kind.__name__}, such as {missing[0]}")


def _require_unquantised(own: Mapping[str, torch.Tensor], file: Path) -> None:
    """Refuse weights that mean nothing without the factors beside them, which nobody here multiplies by."""
    factors = [name for name in own if FACTORS.search(name)]
    packed = [name for name, tensor in own.items() if tensor.dtype in (torch.int8, torch.uint8) and tensor.ndim > 0]
    if factors or packed:
        raise InputError(
            f"transformer {file}: it is quantised ({(factors or packed)[0]}), and its weights mean nothing without their "
            "factors; give the file in bfloat16, float16 or float32"
        )


def _require_no_other_guidance(own: Iterable[str], wanted: Iterable[str], file: Path, folder: Path) -> None:
    """Refuse a guidance embedder without a place, such as that of FLUX.1 dev over schnell; dropped, it leaves another model."""
    found = next((name for name in own if GUIDANCE.search(name)), None)
    if found is not None and not any(GUIDANCE.search(name) for name in wanted):
        raise InputError(
            f"transformer {file}: it has a guidance embedder ({found}), and the config.json of {folder} has none "
            "(guidance_embeds is not true); give a folder with its own config.json"
        )


def _require_no_more_blocks(own: Mapping[str, torch.Tensor], transformer: nn.Module, file: Path, folder: Path) -> None:
    """diffusers' converters join, split and rename tensors and drop the rest; what counts is the numbers in all of them."""
    found, kept = (sum(tensor.numel() for tensor in each.values()) for each in (own, transformer.state_dict()))
    if found > 1.01 * kept:
        raise InputError(
            f"transformer {file}: it has {found / 1e6:.4g} M numbers, and a transformer with the config.json of {folder} has "
            f"{kept / 1e6:.4g} M; if it has more layers, give a folder with its own config.json"
        )
