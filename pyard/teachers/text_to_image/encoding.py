"""How each pipeline class encodes text: its own `encode_prompt`, and which part of the result is text and not padding.

n tokens of a text · D width of a token · E width of the pooled embedding
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pyard.conditions import Condition
from pyard.errors import InputError

Tensors = dict[str, torch.Tensor]  # tokens [n, D], and pooled [E] where the transformer has it


class Limited(NamedTuple):
    """Texts as given to one of the pipeline's tokenizers, and how many tokens of each it keeps."""

    tokenizer: Any
    texts: list[str]
    limit: int


@dataclass(frozen=True)
class TextShape:
    """The shape of the embeddings that a transformer gets for one text.

    Args:
        tokens: n, the number of tokens of the longest text.
        width: D, the width of a token.
        pooled: E; None: no pooled embedding.
        padded: whether every text has n tokens, because the transformer attends to padding.
    """

    tokens: int
    width: int
    pooled: int | None
    padded: bool

    @property
    def numbers(self) -> int:
        """The number of values in the embedding of the longest text."""
        return self.tokens * self.width + (self.pooled or 0)

    def condition(self, constants: Mapping[str, float]) -> Condition:
        """A condition of this shape for one sample, on the meta device.

        Args:
            constants: what every prompt is conditioned on beside its text.
        """
        with torch.device("meta"):
            tensors = {"tokens": torch.empty(1, self.tokens, self.width), "mask": torch.empty(1, self.tokens, dtype=torch.bool)}
            if self.pooled is not None:
                tensors["pooled"] = torch.empty(1, self.pooled)
            return Condition(tensors | {name: torch.empty(1) for name in constants})


@dataclass(frozen=True)
class PromptEncoding:
    """How a pipeline class encodes text.

    Args:
        encode: function of (pipeline, texts, max_sequence_length, device) that returns the tensors of each text.
        limits: function of (pipeline, texts, max_sequence_length) that returns what the tokenizers get.
        settings: other settings that determine the embeddings, JSON-able.
        width: name of the transformer's setting that is D.
        pooled: name of the setting that is E; None: no pooled embedding.
        padded: whether padding is kept.
        clip_tokens: number of CLIP tokens that precede those limited by `max_sequence_length`.
        template_tokens: number of template tokens, which the text encoder sees and the transformer does not.
    """

    encode: Callable[[Any, list[str], int, torch.device], list[Tensors]]
    limits: Callable[[Any, list[str], int], list[Limited]]
    settings: Callable[[Any], dict[str, Any]] = lambda pipeline: {}
    width: str = "joint_attention_dim"
    pooled: str | None = None
    padded: bool = False
    clip_tokens: int = 0
    template_tokens: int = 0

    def shape(self, transformer: Mapping[str, Any], max_sequence_length: int) -> TextShape:
        """The shape that a transformer with these settings gets for a text; an InputError if a setting is missing."""
        names = (self.width, self.pooled)
        missing = [name for name in names if name is not None and not isinstance(transformer.get(name), int)]
        if missing:
            raise InputError(f"the transformer's configuration has no {missing[0]}, the width of its text embeddings")
        pooled = None if self.pooled is None else int(transformer[self.pooled])
        return TextShape(self.clip_tokens + max_sequence_length, int(transformer[self.width]), pooled, self.padded)


def _pixart(pipeline: Any, texts: list[str], max_length: int, device: torch.device) -> list[Tensors]:
    tokens, mask, _, _ = pipeline.encode_prompt(
        texts, do_classifier_free_guidance=False, device=device, clean_caption=True, max_sequence_length=max_length
    )
    return [{"tokens": one[kept.bool()]} for one, kept in zip(tokens, mask, strict=True)]


def _pixart_limits(pipeline: Any, texts: list[str], max_length: int) -> list[Limited]:
    return [Limited(pipeline.tokenizer, pipeline._text_preprocessing(texts, clean_caption=True), max_length)]


def _pixart_settings(pipeline: Any) -> dict[str, Any]:
    from diffusers.utils import is_bs4_available, is_ftfy_available

    # The pipeline cleans captions only where these libraries are installed.
    return {"clean_caption": is_bs4_available() and is_ftfy_available()}


def _sd3(pipeline: Any, texts: list[str], max_length: int, device: torch.device) -> list[Tensors]:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        texts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=max_length
    )
    return [{"tokens": one, "pooled": vector} for one, vector in zip(tokens, pooled, strict=True)]


