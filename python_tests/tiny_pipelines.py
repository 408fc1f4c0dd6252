"""Pipeline folders of each text-to-image family, tiny and random, in the classes of diffusers and transformers.

Every parameter is random, zero-initialised gates and output layers included; schedulers are configured as the published
pipelines are. VAEs shrink a picture 4 times, so 32 x 32 pixels are latents of 8 x 8 and 16 image tokens.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizers import clip_tokenizer, qwen_tokenizer, t5_tokenizer
from torch import nn

VAE_FACTOR = 4


def tiny_pipeline(name: str, folder: Path) -> Path:
    """Write the tiny pipeline `name` (a key of `TINY_PIPELINES`) into `folder`, and return that folder.

    The default size of pixart_alpha, pixart_sigma and sd3 is 32 x 32 pixels; ask for it where the others have 512 or more.
    PixArt's stock pipelines refuse it unless they are called with use_resolution_binning=False.
    """
    shutil.copytree(_built(name), folder, dirs_exist_ok=True)
    return folder


@cache
def _built(name: str) -> Path:
    # Kept as long as the process lives; the finalizer of the temporary folder removes it.
    _KEPT.append(tempfile.TemporaryDirectory(prefix=f"tiny-{name}-"))
    folder = Path(_KEPT[-1].name)
    TINY_PIPELINES[name]().save_pretrained(str(folder))
    return folder


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def randomise(module: Any, seed: int) -> Any:
    """Give every parameter a random value of a size that keeps activations near 1; scales of norms stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(noise)
            elif parameter.ndim >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith(("weight", "gamma")):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return module.eval()


def _pixart_alpha(sample_size: int = 8) -> Any:
    from diffusers import PixArtAlphaPipeline

    return PixArtAlphaPipeline(**_pixart(sample_size, scaling_factor=0.18215))


def _pixart_alpha_1024() -> Any:
    # This latent size alone makes pipeline and transformer condition on resolution and aspect ratio.
    return _pixart_alpha(sample_size=128)


def _pixart_sigma() -> Any:
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline(**_pixart(8, scaling_factor=0.13025, seed=7))


def _pixart(sample_size: int, scaling_factor: float, seed: int = 1) -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=3,
        patch_size=2,
        num_attention_heads=3,  # the hidden size is a multiple of 3: height, width and aspect ratio share its channels
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=24,
        caption_channels=20,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return dict(
        tokenizer=tokenizer,
        text_encoder=_t5(len(tokenizer), 20),
        transformer=randomise(transformer, seed),
        vae=_vae(scaling_factor=scaling_factor),
        scheduler=DPMSolverMultistepScheduler(
            num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", algorithm_type="dpmsolver++",
            solver_order=2, solver_type="midpoint", lower_order_final=True, prediction_type="epsilon",
        ),
    )  # fmt: skip


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    tokenizers = clip_tokenizer(), clip_tokenizer(pad_token="!"), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=12,
        caption_projection_dim=24,
        joint_attention_dim=44,
        pooled_projection_dim=12 + 20,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=randomise(transformer, 1),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        tokenizer=tokenizers[0],
        text_encoder=_clip(CLIPTextModelWithProjection, tokenizers[0], hidden_size=16, projection_dim=12, seed=3),
        tokenizer_2=tokenizers[1],
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizers[1], hidden_size=24, projection_dim=20, seed=4),
        tokenizer_3=tokenizers[2],
        text_encoder_3=_t5(len(tokenizers[2]), 44),
    )


def _aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=32,
        pos_embed_max_size=128**2,  # its pipeline draws 1024 pixels unless it is asked for others
    )
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=20, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=randomise(UMT5EncoderModel(config), 5),
        vae=_vae(scaling_factor=0.13025),
        transformer=randomise(transformer, 1),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.73),
    )


def _flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
            base_image_seq_len=256, max_image_seq_len=4096,
        ),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        tokenizer=clip,
        text_encoder=_clip(CLIPTextModel, clip, hidden_size=12, projection_dim=12, seed=3),
        tokenizer_2=t5,
        text_encoder_2=_t5(len(t5), 20),
        transformer=randomise(transformer, 1),
    )  # fmt: skip


def _flux2_klein() -> Any:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    # The pipeline takes what layers 9, 18 and 27 return.
    config = _qwen3(tokenizer, hidden_size=8, num_hidden_layers=28, head_dim=4)
    encoder = randomise(Qwen3ForCausalLM(config), 3)
    for layer in encoder.model.layers:  # so many random layers would make rounding grow
        layer.self_attn.o_proj.weight.data *= 0.2
        layer.mlp.down_proj.weight.data *= 0.2
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = _vae(AutoencoderKLFlux2)
    generator = torch.Generator().manual_seed(4)
    vae.bn.running_mean.copy_(0.5 * torch.randn(16, generator=generator))
    vae.bn.running_var.copy_(0.5 + torch.rand(16, generator=generator))
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        ),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=randomise(transformer, 1),
    )  # fmt: skip


def _qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            **size,
            vocab_size=len(tokenizer),
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e6),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16),
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7571, -0.7089, 0.5517, 0.1075],
        latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9,
            base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential",
        ),
        vae=randomise(vae, 2),
        text_encoder=randomise(Qwen2_5_VLForConditionalGeneration(config), 3),
        tokenizer=tokenizer,
        transformer=randomise(transformer, 1),
    )  # fmt: skip


def _z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    tokenizer = qwen_tokenizer()
    config = _qwen3(tokenizer, hidden_size=20, num_hidden_layers=3, head_dim=8)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=20,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=randomise(Qwen3Model(config), 3),
        tokenizer=tokenizer,
        transformer=randomise(transformer, 1),
    )


TINY_PIPELINES: dict[str, Callable[[], Any]] = {
    "pixart_alpha": _pixart_alpha,
    "pixart_alpha_1024": _pixart_alpha_1024,
    "pixart_sigma": _pixart_sigma,
    "sd3": _sd3,
    "aura_flow": _aura_flow,
    "flux": _flux,
    "flux2_klein": _flux2_klein,
    "qwen_image": _qwen_image,
    "z_image": _z_image,
}


def _vae(kind: Any = None, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    levels = 3  # 2 ** (levels - 1) = VAE_FACTOR
    vae = (kind or AutoencoderKL)(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **settings,
    )
    return randomise(vae, 2)


def _qwen3(tokenizer: Any, **sizes: int) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )


def _t5(vocab_size: int, d_model: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocab_size, d_model=d_model, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return randomise(T5EncoderModel(config), 5)


def _clip(kind: Any, tokenizer: Any, hidden_size: int, projection_dim: int, seed: int) -> Any:
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=24,
        projection_dim=projection_dim,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return randomise(kind(config), seed)
