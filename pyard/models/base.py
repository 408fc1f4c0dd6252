"""The frozen base of a student that was trained by LoRA over a text-to-image pipeline: read again from where it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyard.errors import InputError
from pyard.models.backbone import Backbone, Denoiser
from pyard.models.fingerprint import weights_digest
from pyard.models.student_config import StudentConfig
from pyard.storage.trained import sharing


def read_base(
    config: StudentConfig, backbone: type[Backbone], base: str | Path | Denoiser | None, student: Path
) -> tuple[StudentConfig, Backbone, nn.Module]:
    """Trunk and head that a LoRA student stands on.

    Args:
        config: of the student, with a `base`.
        backbone: class of its trunk.
        base: where the base is now: a pipeline's folder, or a transformer in place of the one that was recorded (folder or
            single file); or the teacher's network, whose weights are then shared and not compared, for its caller knows that
            it is the one; None: at its path during training.
        student: the student's folder, for messages.

    Returns:
        The configuration, which names the folder that was read, and its trunk, frozen, and its head, in the
        base's dtype.

    Raises:
        InputError: no base there, or another one.
    """
    assert config.base is not None
    assert config.text is not None
    network: Denoiser
    if isinstance(base, Denoiser):
        network = base
    else:
        config = _moved(config, base)
        network = _read(config, backbone, student)
        assert config.base is not None
        if weights_digest(network) != config.base.fingerprint:
            raise InputError(f"student {student}: {_name(config)} has changed since training; {_REMEDY}")
    with sharing([*network.trunk.parameters(), *network.trunk.buffers()]):
        trunk, head = network.trunk.for_student(network.head)
    if trunk.config != config.network:
        raise InputError(f"student {student}: its base has different settings than in training; {_REMEDY}")
    return config, trunk.requires_grad_(False), head.requires_grad_(True)


_REMEDY = "restore the files that the student was trained on top of, or give base=… (Python) with their location"


def _moved(config: StudentConfig, base: str | Path | None) -> StudentConfig:
    if base is None:
        return config
    place = Path(base)
    assert config.base is not None
    assert config.text is not None
    if place.exists() and not (place / "model_index.json").is_file():
        return dataclasses.replace(config, base=dataclasses.replace(config.base, transformer=str(place.resolve())))
    if place.exists() and not (place / "transformer").is_dir():
        return config  # a copy of the text encoders alone
    return dataclasses.replace(config, text=dataclasses.replace(config.text, folder=str(place.resolve())))


def _read(config: StudentConfig, backbone: Any, student: Path) -> Denoiser:
    import diffusers

    from pyard.models.wrapped.checkpoint import read_transformer
    from pyard.models.wrapped.stock_lora import add_stock_lora

    source, text, network = config.base, config.text, config.network
    assert source is not None
    assert text is not None
    for what, path in (("transformer", source.transformer), ("lora", source.lora), ("pipeline", text.folder)):
        if path is not None and not Path(path).exists():
            raise InputError(f"student {student} was trained on top of the {what} {path}, which does not exist; {_REMEDY}")
    transformer = read_transformer(
        getattr(diffusers, backbone.transformer_name),
        Path(text.folder) / "transformer",
        dtype=getattr(torch, source.dtype),
        variant=source.variant,
        replacement=None if source.transformer is None else Path(source.transformer),
    )
    if source.lora is not None:
        add_stock_lora(transformer, getattr(diffusers, text.pipeline), Path(source.lora))
    sizes: Any = network
    wrapped: Denoiser = backbone.wrap(transformer, sizes.sample_shape, time_scale=sizes.time_scale, pixels=sizes.pixels)
    return wrapped


def _name(config: StudentConfig) -> str:
    assert config.base is not None
    assert config.text is not None
    own = config.base.transformer or str(Path(config.text.folder) / "transformer")
    return f"its base {own}" + (f" with the LoRA {config.base.lora}" if config.base.lora else "")
