"""A text-to-image pipeline without its weights: from a folder's configuration files, or by the name of a published pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyard.data.captioned_scenes.tokenizer import MAX_TOKENS
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.schedulers import build_scheduler, process_of
from pyard.models.backbone import Denoiser
from pyard.models.families import FAMILIES, import_network
from pyard.storage.reading import read_object
from pyard.teachers import SCENES_TEXT, pipeline_folder
from pyard.teachers.text_to_image.encoding import TextShape
from pyard.teachers.text_to_image.families import (
    INDEX_NAME,
    PipelineConfigs,
    PipelineFamily,
    component_class,
)
from pyard.teachers.text_to_image.pipelines import PIPELINES, pipeline_family
from pyard.teachers.text_to_image.published import PublishedPipeline, published_pipeline
from pyard.teachers.text_to_image.settings import PipelineSettings
from pyard.teachers.text_to_image.teacher import read_scheduler

_T5 = "text_encoder_3"  # of SD3, which goes without


@dataclass(frozen=True)
class EncoderOutline:
    """A text encoder without its weights.

    Args:
        kind: name of its transformers class.
        config: its settings, including `model_type`, as in its config.json.
        tokens: number of tokens that it is given for the longest text.
    """

    kind: str
    config: Mapping[str, Any]
    tokens: int


@dataclass(frozen=True)
class PipelineOutline(PipelineSettings):
    """A text-to-image pipeline without its weights.

    Args:
        name: name of the pipeline, or its folder.
        family, configs, scheduler, schedule: see `PipelineSettings`.
        network: the network, on the meta device.
        encoders: its text encoders.
        text: shape of the embeddings that the transformer gets for a text.
    """

    name: str
    family: PipelineFamily
    configs: PipelineConfigs
    scheduler: Any
    schedule: NoiseSchedule
    network: Denoiser
    encoders: tuple[EncoderOutline, ...]
    text: TextShape

    @classmethod
    def read(cls, folder: Path, max_sequence_length: int | None = None) -> PipelineOutline:
        """Read the outline of a folder's pipeline, from its configuration files only.

        Args:
            folder: the pipeline's folder.
            max_sequence_length: largest number of text tokens; None: the pipeline's limit.

        Raises:
            InputError: pyard does not support the pipeline, or files are missing or do not match.
        """
        family = pipeline_family(folder)
        index = read_object(folder / INDEX_NAME, "the index of a diffusers pipeline")
        encoders: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for name in family.encoders:
            component = component_class(index, name, folder)
            if component is not None and not name.startswith("tokenizer"):
                encoders[name] = component[1], read_object(folder / name / "config.json", "the configuration of a text encoder")
        configs, limit = PipelineConfigs.read(folder), max_sequence_length or family.max_sequence_length
        return cls._of(str(folder), family, configs, read_scheduler(folder), encoders, limit)

    @classmethod
    def of_published(cls, found: PublishedPipeline) -> PipelineOutline:
        """The outline of a published pipeline, for which no files are read."""
        configs = PipelineConfigs(found.transformer, found.vae)
        scheduler, family = build_scheduler(dict(found.scheduler), found.name), PIPELINES[found.pipeline]
        return cls._of(found.name, family, configs, scheduler, found.encoders, family.max_sequence_length)

    @classmethod
    def _of(
        cls,
        name: str,
        family: PipelineFamily,
        configs: PipelineConfigs,
        scheduler: Any,
        encoders: Mapping[str, tuple[str, Mapping[str, Any]]],
        limit: int,
    ) -> PipelineOutline:
        schedule, encode = process_of(scheduler), family.encode
        if family.backbone == "sd3" and _T5 not in encoders:
            limit = encode.clip_tokens  # of zeros, in T5's place
        return cls(
            name=name,
            family=family,
            configs=configs,
            scheduler=scheduler,
            schedule=schedule,
            network=_network(family, configs, schedule),
            encoders=tuple(
                EncoderOutline(kind, config, _tokens(config, limit + encode.template_tokens))
                for kind, config in encoders.values()
            ),
            text=encode.shape(configs.transformer, limit),
        )


def _network(family: PipelineFamily, configs: PipelineConfigs, schedule: NoiseSchedule) -> Denoiser:
    backbone: Any = import_network(FAMILIES[family.backbone])
    time_scale = backbone.flow_time_scale if schedule.kind == "flow" else 1.0
    settings = backbone.own_settings(configs.transformer)
    sizes = backbone.config_class(settings, family.sample_shape(configs), time_scale, configs.vae_factor)
    backbone.check_settings(sizes)
    return without_weights(backbone, sizes)


def without_weights(backbone: Any, sizes: Any) -> Denoiser:
    """A network of the given sizes, on the meta device."""
    try:
        with torch.device("meta"):
            return Denoiser(backbone(sizes))
    except (RuntimeError, NotImplementedError):  # some networks look at the numbers of their constants
        with backbone.without_weights():
            return Denoiser(backbone(sizes)).to("meta")


def _tokens(config: Mapping[str, Any], limit: int) -> int:
    # CLIP pads to all of its positions, whatever the pipeline's limit is.
    if str(config.get("model_type")).startswith("clip"):
        return int(config.get("max_position_embeddings") or 77)
    return limit


def pipeline_outline(source: str | Path) -> PipelineOutline | None:
    """The outline of a pipeline's folder or of a published pipeline; None: it is neither.

    Raises:
        InputError: the folder has a pipeline that pyard does not support, or files that do not match.
    """
    folder = pipeline_folder(source)
    if folder is not None:
        # No caption of the built-in teacher is longer; `load_teacher` uses the same limit.
        return PipelineOutline.read(folder, MAX_TOKENS if folder == SCENES_TEXT else None)
    if Path(source).exists():
        return None
    found = published_pipeline(str(source))
    return None if found is None else PipelineOutline.of_published(found)
