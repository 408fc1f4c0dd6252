"""Qwen-Image: joint attention with a language model's tokens and complex rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pixel_unshuffle

from pyard.conditions import Condition
from pyard.errors import InputError
from pyard.models.flux.network import unpack_tokens
from pyard.models.wrapped.backbone import WrappedBackbone
from pyard.models.wrapped.config import WrappedConfig
from pyard.models.wrapped.exportable import Rotation

_PACK = 2
_LONGEST_TEXT = 2048  # tokens; the pipeline takes 1024


class QwenImage(WrappedBackbone):
    """`QwenImageTransformer2DModel`; condition: tokens, mask and, where guidance is embedded, guidance."""

    transformer_name = "QwenImageTransformer2DModel"
    row_arguments = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb")
    unread_layers = ("attn.to_add_out", "txt_mlp")
    image_first = False

    @classmethod
    def check_settings(cls, config: WrappedConfig) -> None:
        for name in ("zero_cond_t", "use_layer3d_rope", "use_additional_t_cond"):
            if config.transformer.get(name):
                raise InputError(
                    f"Qwen-Image: {name} is set; pyard supports text-to-image models, which take no pictures as input"
                )

    @property
    def patch(self) -> int:
        return _PACK

    def run(self, x: torch.Tensor, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        rows, columns = x.shape[2] // _PACK, x.shape[3] // _PACK
        output = self.transformer(
            pixel_unshuffle(x, _PACK).flatten(2).transpose(1, 2),
            timestep=times * self.config.time_scale,
            guidance=condition["guidance"] if self.config.transformer.get("guidance_embeds") else None,
            encoder_hidden_states=condition["tokens"],
            encoder_hidden_states_mask=condition["mask"],
            img_shapes=[[(1, rows, columns)]],  # of all rows
            return_dict=False,
        )[0]
        return unpack_tokens(output, tuple(x.shape[1:]))

    def time_vector(self, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        told = (times * self.config.time_scale).to(condition["tokens"].dtype)
        more = (condition["guidance"] * 1000,) if self.config.transformer.get("guidance_embeds") else ()
        vector: torch.Tensor = self.transformer.time_text_embed(told, *more, condition["tokens"])
        return vector

    def prepare_for_export(self, sample_shape: tuple[int, ...]) -> None:
        grid = sample_shape[1] // _PACK, sample_shape[2] // _PACK
        self.transformer.pos_embed = RealPositions(self.transformer.pos_embed, *grid)

    def image_tokens(self, output: Any) -> torch.Tensor:
        image: torch.Tensor = output[1]
        return image

    def unembed(self, tokens: torch.Tensor, sample_shape: tuple[int, ...]) -> torch.Tensor:
        return unpack_tokens(tokens, sample_shape)


class RealPositions(nn.Module):
    """`QwenEmbedRope` in real numbers, for pictures of one size and texts whose length is no number yet.

    Args:
        stock: of the transformer; it puts the middle of a picture at 0.
        rows, columns: of the picture's tokens.
    """

    def __init__(self, stock: Any, rows: int, columns: int):
        super().__init__()
        image, text = stock([[(1, rows, columns)]], max_txt_seq_len=_LONGEST_TEXT, device=torch.device("cpu"))
        # No buffers, which a conversion to half precision would round.
        self._image, self._text = torch.view_as_real(image), torch.view_as_real(text)  # [T or n, Dh / 2, 2]

    def forward(
        self, img_shapes: Any, max_txt_seq_len: int, device: torch.device
    ) -> tuple[Rotation, Rotation]:  # of image tokens [T, Dh / 2], of text tokens [n, Dh / 2]
        # Gathered, since a slice that ends at a length makes it a constant.
        places = torch.arange(max_txt_seq_len, device=device)
        return Rotation(self._image), Rotation(self._text.index_select(0, places))
