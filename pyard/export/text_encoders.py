"""The text encoders of a pipeline as separate graphs, and the settings that turn a prompt into their inputs.

B batch · n tokens · D width of a token · E width of the pooled embedding
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from pyard.errors import InputError
from pyard.export.files import IR_VERSION
from pyard.export.parts import quiet_exporter, without_paths
from pyard.teachers.text_to_image import PipelineTextEncoder
from pyard.teachers.text_to_image.encoding import chat_texts
from pyard.version import __version__

_EXAMPLE = (5, 13)  # texts and tokens to trace with

# A call of a text encoder: the module, ids and mask, to [tokens] or [tokens, pooled].
Call = Callable[[Any, torch.Tensor, torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class EncoderSettings:
    """How a prompt becomes the inputs of one text encoder.

    Args:
        name: name of its folder.
        tokenizer: folder of its tokenizer.
        outputs: `tokens` [B, n, D], `pooled` [B, E], or both.
        max_length: largest number of tokens in a prompt.
        pad: number of the padding token.
        pads_to: length to pad to: `max_length`, or `longest` of the batch.
        pads_left: whether padding comes first.
        prefix, suffix: texts of a chat template before and after the prompt.
        plain: whether the prompt is lower-cased and stripped.
        dropped: number of tokens at the start whose embeddings are left out.
    """

    name: str
    tokenizer: str
    outputs: tuple[str, ...]
    max_length: int
    pad: int
    pads_to: str = "longest"
    pads_left: bool = False
    prefix: str = ""
    suffix: str = ""
    plain: bool = False
    dropped: int = 0


@dataclass(frozen=True)
class TextLayout:
    """How the outputs of the text encoders are combined into a condition.

    Args:
        encoders: settings of the pipeline's text encoders.
        tokens: rows of encoders. The tokens of a row's encoders are concatenated in the width D and padded with zeros, and the
            rows are concatenated in the length n. A pair of numbers is a block of zeros [n, D].
        pooled: encoders whose pooled embeddings are concatenated.
        masked: whether padding is masked; it is not for SD3 and FLUX, whose transformers attend to it.
    """

    encoders: tuple[EncoderSettings, ...]
    tokens: tuple[tuple[Any, ...], ...]
    pooled: tuple[str, ...] = ()
    masked: bool = True

    def to_json(self) -> dict[str, Any]:
        """The layout as stored in the folder's `config.json`."""
        return asdict(self)


class TextEncoders:
    """The text encoders of a student's pipeline, ready for export.

    Args:
        encoder: text encoder of the pipeline.
        transformer: settings of the student's transformer.
    """

    def __init__(self, encoder: PipelineTextEncoder, transformer: Mapping[str, Any]):
        self.components = encoder.components()
        self.layout, self._calls = _FAMILIES[encoder.family.backbone](encoder, self.components, transformer)

    def save_tokenizers(self, folder: Path) -> None:
        """Write each tokenizer into its own folder.

        Raises:
            InputError: a tokenizer has no tokenizer.json.
        """
        for settings in self.layout.encoders:
            place = folder / settings.tokenizer
            self.components[settings.tokenizer].save_pretrained(str(place))
            if not (place / "tokenizer.json").is_file():
                kind = type(self.components[settings.tokenizer]).__name__
                raise InputError(
                    f"{settings.tokenizer}: a {kind} has no tokenizer.json, which the runtime reads; use a fast tokenizer"
                )

    def trace(self, name: str, opset: int) -> ir.Model:
        """Trace one text encoder: input_ids and attention_mask, both int64 [B, n] -> tokens, pooled."""
        (settings,) = (each for each in self.layout.encoders if each.name == name)
        network = _Traced(self.components[name], self._calls[name], settings.outputs).eval()
        rows, tokens = _EXAMPLE
        sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
        if self._calls[name] in (_clip, _projected_clip):
            tokens = settings.max_length  # its position embedding ends there
        else:
            sizes[1] = torch.export.Dim("num_tokens")
        ids, mask = torch.ones(rows, tokens, dtype=torch.int64), torch.ones(rows, tokens, dtype=torch.int64)
        try:
            with quiet_exporter():
                program = torch.export.export(network, (ids, mask), dynamic_shapes=(sizes, dict(sizes)), strict=False)
                made = torch.onnx.export(
                    program,
                    input_names=["input_ids", "attention_mask"],
                    output_names=list(settings.outputs),
                    opset_version=opset,
                    dynamo=True,
                    verbose=False,
                )
        except Exception as error:  # whatever the exporter and transformers raise
            kind, reason = type(self.components[name]).__name__, " ".join(str(error).split())[:300]
            raise InputError(
                f"{name}: a {kind} cannot be traced for ONNX ({type(error).__name__}: {reason}); "
                "use --text_encoders none and encode prompts elsewhere"
            ) from error
        assert made is not None
        model: ir.Model = made.model
        without_paths(model)
        model.graph.name = f"pyard_{name}"
        model.ir_version, model.producer_name, model.producer_version = IR_VERSION[opset], "pyard", __version__
        return model


