"""FLUX.1: double-stream, then single-stream blocks, with embedded guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pyard.conditions import Condition
from pyard.models.wrapped.backbone import WrappedBackbone
from pyard.models.wrapped.config import WrappedConfig

_PACK = 2  # latents along one side of a token


class FluxConfig(WrappedConfig):
    """Sizes of `FluxTransformer2DModel`."""

    depth_settings = ("num_layers", "num_single_layers")


class Flux(WrappedBackbone):
    """`FluxTransformer2DModel`; condition: tokens, pooled and, if guidance is embedded, guidance."""

    config_class = FluxConfig
    transformer_name = "FluxTransformer2DModel"
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    image_first = False

    @property
    def patch(self) -> int:
        return _PACK

    def run(self, x: torch.Tensor, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        rows, columns = x.shape[2] // _PACK, x.shape[3] // _PACK
        places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
        places[..., 1] += torch.arange(rows, device=x.device)[:, None]
        places[..., 2] += torch.arange(columns, device=x.device)
        output = self.transformer(
            pixel_unshuffle(x, _PACK).flatten(2).transpose(1, 2),
            timestep=times * self.config.time_scale,
            guidance=self._guidance(condition),
            encoder_hidden_states=condition["tokens"],
            pooled_projections=condition["pooled"],
            img_ids=places.flatten(0, 1),
            txt_ids=torch.zeros(condition["tokens"].shape[1], 3, device=x.device, dtype=x.dtype),
            return_dict=False,
        )[0]
        return self.unembed(output, tuple(x.shape[1:]))

    def time_vector(self, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        # The transformer multiplies both by 1000 itself before it embeds them.
        embed, guidance = self.transformer.time_text_embed, self._guidance(condition)
        told = (times * self.config.time_scale * 1000).to(condition["tokens"].dtype)
        more = () if guidance is None else (guidance * 1000,)
        vector: torch.Tensor = embed(told, *more, condition["pooled"])
        return vector

    def _guidance(self, condition: Condition) -> torch.Tensor | None:
        return condition["guidance"] if self.config.transformer.get("guidance_embeds") else None

    def image_tokens(self, output: Any) -> torch.Tensor:
        image: torch.Tensor = output[1]
        return image

    def unembed(self, tokens: torch.Tensor, sample_shape: tuple[int, ...]) -> torch.Tensor:
        return unpack_tokens(tokens, sample_shape)


def unpack_tokens(tokens: torch.Tensor, sample_shape: tuple[int, ...]) -> torch.Tensor:
    """Tokens (channel, row, column) of 2 x 2 latents to samples: [R, T, 4C] -> [R, C, h, w]."""
    grid = (sample_shape[1] // _PACK, sample_shape[2] // _PACK)
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), _PACK)
