"""PixArt-alpha and PixArt-Sigma: cross-attention to T5 (Chen et al. 2023, 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from pyard.conditions import Condition
from pyard.errors import InputError
from pyard.models.wrapped.backbone import WrappedBackbone
from pyard.models.wrapped.config import WrappedConfig


class PixArt(WrappedBackbone):
    """`PixArtTransformer2DModel`; condition: tokens, mask."""

    transformer_name = "PixArtTransformer2DModel"
    row_arguments = ("hidden_states", "encoder_hidden_states", "encoder_attention_mask", "timestep")
    flow_time_scale = 1000.0
    attention_names = ("attn1",)
    output_places = {"norm_out": "norm_out", "scale_shift_table": "scale_shift_table", "proj_out": "proj_out"}  # noqa: RUF012

    @classmethod
    def check_settings(cls, config: WrappedConfig) -> None:
        found = config.transformer.get("out_channels") or config.sample_shape[0]
        if found not in (config.sample_shape[0], 2 * config.sample_shape[0]):
            raise InputError(f"PixArt: out_channels is {found}; expected {config.sample_shape[0]}, or twice as many")

    def run(self, x: torch.Tensor, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        output: torch.Tensor = self.transformer(
            x,
            timestep=times * self.config.time_scale,
            encoder_hidden_states=condition["tokens"],
            encoder_attention_mask=condition["mask"].to(x.dtype),
            added_cond_kwargs=self._size(x.shape[2] * self.config.pixels, x.shape[3] * self.config.pixels, x),
            return_dict=False,
        )[0]
        return output

    def time_vector(self, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        tokens = condition["tokens"]
        height, width = (side * self.config.pixels for side in self.config.sample_shape[1:])
        vector: torch.Tensor = self.transformer.adaln_single(
            times * self.config.time_scale,
            self._size(height, width, tokens),
            batch_size=len(times),
            hidden_dtype=tokens.dtype,
        )[1]
        return vector

    def _size(self, height: int, width: int, like: torch.Tensor) -> dict[str, Any]:
        # PixArt-alpha at 1024 pixels is told them.
        if not self.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        rows = like.shape[0]  # len() would make it a constant of an exported graph
        resolution = like.new_tensor([[height, width]]).expand(rows, 2)
        return {"resolution": resolution, "aspect_ratio": like.new_tensor([[height / width]]).expand(rows, 1)}

    def unembed(self, tokens: torch.Tensor, sample_shape: tuple[int, ...]) -> torch.Tensor:
        return unpatchify_channels_last(tokens, sample_shape, self.patch)

    def for_student(self, head: nn.Module) -> tuple[Self, nn.Module]:
        trunk, head = super().for_student(head)
        channels = self.config.sample_shape[0]
        if int(self.transformer.out_channels) != channels:
            head.proj_out = without_variance(head.proj_out, self.patch**2, channels)  # type: ignore[arg-type]
            settings = {**self.config.transformer, "out_channels": channels}
            trunk.config = dataclasses.replace(self.config, transformer=settings)
            trunk.transformer.out_channels = channels
            trunk.transformer.register_to_config(out_channels=channels)
        return trunk, head

    def on_base(self, state: dict[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # The student's output layer in place of the base's, whose predicted variance stays.
        channels, whole = self.config.sample_shape[0], dict(state)
        for name in ("proj_out.weight", "proj_out.bias"):
            mine, theirs = state[name], base[name]
            if len(theirs) == 2 * len(mine):
                wide = theirs.detach().clone().unflatten(0, (self.patch**2, -1))
                wide[:, :channels] = mine.unflatten(0, (self.patch**2, channels)).to(wide)
                whole[name] = wide.flatten(0, 1)
        return whole


def without_variance(layer: nn.Linear, places: int, channels: int) -> nn.Linear:
    """A layer with the first C output channels only of each of a patch's places; channels are last in a token."""
    narrow = nn.Linear(layer.in_features, places * channels, device=layer.weight.device, dtype=layer.weight.dtype)
    with torch.no_grad():
        for mine, theirs in ((narrow.weight, layer.weight), (narrow.bias, layer.bias)):
            mine.copy_(theirs.unflatten(0, (places, -1))[:, :channels].flatten(0, 1))
    return narrow


def unpatchify_channels_last(tokens: torch.Tensor, sample_shape: tuple[int, ...], patch: int) -> torch.Tensor:
    """Tokens (row, column, channel) to samples: [R, T, P*P*C] -> [R, C, h, w]."""
    rows, columns = sample_shape[1] // patch, sample_shape[2] // patch
    grid = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))  # [R, rows, columns, P, P, C]
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
