"""FLUX.2: double-stream, then single-stream blocks, which share their modulations, and rotary positions of text tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pixel_unshuffle

from pyard.conditions import Condition
from pyard.models.backbone import AttentionShape
from pyard.models.flux.network import Flux

_PACK = 2  # latents along one side of a token


class Flux2(Flux):
    """`Flux2Transformer2DModel`; condition: tokens and, if guidance is embedded, guidance.

    Samples are [C, h, w]; its pipelines call the same numbers, packed 2 x 2, latents of shape [4C, h/2, w/2].
    """

    transformer_name = "Flux2Transformer2DModel"
    row_arguments = ("hidden_states", "encoder_hidden_states", "temb_mod_img", "temb_mod_txt", "temb_mod")

    def run(self, x: torch.Tensor, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        rows, columns = x.shape[2] // _PACK, x.shape[3] // _PACK
        # Four coordinates of a token: number of the picture, row, column, and place in the text.
        places = torch.zeros(rows, columns, 4, device=x.device)
        places[..., 1] += torch.arange(rows, device=x.device)[:, None]
        places[..., 2] += torch.arange(columns, device=x.device)
        text_places = torch.zeros(condition["tokens"].shape[1], 4, device=x.device)
        text_places[:, 3] += torch.arange(condition["tokens"].shape[1], device=x.device)
        output = self.transformer(
            pixel_unshuffle(x, _PACK).flatten(2).transpose(1, 2),
            timestep=times * self.config.time_scale,
            guidance=self._guidance(condition),
            encoder_hidden_states=condition["tokens"],
            img_ids=places.flatten(0, 1),
            txt_ids=text_places,
            return_dict=False,
        )[0]
        return self.unembed(output, tuple(x.shape[1:]))

    def time_vector(self, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        # The transformer multiplies both by 1000 itself before it embeds them.
        guidance = self._guidance(condition)
        told = (times * self.config.time_scale * 1000).to(condition["tokens"].dtype)
        vector: torch.Tensor = self.transformer.time_guidance_embed(told, None if guidance is None else guidance * 1000)
        return vector

    def attention_shape(self, attention: nn.Module, sample_shape: tuple[int, ...]) -> AttentionShape:
        # Single-stream blocks have one matrix for queries, keys, values and the MLP.
        return AttentionShape(int(attention.heads), self.count_tokens(sample_shape), int(attention.head_dim))  # type: ignore[arg-type]

    def image_tokens(self, output: Any) -> torch.Tensor:
        image: torch.Tensor = output[1] if isinstance(output, tuple) else output[:, -self.current.tokens :]
        return image