def _sd3_limits(pipeline: Any, texts: list[str], max_length: int) -> list[Limited]:
    clip = [
        Limited(tokenizer, texts, pipeline.tokenizer_max_length) for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    return clip if pipeline.text_encoder_3 is None else [*clip, Limited(pipeline.tokenizer_3, texts, max_length)]


def _flux(pipeline: Any, texts: list[str], max_length: int, device: torch.device) -> list[Tensors]:
    tokens, pooled, _ = pipeline.encode_prompt(texts, None, device=device, max_sequence_length=max_length)
    return [{"tokens": one, "pooled": vector} for one, vector in zip(tokens, pooled, strict=True)]


def _flux_limits(pipeline: Any, texts: list[str], max_length: int) -> list[Limited]:
    clip = Limited(pipeline.tokenizer, texts, pipeline.tokenizer_max_length)
    return [clip, Limited(pipeline.tokenizer_2, texts, max_length)]


def _flux2_klein(pipeline: Any, texts: list[str], max_length: int, device: torch.device) -> list[Tensors]:
    tokens, _ = pipeline.encode_prompt(texts, device=device, max_sequence_length=max_length)
    return [{"tokens": one} for one in tokens]


def _flux2_klein_limits(pipeline: Any, texts: list[str], max_length: int) -> list[Limited]:
    return [Limited(pipeline.tokenizer, chat_texts(pipeline.tokenizer, texts, thinking=False), max_length)]


def _aura_flow(pipeline: Any, texts: list[str], max_length: int, device: torch.device) -> list[Tensors]:
    tokens, *_ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, device=device, max_sequence_length=max_length)
    return [{"tokens": one} for one in tokens]


def _aura_flow_limits(pipeline: Any, texts: list[str], max_length: int) -> list[Limited]:
    return [Limited(pipeline.tokenizer, texts, max_length)]


def _qwen_image(pipeline: Any, texts: list[str], max_length: int, device: torch.device) -> list[Tensors]:
    tokens, mask = pipeline.encode_prompt(texts, device=device, max_sequence_length=max_length)
    if mask is None:  # no text of the batch is shorter than another
        return [{"tokens": one} for one in tokens]
    return [{"tokens": one[kept.bool()]} for one, kept in zip(tokens, mask, strict=True)]


def _qwen_image_limits(pipeline: Any, texts: list[str], max_length: int) -> list[Limited]:
    whole = [pipeline.prompt_template_encode.format(text) for text in texts]
    return [Limited(pipeline.tokenizer, whole, max_length + pipeline.prompt_template_encode_start_idx)]


def _qwen_image_settings(pipeline: Any) -> dict[str, Any]:
    return {"template": pipeline.prompt_template_encode, "dropped_tokens": pipeline.prompt_template_encode_start_idx}


def _z_image(pipeline: Any, texts: list[str], max_length: int, device: torch.device) -> list[Tensors]:
    # The pipeline modifies the list that it is given.
    tokens, _ = pipeline.encode_prompt(
        list(texts), device=device, do_classifier_free_guidance=False, max_sequence_length=max_length
    )
    return [{"tokens": one} for one in tokens]


def _z_image_limits(pipeline: Any, texts: list[str], max_length: int) -> list[Limited]:
    return [Limited(pipeline.tokenizer, chat_texts(pipeline.tokenizer, texts, thinking=True), max_length)]


def chat_texts(tokenizer: Any, texts: list[str], *, thinking: bool) -> list[str]:
    """Texts as a user's messages in a language model's chat template.

    Args:
        tokenizer: with the template.
        texts: the messages.
        thinking: whether the model may think before it answers, which changes the template's end.
    """
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for text in texts
    ]


# Padding can be dropped for transformers that mask it or take lists of tensors; SD3, FLUX and AuraFlow attend to it.
PIXART = PromptEncoding(_pixart, _pixart_limits, _pixart_settings, width="caption_channels")
SD3 = PromptEncoding(_sd3, _sd3_limits, pooled="pooled_projection_dim", padded=True, clip_tokens=77)
FLUX = PromptEncoding(_flux, _flux_limits, pooled="pooled_projection_dim", padded=True)
FLUX2_KLEIN = PromptEncoding(_flux2_klein, _flux2_klein_limits, padded=True)
AURA_FLOW = PromptEncoding(_aura_flow, _aura_flow_limits, padded=True)
QWEN_IMAGE = PromptEncoding(_qwen_image, _qwen_image_limits, _qwen_image_settings, template_tokens=34)
Z_IMAGE = PromptEncoding(_z_image, _z_image_limits, width="cap_feat_dim")
