"""The diffusers pipeline classes that can be teachers, and the refusal of others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pyard.errors import InputError
from pyard.storage.reading import read_object
from pyard.teachers.text_to_image import encoding
from pyard.teachers.text_to_image.families import INDEX_NAME, PipelineFamily


def _components(*needed: str, optional: tuple[str, ...] = ()) -> Mapping[str, bool]:
    return MappingProxyType(dict.fromkeys(needed, True) | dict.fromkeys(optional, False))


def _pixart(pipeline: str, max_sequence_length: int) -> PipelineFamily:
    return PipelineFamily(
        pipeline=pipeline,
        backbone="pixart",
        encode=encoding.PIXART,
        encoders=_components("tokenizer", "text_encoder"),
        cfg_scale=4.5,
        num_steps=20,
        max_sequence_length=max_sequence_length,
        default_size="sample_size",
        passes_sigmas=False,
        passes_mu="never",
        has_resolution_bins=True,
    )


_FAMILIES = (
    _pixart("PixArtAlphaPipeline", max_sequence_length=120),
    _pixart("PixArtSigmaPipeline", max_sequence_length=300),
    PipelineFamily(
        pipeline="StableDiffusion3Pipeline",
        backbone="sd3",
        encode=encoding.SD3,
        encoders=_components(
            "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", optional=("tokenizer_3", "text_encoder_3")
        ),
        cfg_scale=7.0,
        num_steps=28,
        max_sequence_length=256,
        longest_sequence=512,
        default_size="sample_size",
        passes_sigmas=False,
        passes_mu="dynamic",
        max_shift=1.16,
    ),
    PipelineFamily(
        pipeline="AuraFlowPipeline",
        backbone="aura_flow",
        encode=encoding.AURA_FLOW,
        encoders=_components("tokenizer", "text_encoder"),
        cfg_scale=3.5,
        num_steps=50,
        max_sequence_length=256,
        passes_sigmas=False,
        passes_mu="never",
    ),
    PipelineFamily(
        pipeline="FluxPipeline",
        backbone="flux",
        encode=encoding.FLUX,
        encoders=_components("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
        cfg_scale=1.0,
        num_steps=28,
        max_sequence_length=512,
        longest_sequence=512,
        guidance_value=3.5,
        without_guidance=None,
        packs=True,
        sizes="rounded",
    ),
    PipelineFamily(
        pipeline="Flux2KleinPipeline",
        backbone="flux2",
        encode=encoding.FLUX2_KLEIN,
        encoders=_components("tokenizer", "text_encoder"),
        cfg_scale=4.0,
        num_steps=50,
        max_sequence_length=512,
        packs=True,
        sizes="rounded",
        mu="fitted",
    ),
    PipelineFamily(
        pipeline="QwenImagePipeline",
        backbone="qwen_image",
        encode=encoding.QWEN_IMAGE,
        encoders=_components("tokenizer", "text_encoder"),
        cfg_scale=4.0,
        num_steps=50,
        max_sequence_length=512,
        longest_sequence=1024,
        negative_prompt=" ",
        guidance="norm",
        without_guidance=("true_cfg_scale", 1.0),
        packs=True,
        sizes="rounded",
    ),
    PipelineFamily(
        pipeline="ZImagePipeline",
        backbone="z_image",
        encode=encoding.Z_IMAGE,
        encoders=_components("tokenizer", "text_encoder"),
        cfg_scale=6.0,  # F_c + 5 (F_c - F_u)
        num_steps=50,
        max_sequence_length=512,
        guidance="z_image",
        without_guidance=("guidance_scale", 0.0),
    ),
)

PIPELINES: Mapping[str, PipelineFamily] = MappingProxyType({family.pipeline: family for family in _FAMILIES})

# Pipelines that users are likely to try, and why pyard does not support them.
_REFUSED = {
    r"^Sana": "its attention is linear: without a softmax there are no keys and values for a history to remember",
    r"Img2Img|Inpaint|Fill|Control|Kontext|Edit|Redux|Layered|Omni": "it starts from a picture; give the plain pipeline",
    r"PAG|Differential": "it has a guidance of its own; give the plain pipeline",
}


def pipeline_family(folder: str | Path) -> PipelineFamily:
    """The family of the diffusers pipeline in a folder.

    Raises:
        InputError: there is no pipeline, its class is not one of `PIPELINES`, which the message lists, or it is distilled.
    """
    folder = Path(folder)
    file = folder / INDEX_NAME
    if not file.is_file():
        raise InputError(f"{folder}: expected the folder of a diffusers pipeline; there is no {INDEX_NAME}")
    index = read_object(file, "the index of a diffusers pipeline")
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        reason = next((f": {why}" for pattern, why in _REFUSED.items() if re.search(pattern, name)), "")
        raise InputError(
            f"{folder} is a {name}, which pyard cannot use as a teacher{reason}. Expected one of {', '.join(PIPELINES)}"
        )
    if index.get("is_distilled"):
        raise InputError(
            f"{folder}: this {name} is distilled already (is_distilled in {INDEX_NAME}); give the model that it was distilled "
            "from, such as FLUX.2-klein-base-4B"
        )
    return PIPELINES[name]
