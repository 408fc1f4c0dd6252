"""A diffusers pipeline folder as a teacher that draws from prompts."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import torch

from pyard.conditions import Condition, Conditions
from pyard.conditions.prompts import PromptTable
from pyard.conditions.table import Numbers
from pyard.diffusion.scheduler_solvers import load_scheduler, own_solver
from pyard.diffusion.schedulers import process_of
from pyard.errors import InputError
from pyard.models.backbone import Denoiser
from pyard.models.codec import LatentCodec
from pyard.models.families import FAMILIES, import_network
from pyard.models.fingerprint import fingerprint_of, weights_digest
from pyard.models.student_config import BaseSource, LoraHeads, TextSource
from pyard.models.wrapped.backbone import WrappedBackbone
from pyard.models.wrapped.checkpoint import read_transformer
from pyard.models.wrapped.stock_lora import add_stock_lora
from pyard.storage.reading import read_object
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.teachers.text_to_image.families import INDEX_NAME, PipelineConfigs, PipelineFamily
from pyard.teachers.text_to_image.pipelines import pipeline_family
from pyard.teachers.text_to_image.settings import PipelineSettings
from pyard.teachers.text_to_image.text_encoder import PipelineTextEncoder

WeightsDType = Literal["float32", "bfloat16", "float16"]


class NoPrompts:
    """The conditions of a teacher that has not been given prompts yet."""

    fingerprint = ""
    free_sizes: Mapping[str, Mapping[int, str]] = MappingProxyType({})

    @property
    def count(self) -> int:
        """Always raises an InputError."""
        raise self._missing()

    def take(self, numbers: Numbers) -> Condition:
        raise self._missing()

    def null(self, numbers: Numbers) -> torch.Tensor:
        raise self._missing()

    def _missing(self) -> InputError:
        return InputError("this teacher draws from prompts: give prompts=… (--prompts), a file of them or a list")


class PipelineTeacher(PipelineSettings, NetworkTeacher):
    """A diffusers text-to-image pipeline as a teacher, as loaded by `load_teacher`.

    Attributes:
        folder: the pipeline's folder, from which text encoders and VAE are read when they are needed.
        family: what pyard knows about the pipeline's class.
        configs: configurations of the transformer and the VAE that are used, which need not be the folder's.
        scheduler: the pipeline's scheduler, or the deterministic one that replaces it.
        text_encoder: the encoder of its prompts.
        conditions: a `PromptTable`, after `with_prompts`.
        origin: the arguments `transformer`, `lora` and `variant` of `load_pipeline`.
    """

    def __init__(
        self,
        folder: Path,
        family: PipelineFamily,
        network: Denoiser,
        scheduler: Any,
        text_encoder: PipelineTextEncoder,
        *,
        configs: PipelineConfigs,
        codec: LatentCodec | None,
        conditions: Conditions | None = None,
    ):
        super().__init__(network, process_of(scheduler), codec=codec, conditions=conditions or NoPrompts())
        self.folder, self.family, self.scheduler, self.text_encoder = folder, family, scheduler, text_encoder
        self.configs = configs
        self.origin: Mapping[str, str] = {}
        self.guidance, self.cfg_normalization = family.guidance, family.cfg_normalization

    @property
    def backbone(self) -> WrappedBackbone:
        """The network without its output layers."""
        trunk = self.network.trunk
        assert isinstance(trunk, WrappedBackbone)
        return trunk

    @property
    def precision(self) -> str:
        """The dtype of the weights: `float32`, `bfloat16` or `float16`."""
        return str(self.backbone.dtype).removeprefix("torch.")

    def to(self, device: torch.device | str) -> Self:
        """Move the network, and encode prompts on this device from now on; returns itself."""
        super().to(device)
        self.text_encoder.to(device)
        return self

    def with_prompts(self, table: PromptTable) -> Self:
        """The same teacher with a table of prompts."""
        other = copy.copy(self)
        other.conditions = table
        return other

    def text_source(self) -> TextSource:
        """Where a student of this teacher finds its text encoders."""
        table = self.conditions
        constants: Mapping[str, Any] = table.record.constants if isinstance(table, PromptTable) else {}
        return TextSource(
            self.family.pipeline,
            str(self.folder.resolve()),
            self.text_encoder.max_sequence_length,
            dict(constants),
            {**self.origin, **({} if self.precision == "float32" else {"dtype": self.precision})},
        )

    def base_source(self, rank: int, heads: LoraHeads) -> BaseSource:
        """Where a LoRA student of this teacher finds the frozen weights.

        Args:
            rank, heads: rank of its additions, and how its output layers are trained.
        """
        return BaseSource(weights_digest(self.network), self.precision, rank, heads, **self.origin)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of transformer, scheduler and guidance; prompts and encoders are in the table's own fingerprint."""
        settings = [
            self.network.config.to_json(),
            self.family.pipeline,
            {key: value for key, value in sorted(self.scheduler.config.items()) if not key.startswith("_")},
        ]
        return fingerprint_of(self.network, self.schedule, json.loads(json.dumps(settings, default=str)))

    def with_schedule(self, schedule: Any) -> NetworkTeacher:
        raise InputError(
            f"teacher {self.folder}: its scheduler determines its noise schedule; change its scheduler/ folder instead"
        )

    def save_pretrained(self, path: str | Path) -> None:
        raise InputError(f"teacher {self.folder} is a diffusers pipeline, which pyard reads in place; copy its folder")