class _Traced(nn.Module):
    def __init__(self, encoder: nn.Module, call: Call, outputs: tuple[str, ...]):
        super().__init__()
        self.encoder, self._call, self._outputs = encoder, call, outputs

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = dict(zip(("tokens", "pooled"), self._call(self.encoder, ids, mask), strict=False))
        return tuple(results[name].float() for name in self._outputs)


def _t5(encoder: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    return [encoder(ids, attention_mask=mask)[0]]


def _t5_without_padding(encoder: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    tokens = encoder(ids, attention_mask=mask)[0]
    return [tokens * mask[..., None].to(tokens.dtype)]


def _unmasked_t5(encoder: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    return [encoder(ids)[0]]


def _projected_clip(encoder: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    found = encoder(ids, output_hidden_states=True)
    return [found.hidden_states[-2], found[0]]


def _clip(encoder: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    found = encoder(ids)
    return [found.last_hidden_state, found.pooler_output]


def _layers_of_language_model(*layers: int) -> Call:
    def call(encoder: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        # A position for each row: onnxruntime's rotary embedding wants tables of the whole batch.
        places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        found = encoder(input_ids=ids, attention_mask=mask, position_ids=places, output_hidden_states=True)
        return [torch.cat([found.hidden_states[layer] for layer in layers], dim=-1)]

    return call


def _settings(components: Mapping[str, Any], number: str, **facts: Any) -> EncoderSettings:
    tokenizer = components[f"tokenizer{number}"]
    pad = int(tokenizer.pad_token_id)
    left = tokenizer.padding_side == "left" and facts.get("pads_to") == "max_length"  # elsewhere the mask hides it
    return EncoderSettings(f"text_encoder{number}", f"tokenizer{number}", pad=pad, pads_left=left, **facts)


Found = tuple[TextLayout, dict[str, Call]]


def _pixart(encoder: PipelineTextEncoder, components: Mapping[str, Any], transformer: Mapping[str, Any]) -> Found:
    # The pipeline also removes HTML and addresses if bs4 and ftfy are installed; here that is left to the prompt's author.
    settings = _settings(components, "", outputs=("tokens",), max_length=encoder.max_sequence_length, plain=True)
    return TextLayout((settings,), (("text_encoder",),)), {"text_encoder": _t5}


def _sd3(encoder: PipelineTextEncoder, components: Mapping[str, Any], transformer: Mapping[str, Any]) -> Found:
    clip = dict(outputs=("tokens", "pooled"), max_length=int(components["tokenizer"].model_max_length), pads_to="max_length")
    encoders = [_settings(components, number, **clip) for number in ("", "_2")]
    calls: dict[str, Call] = dict.fromkeys(("text_encoder", "text_encoder_2"), _projected_clip)
    longest = encoder.max_sequence_length
    last: tuple[Any, ...] = ("text_encoder_3",)
    if "text_encoder_3" in components:
        encoders.append(_settings(components, "_3", outputs=("tokens",), max_length=longest, pads_to="max_length"))
        calls["text_encoder_3"] = _unmasked_t5
    else:
        last = (longest, int(transformer["joint_attention_dim"]))
    pair = ("text_encoder", "text_encoder_2")
    return TextLayout(tuple(encoders), (pair, last), pair, masked=False), calls


def _flux(encoder: PipelineTextEncoder, components: Mapping[str, Any], transformer: Mapping[str, Any]) -> Found:
    clip_tokens = int(components["tokenizer"].model_max_length)
    clip = _settings(components, "", outputs=("pooled",), max_length=clip_tokens, pads_to="max_length")
    t5 = _settings(components, "_2", outputs=("tokens",), max_length=encoder.max_sequence_length, pads_to="max_length")
    layout = TextLayout((clip, t5), (("text_encoder_2",),), ("text_encoder",), masked=False)
    return layout, {"text_encoder": _clip, "text_encoder_2": _unmasked_t5}


def _aura_flow(encoder: PipelineTextEncoder, components: Mapping[str, Any], transformer: Mapping[str, Any]) -> Found:
    t5 = _settings(components, "", outputs=("tokens",), max_length=encoder.max_sequence_length, pads_to="max_length")
    return TextLayout((t5,), (("text_encoder",),), masked=False), {"text_encoder": _t5_without_padding}


def _qwen_image(encoder: PipelineTextEncoder, components: Mapping[str, Any], transformer: Mapping[str, Any]) -> Found:
    about = encoder.settings
    prefix, suffix = about["template"].split("{}")
    dropped = int(about["dropped_tokens"])
    settings = _settings(
        components,
        "",
        outputs=("tokens",),
        max_length=encoder.max_sequence_length + dropped,
        prefix=prefix,
        suffix=suffix,
        dropped=dropped,
    )
    return TextLayout((settings,), (("text_encoder",),)), {"text_encoder": _layers_of_language_model(-1)}


def _z_image(encoder: PipelineTextEncoder, components: Mapping[str, Any], transformer: Mapping[str, Any]) -> Found:
    about = dict(max_length=encoder.max_sequence_length, **_template(components["tokenizer"], thinking=True))
    settings = _settings(components, "", outputs=("tokens",), **about)
    return TextLayout((settings,), (("text_encoder",),)), {"text_encoder": _layers_of_language_model(-2)}


def _flux2(encoder: PipelineTextEncoder, components: Mapping[str, Any], transformer: Mapping[str, Any]) -> Found:
    about = dict(max_length=encoder.max_sequence_length, **_template(components["tokenizer"], thinking=False))
    settings = _settings(components, "", outputs=("tokens",), pads_to="max_length", **about)
    # Flux2KleinPipeline's text_encoder_out_layers.
    calls = {"text_encoder": _layers_of_language_model(9, 18, 27)}
    return TextLayout((settings,), (("text_encoder",),), masked=False), calls


def _template(tokenizer: Any, *, thinking: bool) -> dict[str, str]:
    """What a chat template puts before and after a prompt."""
    mark = "\u241f"  # a letter that no template has
    prefix, suffix = chat_texts(tokenizer, [mark], thinking=thinking)[0].split(mark)
    return {"prefix": prefix, "suffix": suffix}


_FAMILIES: dict[str, Callable[[PipelineTextEncoder, Mapping[str, Any], Mapping[str, Any]], Found]] = {
    "pixart": _pixart,
    "sd3": _sd3,
    "aura_flow": _aura_flow,
    "flux": _flux,
    "flux2": _flux2,
    "qwen_image": _qwen_image,
    "z_image": _z_image,
}
