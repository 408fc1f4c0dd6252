"""Tiny random transformers of each family, as networks."""

from __future__ import annotations

from typing import Any

import torch

from pyard.conditions import Condition
from pyard.models.backbone import Denoiser
from pyard.models.families import FAMILIES, import_network

TEXT = 16  # width of the text tokens
_SIZES: dict[str, dict[str, Any]] = {
    "pixart": dict(
        sample_size=8, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
        cross_attention_dim=16, caption_channels=TEXT, use_additional_conditions=False,
    ),
    "sd3": dict(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=TEXT, pooled_projection_dim=12, pos_embed_max_size=24,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    ),
    "aura_flow": dict(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=TEXT, caption_projection_dim=32,
        pos_embed_max_size=144,
    ),
    "flux": dict(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ),
    "flux2": dict(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=True,
    ),
    "qwen_image": dict(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    ),
    "z_image": dict(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, qk_norm=True, cap_feat_dim=TEXT, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    ),
}  # fmt: skip
NAMES = tuple(_SIZES)
TIME_SCALES = {"pixart": 1000.0, "sd3": 1000.0}


def tiny_network(name: str, seed: int = 0, **sizes: Any) -> Denoiser:
    """A network whose every parameter is random, norms near 1; samples [4, 8, 8]."""
    import diffusers

    backbone: Any = import_network(FAMILIES[name])
    torch.manual_seed(seed)
    transformer = getattr(diffusers, backbone.transformer_name)(**{**_SIZES[name], **sizes})
    with torch.no_grad():
        for path, parameter in transformer.named_parameters():
            is_norm = parameter.ndim == 1 and "norm" in path and path.endswith("weight")
            parameter.copy_((1.0 if is_norm else 0.0) + (0.1 if is_norm else 0.2) * torch.randn(parameter.shape))
    return backbone.wrap(transformer.eval(), (4, 8, 8), time_scale=TIME_SCALES.get(name, 1.0))


def tiny_condition(name: str, lengths: tuple[int, ...] = (5, 3), seed: int = 0) -> Condition:
    """Random texts of these lengths, padded with zeros where the family masks padding."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    masked = name in ("pixart", "qwen_image", "z_image")
    mask = torch.arange(longest) < (torch.tensor(lengths)[:, None] if masked else longest)
    tokens = torch.randn(len(lengths), longest, TEXT, generator=generator) * mask.expand(len(lengths), -1)[..., None]
    tensors = {"tokens": tokens, "mask": mask.expand(len(lengths), -1).clone()}
    if name in ("sd3", "flux"):
        tensors["pooled"] = torch.randn(len(lengths), 12, generator=generator)
    if name in ("flux", "flux2"):
        tensors["guidance"] = torch.full((len(lengths),), 3.5)
    return Condition(tensors)
