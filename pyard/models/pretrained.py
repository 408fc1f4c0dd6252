"""Folders of diffusers and transformers, looked at before those libraries read them.

They build what a configuration asks for before they look at the weights, believe every size in it, and raise whatever happens.
So a configuration is compared with the tensors that are there, and whatever is raised becomes one line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pyard.errors import InputError
from pyard.storage.pickles import require_sound
from pyard.storage.reading import read_object, require_readable, require_regular
from pyard.storage.tensor_files import require_finite, tensor_shapes

_CONFIG_NAME = "config.json"
# Names under which diffusers, transformers and PEFT read pickles; a folder may hold others, such as training_args.bin.
PICKLED_WEIGHTS = ("*model*.bin", "*weights*.bin")
_SUFFIXES = ("safetensors", "bin")
# What counts blocks, of which each has a tensor of its own.
_COUNTS = re.compile(r"(?:^|_)(?<!window_)(?:layers|depth|blocks|layers_per_block)$")
# What is squared in a table of positions, and what else sets the length of a table; limits far beyond any model there is.
_SIDES = re.compile(r"(?:^|_)(?:sample_size|image_size|input_size|pos_embed_max_size|resolution)$")
_MOST_BY_NAME = ((_SIDES, 2**12), (re.compile(r"axes_lens"), 2**16), (re.compile(r"axes_dims"), 2**12),
                 (re.compile(r"theta|_id$|_ids$|base"), 2**53))  # fmt: skip
# Names of the scale factors beside quantised weights: of scaled fp8 (ComfyUI, compressed-tensors), bitsandbytes, GPTQ.
FACTORS = re.compile(r"(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|absmax|quant_map|qweight|qzeros)(\.|$|_)")
# Layers that embed the strength of the guidance, in diffusers' names and in FLUX's own.
GUIDANCE = re.compile(r"(^|\.)(guidance_embedder|guidance_in)\.")
_MOST = 2**24
_MOST_ITEMS = 10**4
_NUMBER = re.compile(r"\.\d+\.")
# Numbers in a table of positions: of a small model, beside those of its weights; and of any there is.
_SMALL_TABLE, _LARGEST_TABLE = 2**26, 2**29


def read_pretrained(kind: Any, folder: Path, *, whole: bool = False, **options: Any) -> Any:
    """`kind.from_pretrained` of a folder that was looked at first.

    Args:
        kind: a class of diffusers or transformers.
        folder: with `config.json` and weights.
        whole: refuse weights of more layers than the model has. Those of text encoders are often a part of a larger model's.
        options: of `from_pretrained`.

    Raises:
        InputError: sizes that the weights do not have, files that are none, or whatever the library raises.
    """
    check_model_folder(folder)
    for file in sorted(folder.glob("*.safetensors")):
        require_readable(file)
    try:
        model, info = kind.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, **options)
    # Whatever a damaged file does to a library that is not ours, or a package that it wants and that is missing.
    except Exception as error:
        found = " ".join(str(error).split())[:400]
        library = kind.__module__.partition(".")[0]
        raise InputError(f"{folder}: {library} cannot read this {kind.__name__}: {found or type(error).__name__}") from None
    # Those would be drawn at random, or have no numbers at all.
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    missing += [name for name, parameter in model.named_parameters() if parameter.is_meta and name not in missing]
    if missing:
        raise InputError(f"{folder}: its weights lack {len(missing)} tensors of a {kind.__name__}, such as {missing[0]}")
    left = layers_without_a_place(info["unexpected_keys"], model.state_dict()) if whole else []
    if left:
        raise InputError(
            f"{folder}: its weights have {len(left)} tensors that the {kind.__name__} of its config.json has no place for, "
            f"such as {left[0]}; it may have more layers than the configuration says"
        )
    require_finite(model.state_dict(), folder)
    return model


def layers_without_a_place(found: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Tensors without which a model is another one: those of more layers, of a guidance embedder, and factors of
    quantised weights.

    Others that a model has no place for are harmless, such as the embedding of no caption in the published PixArt-alpha, which
    its pipeline does not use.

    Args:
        found: names of tensors in a file.
        wanted: names of the model's tensors.
    """
    wanted = set(wanted)
    kinds = {_NUMBER.sub(".#.", name) for name in wanted}
    left = sorted(set(found) - wanted)
    return [name for name in left if _NUMBER.sub(".#.", name) in kinds or FACTORS.search(name) or GUIDANCE.search(name)]


