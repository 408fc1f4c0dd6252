"""AuraFlow: joint blocks, then blocks of one stream, with register tokens in front of the text."""

from __future__ import annotations

import math
from typing import Any

import torch

from pyard.conditions import Condition
from pyard.errors import InputError
from pyard.models.pixart.network import unpatchify_channels_last
from pyard.models.wrapped.backbone import WrappedBackbone
from pyard.models.wrapped.config import WrappedConfig

_PATCH = 2


class AuraFlowConfig(WrappedConfig):
    """Sizes of `AuraFlowTransformer2DModel`."""

    depth_settings = ("num_mmdit_layers", "num_single_dit_layers")


class AuraFlow(WrappedBackbone):
    """`AuraFlowTransformer2DModel`; condition: tokens; padding is zeros, which take part in attention."""

    config_class = AuraFlowConfig
    transformer_name = "AuraFlowTransformer2DModel"
    block_lists = ("joint_transformer_blocks", "single_transformer_blocks")
    image_first = False

    @classmethod
    def check_settings(cls, config: WrappedConfig) -> None:
        found = config.transformer.get("patch_size", _PATCH)
        if found != _PATCH:
            raise InputError(f"AuraFlow: patch_size is {found}; expected {_PATCH}")
        if not config.transformer["num_single_dit_layers"]:
            raise InputError("AuraFlow: num_single_dit_layers is 0; expected blocks of one stream behind the joint ones")

    def check_sample(self, sample_shape: tuple[int, ...]) -> None:
        super().check_sample(sample_shape)
        side = math.isqrt(int(self.config.transformer["pos_embed_max_size"])) * _PATCH
        if max(sample_shape[1:]) > side:
            raise InputError(f"samples of shape {tuple(sample_shape)}; the position embedding of this AuraFlow ends at {side}")

    def run(self, x: torch.Tensor, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        output: torch.Tensor = self.transformer(
            x,
            encoder_hidden_states=condition["tokens"],
            timestep=times * self.config.time_scale,
            return_dict=False,
        )[0]
        return output

    def time_vector(self, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        transformer = self.transformer
        embedded = transformer.time_step_embed(times * self.config.time_scale).to(condition["tokens"].dtype)
        vector: torch.Tensor = transformer.time_step_proj(embedded)
        return vector

    def image_tokens(self, output: Any) -> torch.Tensor:
        image: torch.Tensor = output[1] if isinstance(output, tuple) else output[:, -self.current.tokens :]
        return image

    def unembed(self, tokens: torch.Tensor, sample_shape: tuple[int, ...]) -> torch.Tensor:
        return unpatchify_channels_last(tokens, sample_shape, _PATCH)
