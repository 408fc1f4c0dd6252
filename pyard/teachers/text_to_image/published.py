"""The settings of published text-to-image pipelines by name, from which costs are computed without any weights.

The numbers are those in each model's config.json files, as far as shapes and times depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedPipeline:
    """Settings of a published pipeline.

    Args:
        name: short name.
        repository: repository in which it is published, `owner/name`.
        pipeline: name of its diffusers class.
        transformer, vae: settings of its transformer and VAE.
        scheduler: settings of its scheduler, with `_class_name`.
        encoders: transformers class and settings of each text encoder, by component.
    """

    name: str
    repository: str
    pipeline: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    encoders: Mapping[str, tuple[str, Mapping[str, Any]]]


def published_pipeline(name: str) -> PublishedPipeline | None:
    """The pipeline with this short name, repository (`owner/name`) or last part of one, in any case; None: not known."""
    wanted = name.strip("/").lower()
    for found in PUBLISHED:
        if wanted in (found.name, found.repository.lower(), found.repository.lower().rpartition("/")[2]):
            return found
    return None


_KL = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]}
_QWEN_VAE = {"_class_name": "AutoencoderKLQwenImage", "z_dim": 16, "temperal_downsample": [False, True, True]}

_T5_XXL = ("T5EncoderModel", dict(
    model_type="t5", vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
    feed_forward_proj="gated-gelu",
))  # fmt: skip
_CLIP_L = dict(
    model_type="clip_text_model", vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
    num_attention_heads=12, max_position_embeddings=77, projection_dim=768, hidden_act="quick_gelu",
)  # fmt: skip
_CLIP_G = dict(
    model_type="clip_text_model", vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
    num_attention_heads=20, max_position_embeddings=77, projection_dim=1280, hidden_act="gelu",
)  # fmt: skip
_QWEN25_VL = ("Qwen2_5_VLForConditionalGeneration", dict(
    model_type="qwen2_5_vl", tie_word_embeddings=False,
    text_config=dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=128000,
        rope_parameters=dict(rope_type="default", mrope_section=[16, 24, 24], rope_theta=1e6),
    ),
    vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584),
))  # fmt: skip
_QWEN3 = ("Qwen3Model", dict(
    model_type="qwen3", vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
))  # fmt: skip

_QWEN3_CAUSAL_4B = ("Qwen3ForCausalLM", {**_QWEN3[1], "tie_word_embeddings": True})
_QWEN3_CAUSAL_8B = ("Qwen3ForCausalLM", {**_QWEN3[1], "hidden_size": 4096, "intermediate_size": 12288})

_DPM = dict(
    _class_name="DPMSolverMultistepScheduler", num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02,
    beta_schedule="linear", algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="epsilon",
)  # fmt: skip


def _flow(**settings: Any) -> dict[str, Any]:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **settings}


def _pixart(name: str, repository: str, pipeline: str) -> PublishedPipeline:
    transformer = dict(
        sample_size=128, patch_size=2, in_channels=4, out_channels=8, num_layers=28, num_attention_heads=16,
        attention_head_dim=72, cross_attention_dim=1152, caption_channels=4096, num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, attention_bias=True, interpolation_scale=2,
        use_additional_conditions=pipeline == "PixArtAlphaPipeline",
    )  # fmt: skip
    return PublishedPipeline(name, repository, pipeline, transformer, _KL, _DPM, {"text_encoder": _T5_XXL})


def _sd3(name: str, repository: str, width: int, depth: int, **settings: Any) -> PublishedPipeline:
    transformer = dict(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=depth, num_attention_heads=width,
        attention_head_dim=64, caption_projection_dim=64 * width, joint_attention_dim=4096, pooled_projection_dim=2048,
        **settings,
    )  # fmt: skip
    encoders = {
        "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
        "text_encoder_3": _T5_XXL,
    }
    return PublishedPipeline(name, repository, "StableDiffusion3Pipeline", transformer, _KL, _flow(shift=3.0), encoders)


def _flux2_klein(name: str, repository: str, layers: tuple[int, int], heads: int, encoder: Any) -> PublishedPipeline:
    transformer = dict(
        patch_size=1, in_channels=128, num_layers=layers[0], num_single_layers=layers[1], attention_head_dim=128,
        num_attention_heads=heads, joint_attention_dim=3 * encoder[1]["hidden_size"], timestep_guidance_channels=256,
        mlp_ratio=3.0, axes_dims_rope=[32, 32, 32, 32], rope_theta=2000, eps=1e-6, guidance_embeds=False,
    )  # fmt: skip
    vae = {"_class_name": "AutoencoderKLFlux2", "block_out_channels": [128, 256, 512, 512]}
    scheduler = _flow(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return PublishedPipeline(name, repository, "Flux2KleinPipeline", transformer, vae, scheduler, {"text_encoder": encoder})


PUBLISHED = (
    _pixart("pixart-alpha", "PixArt-alpha/PixArt-XL-2-1024-MS", "PixArtAlphaPipeline"),
    _pixart("pixart-sigma", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "PixArtSigmaPipeline"),
    _sd3("sd3-medium", "stabilityai/stable-diffusion-3-medium-diffusers", 24, 24, pos_embed_max_size=192, qk_norm=None),
    _sd3("sd3.5-medium", "stabilityai/stable-diffusion-3.5-medium", 24, 24, pos_embed_max_size=384, qk_norm="rms_norm",
         dual_attention_layers=list(range(13))),
    _sd3("sd3.5-large", "stabilityai/stable-diffusion-3.5-large", 38, 38, pos_embed_max_size=192, qk_norm="rms_norm"),
    PublishedPipeline(
        "flux.1-dev", "black-forest-labs/FLUX.1-dev", "FluxPipeline",
        dict(patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
             joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True),
        _KL,
        _flow(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
              max_image_seq_len=4096),
        {"text_encoder": ("CLIPTextModel", _CLIP_L), "text_encoder_2": _T5_XXL},
    ),
    _flux2_klein("flux.2-klein-4b", "black-forest-labs/FLUX.2-klein-base-4B", (5, 20), 24, _QWEN3_CAUSAL_4B),
    _flux2_klein("flux.2-klein-9b", "black-forest-labs/FLUX.2-klein-base-9B", (8, 24), 32, _QWEN3_CAUSAL_8B),
    PublishedPipeline(
        "qwen-image", "Qwen/Qwen-Image", "QwenImagePipeline",
        dict(patch_size=2, in_channels=64, out_channels=16, num_layers=60, attention_head_dim=128, num_attention_heads=24,
             joint_attention_dim=3584, guidance_embeds=False, axes_dims_rope=[16, 56, 56]),
        _QWEN_VAE,
        _flow(shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
              max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential"),
        {"text_encoder": _QWEN25_VL},
    ),
    PublishedPipeline(
        "z-image", "Tongyi-MAI/Z-Image", "ZImagePipeline",
        dict(all_patch_size=[2], all_f_patch_size=[1], in_channels=16, dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30,
             n_kv_heads=30, norm_eps=1e-5, qk_norm=True, cap_feat_dim=2560, rope_theta=256.0, t_scale=1000.0,
             axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512]),
        _KL,
        _flow(shift=3.0, use_dynamic_shifting=False),
        {"text_encoder": _QWEN3},
    ),
)  # fmt: skip