def is_pipeline_folder(path: Path) -> bool:
    """Whether this is the folder of a diffusers pipeline other than `DiTPipeline`."""
    file = path / INDEX_NAME
    if not file.is_file():
        return False
    try:
        return read_object(file).get("_class_name") != "DiTPipeline"
    except InputError:
        return False


def load_pipeline(
    folder: Path,
    *,
    dtype: WeightsDType = "float32",
    variant: str | None = None,
    transformer: Path | None = None,
    lora: Path | None = None,
    vae: Path | None = None,
    max_sequence_length: int | None = None,
) -> PipelineTeacher:
    """Read a text-to-image pipeline's transformer and scheduler; the other components are read when they are needed.

    Args:
        folder: the pipeline's folder.
        dtype: dtype of the weights.
        variant: variant of the weights, such as `fp16`.
        transformer: a fine-tuned transformer to use instead of the folder's: a folder or a single file.
        lora: a LoRA to add to the transformer.
        vae: another autoencoder to use instead of the folder's.
        max_sequence_length: largest number of text tokens; None: the pipeline's limit.

    Raises:
        InputError: pyard does not support the pipeline, or components are missing or do not match.
    """
    import diffusers

    family = pipeline_family(folder)
    configs = PipelineConfigs.read(folder, transformer)
    backbone: Any = import_network(FAMILIES[family.backbone])
    scheduler = read_scheduler(folder)
    encoder = PipelineTextEncoder(
        folder,
        family,
        max_sequence_length=max_sequence_length,
        dtype=getattr(torch, dtype),
        variant=variant,
        transformer=configs.transformer,
    )
    kind = getattr(diffusers, backbone.transformer_name)
    model = read_transformer(
        kind, folder / "transformer", dtype=getattr(torch, dtype), variant=variant, replacement=transformer
    )
    if lora is not None:
        add_stock_lora(model, getattr(diffusers, family.pipeline), lora)
    shape = family.sample_shape(configs)
    schedule = process_of(scheduler)
    network = backbone.wrap(
        model,
        shape,
        time_scale=backbone.flow_time_scale if schedule.kind == "flow" else 1.0,
        pixels=configs.vae_factor,
    )
    codec = LatentCodec(vae) if vae is not None else LatentCodec.beside(folder)
    teacher = PipelineTeacher(folder, family, network, scheduler, encoder, configs=configs, codec=codec)
    paths = {"transformer": transformer, "lora": lora}
    teacher.origin = {name: str(path.resolve()) for name, path in paths.items() if path is not None}
    if variant is not None:
        teacher.origin = {**teacher.origin, "variant": variant}
    return teacher


def read_scheduler(folder: Path) -> Any:
    """The scheduler of a pipeline's folder, or the deterministic one that replaces it, which is reported in a printed line."""
    if not (folder / "scheduler").is_dir():
        raise InputError(f"{folder}: there is no scheduler/, so its noise schedule is unknown; download the whole folder")
    scheduler, replaced = load_scheduler(folder / "scheduler")
    for note in (replaced, own_solver(scheduler).note):
        if note:
            print(f"{folder}: {note}", file=sys.stderr)
    return scheduler
