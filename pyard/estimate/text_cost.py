"""What encoding prompts costs: operations and weights of the text encoders, and bytes of the table that embeddings go to."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from pyard.conditions import PromptTable
from pyard.conditions.prompt_file import read_prompts
from pyard.conditions.prompt_storage import DistinctTexts
from pyard.cost.flops import counted
from pyard.errors import InputError
from pyard.teachers.text_to_image.encoding import TextShape
from pyard.teachers.text_to_image.outline import EncoderOutline, PipelineOutline
from pyard.training.config import TrainConfig

_NUMBER = 2  # bytes of a number in bfloat16
# Of a text beside its embedding: length, digest and a flag in its shard, length and digest in the index.
_SHARD_BYTES = 8 + 32 + 1
_INDEX_BYTES = 8 + 32
_ROW_BYTES = 2 * 8  # the numbers of a prompt's two texts, in the index


@dataclass(frozen=True)
class TextCost:
    """What a run's texts cost.

    Args:
        texts: distinct ones, negative prompts included.
        prompts: how many.
        known: whether they were read; False: one prompt a trajectory was assumed.
        shape: of the longest.
        num_bytes: of the table; at most, unless the texts are padded.
        flops: of encoding all of them.
        encoder_bytes: of the text encoders' weights, in the dtype of the teacher's.
        encoded: whether they are in a store already.
    """

    texts: int
    prompts: int
    known: bool
    shape: TextShape
    num_bytes: int
    flops: float
    encoder_bytes: int
    encoded: bool = False

    def __str__(self) -> str:
        length = f"{self.shape.tokens} tokens" + ("" if self.shape.padded else " at most")
        source = "encoded already" if self.encoded else "read" if self.known else "one for each trajectory"
        return f"{self.prompts} of {length}, {source}"


def text_cost(config: TrainConfig, pipeline: PipelineOutline, shape: TextShape, count: int) -> TextCost:
    """What the prompts of a recipe cost.

    Args:
        config: the recipe, whose file of prompts is read if it is there.
        pipeline: its teacher.
        shape: of the longest text.
        count: trajectories.
    """
    guided = (pipeline.cfg_scale if config.cfg_scale is None else config.cfg_scale) != 1
    prompts, texts, known = count, count + guided, False
    if config.prompts is not None:
        try:
            lines = read_prompts(config.prompts)
        except InputError:
            pass  # a recipe is asked for its cost before its prompts are written
        else:
            prompts, known = len(lines), True
            texts = len(DistinctTexts.of(lines, pipeline.family.negative_prompt).texts)
    one = encoding_flops(pipeline)
    number = 2 if config.trajectory_precision == "bfloat16" else 4
    return TextCost(
        texts=texts,
        prompts=prompts,
        known=known,
        shape=shape,
        num_bytes=texts * (_NUMBER * shape.numbers + _SHARD_BYTES + _INDEX_BYTES) + prompts * _ROW_BYTES,
        flops=texts * one,
        encoder_bytes=number * sum(encoder_parameters(encoder) for encoder in pipeline.encoders),
    )


def stored_text_cost(table: PromptTable, shape: TextShape) -> TextCost:
    """Of prompts that are encoded already."""
    record = table.record
    rows = record.num_texts * _INDEX_BYTES + record.num_prompts * _ROW_BYTES
    return TextCost(
        texts=record.num_texts,
        prompts=record.num_prompts,
        known=True,
        shape=shape,
        num_bytes=sum(record.shards.values()) + rows,
        flops=0.0,
        encoder_bytes=0,
        encoded=True,
    )


def encoding_flops(pipeline: PipelineOutline) -> float:
    """Operations of encoding one text, padded to the encoders' limits, counted without weights."""
    total = 0.0
    for encoder in pipeline.encoders:
        ids = torch.zeros(1, encoder.tokens, dtype=torch.int64, device="meta")
        model = _model(encoder)
        with torch.no_grad():
            total += counted(functools.partial(model, ids))
    return total


def encoder_parameters(encoder: EncoderOutline) -> int:
    """Parameters of a text encoder."""
    return sum(parameter.numel() for parameter in _model(encoder).parameters())


def _model(encoder: EncoderOutline) -> Any:
    import transformers

    kind = getattr(transformers, encoder.kind, None)
    if kind is None:
        raise InputError(f"transformers {transformers.__version__} has no class {encoder.kind}; upgrade it")
    settings = dict(encoder.config)
    try:
        config = transformers.AutoConfig.for_model(**settings)
        with torch.device("meta"):
            return kind(config).eval()
    except (TypeError, ValueError, KeyError) as error:
        found = " ".join(str(error).split())[:300]
        raise InputError(f"transformers cannot build the {encoder.kind} of this configuration: {found}") from None
