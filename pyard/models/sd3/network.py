"""Stable Diffusion 3 and 3.5: joint attention of image and text (Esser et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch

from pyard.conditions import Condition
from pyard.models.pixart.network import unpatchify_channels_last
from pyard.models.wrapped.backbone import WrappedBackbone


class SD3(WrappedBackbone):
    """`SD3Transformer2DModel`; condition: tokens, pooled. SD3.5 medium's second attention remembers, too."""

    transformer_name = "SD3Transformer2DModel"
    flow_time_scale = 1000.0
    attention_names = ("attn", "attn2")

    def run(self, x: torch.Tensor, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        output: torch.Tensor = self.transformer(
            x,
            timestep=times * self.config.time_scale,
            encoder_hidden_states=condition["tokens"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return output

    def time_vector(self, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        vector: torch.Tensor = self.transformer.time_text_embed(times * self.config.time_scale, condition["pooled"])
        return vector

    def image_tokens(self, output: Any) -> torch.Tensor:
        image: torch.Tensor = output[1]
        return image

    def unembed(self, tokens: torch.Tensor, sample_shape: tuple[int, ...]) -> torch.Tensor:
        return unpatchify_channels_last(tokens, sample_shape, self.patch)
