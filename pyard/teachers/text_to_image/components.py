"""Tokenizers and text encoders in a pipeline's folder: finding, reading and identifying them."""

from __future__ import annotations

import functools
import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyard.errors import InputError
from pyard.models.pretrained import check_files, read_pretrained
from pyard.storage.files import file_sha256
from pyard.storage.reading import read_object
from pyard.teachers.text_to_image.families import INDEX_NAME, PipelineFamily, component_class

# File names of weights in transformers: a single file, and the index of shards; safetensors before pickles.
_STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))


@dataclass(frozen=True)
class Component:
    """A tokenizer or text encoder of a pipeline.

    Args:
        name: name of the component and of its sub-folder.
        folder: the sub-folder.
        kind: name of its transformers class.
        variant: variant of the weights, such as `fp16`; None: the weights without a variant, or a tokenizer.
    """

    name: str
    folder: Path
    kind: str
    variant: str | None = None

    @property
    def is_tokenizer(self) -> bool:
        return self.name.startswith("tokenizer")

    def load(self, dtype: torch.dtype) -> Any:
        """The tokenizer or the encoder, without gradients, on the CPU; an InputError if transformers cannot read it."""
        import transformers

        kind: Any = getattr(transformers, self.kind, None)
        # An Auto class would ask on the terminal whether to run the folder's own code.
        if self.kind.startswith("Auto") or not hasattr(kind, "from_pretrained"):
            raise InputError(f"{self.folder}: transformers {transformers.__version__} has no class {self.kind}; upgrade it")
        if not self.is_tokenizer:
            return read_pretrained(kind, self.folder, dtype=dtype, variant=self.variant).eval().requires_grad_(False)
        check_files(self.folder)
        try:
            return kind.from_pretrained(str(self.folder), local_files_only=True)
        # A damaged file may make these libraries raise anything, and so may an optional library that is missing.
        except Exception as error:
            found = " ".join(str(error).split())[:400]
            raise InputError(f"{self.folder}: transformers cannot read this {self.kind}: {found}") from None

    def files(self) -> list[Path]:
        """The files that determine its results: all files of a tokenizer, or configuration and weights of an encoder."""
        if self.is_tokenizer:
            return sorted(file for file in self.folder.iterdir() if file.is_file() and not file.name.startswith("."))
        weights = _weights(self.folder, self.variant)
        return [self.folder / "config.json", *weights]

    def digests(self) -> dict[str, str]:
        """sha256 of each of its files; sharded weights have one for each shard."""
        return {f"{self.name}/{file.name}": _digest(file, *_version(file)) for file in self.files()}


def text_components(folder: Path, family: PipelineFamily, variant: str | None) -> list[Component]:
    """The components of a pipeline's folder that encode text.

    Args:
        folder: of the pipeline.
        family: of the pipeline.
        variant: variant of the weights to use, such as `fp16`; a component without this variant uses the weights that it has.

    Raises:
        InputError: a component is missing, or the whole folder has no file of this variant.
    """
    index = read_object(folder / INDEX_NAME, "the index of a diffusers pipeline")
    if variant is not None and not any(folder.glob(f"*/*.{glob.escape(variant)}[.-]*")):
        raise InputError(f"{folder}: no file of the variant {variant!r}; found {_variants_text(folder)}")
    return [
        found
        for name, is_needed in family.encoders.items()
        if (found := _component(folder, index, name, is_needed, variant)) is not None
    ]


def _component(folder: Path, index: dict[str, Any], name: str, is_needed: bool, variant: str | None) -> Component | None:
    named = component_class(index, name, folder)
    place = folder / name
    if named is None and not is_needed:
        return None
    if named is None or not place.is_dir() or not any(place.iterdir()):
        where = f"{INDEX_NAME} names none" if named is None else f"{place} is missing or empty"
        raise InputError(f"{folder}: the pipeline has no {name} to encode prompts with: {where}; download the whole folder")
    library, kind = named
    if library != "transformers":
        raise InputError(f"{folder / INDEX_NAME}: {name} is a {library}.{kind}; expected a transformers class")
    if name.startswith("tokenizer"):
        return Component(name, place, kind)
    if not (place / "config.json").is_file():
        raise InputError(f"{place}: expected a text encoder; there is no config.json; download the whole folder")
    found = sorted(_variants(place), key=lambda each: (each != variant, each is not None, each or ""))
    if not found:
        raise InputError(f"{place}: expected the weights of a text encoder, model.safetensors; download the whole folder")
    return Component(name, place, kind, found[0])


def _variants(folder: Path) -> Iterator[str | None]:
    """The weights' variants in a component's folder."""
    names = {file.name for file in folder.iterdir()}
    for stem, suffix in _STEMS:
        whole = re.compile(rf"{stem}(?:\.(\w+))?\.{suffix}")
        index = re.compile(rf"{stem}\.{suffix}\.index(?:\.(\w+))?\.json")
        yield from {match[1] for name in names if (match := whole.fullmatch(name) or index.fullmatch(name))}


def _variants_text(folder: Path) -> str:
    places = [place for place in sorted(folder.iterdir()) if place.is_dir() and place.name.startswith("text_encoder")]
    found = {variant or "weights without a variant" for place in places for variant in _variants(place)}
    return ", ".join(sorted(found)) or "no weights"


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """The files of one variant's weights, without the shards' index, which has no information that the tensors lack."""
    dot = "" if variant is None else f".{variant}"
    for stem, suffix in _STEMS:
        whole = folder / f"{stem}{dot}.{suffix}"
        if whole.is_file():
            return [whole]
        index = folder / f"{stem}.{suffix}.index{dot}.json"
        if index.is_file():
            shards = read_object(index, "an index of weights").get("weight_map")
            if not isinstance(shards, dict):
                raise InputError(f"{index}: expected an index of weights with a weight_map; download the whole folder")
            return [folder / str(name) for name in sorted(set(shards.values()))]
    raise InputError(f"{folder}: the weights were moved while they were read")


def _version(file: Path) -> tuple[int, int]:
    try:
        about = file.stat()
    except FileNotFoundError:
        raise InputError(f"{file}: missing, though an index of weights names it; download the whole folder") from None
    return about.st_size, about.st_mtime_ns


@functools.lru_cache(maxsize=1024)
def _digest(file: Path, size: int, modified: int) -> str:
    return file_sha256(file)
