"""`ZImageTransformer2DModel.forward` on tensors instead of lists, as an exported graph needs it.

B rows · C channels · h, w sides of a sample · T image tokens · n text tokens · D hidden
"""

from __future__ import annotations

from typing import Any

import torch

from pyard.models.wrapped.exportable import Rotation

_MULTIPLE = 32  # both kinds of tokens are filled up to a multiple of it with a learned token
_PATCH = 2


class ZImageTensors:
    """The transformer's own layers, called for all rows at once.

    Args:
        transformer: whose layers they are.
        sample_shape: [C, h, w] of the samples.
    """

    def __init__(self, transformer: Any, sample_shape: tuple[int, ...]):
        self._transformer = transformer
        rope = transformer.rope_embedder
        tables = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
        self._tables = [torch.view_as_real(table) for table in tables]  # [positions, Dh / 2 of the axis, 2]
        self._rows, self._columns = sample_shape[1] // _PATCH, sample_shape[2] // _PATCH

    def __call__(
        self,
        x: torch.Tensor,  # [B, C, h, w]
        time: torch.Tensor,  # [B], the transformer's
        tokens: torch.Tensor,  # [B, n, D]
        mask: torch.Tensor,  # bool [B, n]; text comes first
    ) -> torch.Tensor:  # [B, T, C * 4]
        transformer = self._transformer
        adaln = transformer.t_embedder(time * transformer.t_scale).type_as(x)
        lengths = mask.sum(dim=1)
        filled = (lengths + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE  # [B]

        image, image_places = self._image(x, filled)
        image_rotation = self._rotation(image_places)
        for layer in transformer.noise_refiner:
            image = layer(image, None, image_rotation, adaln)

        # The longest text filled up has at most so many tokens; those that are too many are masked.
        text = torch.cat([tokens, tokens.new_zeros(tokens.shape[0], _MULTIPLE - 1, tokens.shape[2])], dim=1)
        number = torch.arange(text.shape[1], device=x.device)
        is_text, is_seen = number < lengths[:, None], number < filled[:, None]  # [B, n + 31]
        text = torch.where(is_text[..., None], transformer.cap_embedder(text), transformer.cap_pad_token)
        along = (number + 1).expand(is_seen.shape)
        text_places = torch.stack([along, along * 0, along * 0], dim=-1)
        text_rotation = self._rotation(text_places)
        for layer in transformer.context_refiner:
            text = layer(text, is_seen, text_rotation)

        tokens = torch.cat([image, text], dim=1)
        rotation = Rotation(torch.cat([image_rotation.pairs, text_rotation.pairs], dim=1))
        seen = torch.cat([torch.ones_like(image[..., 0], dtype=torch.bool), is_seen], dim=1)
        for layer in transformer.layers:
            tokens = layer(tokens, seen, rotation, adaln)
        output: torch.Tensor = transformer.all_final_layer[f"{_PATCH}-1"](tokens, c=adaln)
        return output

    def _image(self, x: torch.Tensor, filled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedded image tokens [B, T + padding, D], and their places [B, T + padding, 3] in time, rows and columns."""
        transformer = self._transformer
        rows, columns = self._rows, self._columns
        patches = x.unflatten(3, (columns, _PATCH)).unflatten(2, (rows, _PATCH))  # [B, C, rows, P, columns, P]
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, T, P * P * C]
        embedded = transformer.all_x_embedder[f"{_PATCH}-1"](patches)
        padding = -(rows * columns) % _MULTIPLE
        pad = transformer.x_pad_token.to(embedded.dtype).expand(embedded.shape[0], padding, -1)
        number = torch.arange(rows * columns, device=x.device)
        time = (filled[:, None] + 1).expand(-1, rows * columns)
        row, column = ((place * torch.ones_like(time)) for place in (number // columns, number % columns))
        places = torch.stack([time, row, column], dim=-1)
        nowhere = torch.zeros_like(places[:, :1]).expand(-1, padding, -1)
        return torch.cat([embedded, pad], dim=1), torch.cat([places, nowhere], dim=1)

    def _rotation(self, places: torch.Tensor) -> Rotation:  # int64 [B, n, 3] -> [B, n, Dh / 2]
        parts = [table[places[..., axis].clamp(max=len(table) - 1)] for axis, table in enumerate(self._tables)]
        return Rotation(torch.cat(parts, dim=-2))