def check_model_folder(folder: Path) -> dict[str, Any]:
    """The configuration in a folder, whose files are regular ones, whose pickles are sound and whose sizes its weights have.

    Raises:
        InputError: names the setting, what was found and what is there.
    """
    check_files(folder)
    config = read_object(folder / _CONFIG_NAME, "the configuration of a model", finite=False)
    tensors: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= tensor_shapes(file)
    for pattern in PICKLED_WEIGHTS:  # which libraries read where they miss the safetensors that they look for
        for file in folder.glob(pattern):
            require_sound(file)
    check_config(config, folder / _CONFIG_NAME, tensors)
    return config


def check_files(folder: Path) -> None:
    """Raises InputError if there is a pipe or a device in a folder, or an index of weights that leads out of it."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.is_dir():
            continue
        require_regular(file)
        if ".index." in file.name and file.suffix == ".json":
            names = read_object(file, "an index of weights").get("weight_map")
            if not isinstance(names, dict):
                raise InputError(f"{file}: expected an index of weights with a weight_map")
            for name in {str(name) for name in names.values()}:
                if Path(name).name != name:
                    raise InputError(f"{file}: names {name!r:.80}; expected a file in its own folder")


def check_config(config: Mapping[str, Any], path: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError if a configuration asks for more than its weights have.

    Args:
        config: of a model of diffusers or transformers.
        path: of the configuration, for messages.
        tensors: shapes of the weights; empty: they are pickles or elsewhere, and only limits for any model hold.
    """
    places = config.get("pos_embed_max_size")
    if "num_mmdit_layers" in config and isinstance(places, int) and places > 0:  # AuraFlow's: of all places, not of a side
        config = {**config, "pos_embed_max_size": math.isqrt(places)}
    blocks = len(tensors) or _MOST_ITEMS
    for name, value in _settings(config, path):
        most = next((limit for pattern, limit in _MOST_BY_NAME if pattern.search(name)), _MOST)
        if _COUNTS.search(name):
            most = blocks
        if isinstance(value, int) and abs(value) > most:
            there = f"; there are {len(tensors)} tensors" if most == len(tensors) else ""
            raise InputError(f"{path}: {name} is {str(value)[:40]}; expected at most {most}{there}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{path}: {name} is {value}; expected a finite number")
    numbers = sum(math.prod(shape) for shape in tensors.values())
    most_numbers = _SMALL_TABLE + numbers if tensors else _LARGEST_TABLE
    width = _number(config, "num_attention_heads", 1) * _number(config, "attention_head_dim", 1)
    patch = max(_number(config, "patch_size", 1), 1)
    for name, value in config.items():
        sides = value if isinstance(value, list) else [value]
        if _SIDES.search(name) and all(isinstance(side, int) for side in sides):
            table = (max(sides, default=0) // (1 if name == "pos_embed_max_size" else patch)) ** 2 * width
            if table > most_numbers:
                raise InputError(f"{path}: {name} {value} needs a table of {table} numbers; expected at most {most_numbers}")


def _settings(value: Any, path: Path, name: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers of a configuration with the names of their settings, those in lists and dictionaries, too."""
    if isinstance(value, Mapping | list):
        if len(value) > _MOST_ITEMS:
            raise InputError(f"{path}: {name} has {len(value)} entries; expected at most {_MOST_ITEMS}")
        pairs = value.items() if isinstance(value, Mapping) else ((name, item) for item in value)
        for key, item in pairs:
            yield from _settings(item, path, str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _number(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def usable_variant(folder: Path, name: str, wanted: str | None) -> str | None:
    """The wanted variant if the folder has the weights `name` in it, or else as `only_variant`.

    A variant is asked for a whole pipeline, and some components have their weights in another one only.
    """
    files = [f"{name}.{wanted}.{kind}" for kind in _SUFFIXES] + [f"{name}.{kind}.index.{wanted}.json" for kind in _SUFFIXES]
    return wanted if any((folder / file).is_file() for file in files) else only_variant(folder, name)


def only_variant(folder: Path, name: str) -> str | None:
    """`fp16` or another variant, if the folder has the weights `name` only in this variant."""
    if any((folder / f"{name}.{kind}{index}").is_file() for kind in _SUFFIXES for index in ("", ".index.json")):
        return None
    files = sorted(file.name for file in folder.glob(f"{name}.*"))
    found = (re.search(r"\.(?:index\.)?(\w+?)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin|json)$", file) for file in files)
    return next((match[1] for match in found if match and match[1] not in ("safetensors", "bin", "index")), None)
