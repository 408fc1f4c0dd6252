"""Z-Image: one stream of image and text tokens; its time runs the other way, and it returns the negated velocity."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from pyard.conditions import Condition
from pyard.errors import InputError
from pyard.models.pixart.network import unpatchify_channels_last
from pyard.models.wrapped.backbone import WrappedBackbone
from pyard.models.wrapped.config import WrappedConfig
from pyard.models.z_image.tensors import ZImageTensors


class ZImageConfig(WrappedConfig):
    """Sizes of `ZImageTransformer2DModel`."""

    depth_settings = ("n_layers",)
    heads_setting = "n_heads"


class ZImage(WrappedBackbone):
    """`ZImageTransformer2DModel`; condition: tokens, mask. Its refiners, which see one modality each, remember nothing."""

    config_class = ZImageConfig
    transformer_name = "ZImageTransformer2DModel"
    row_arguments = ("x", "attn_mask", "freqs_cis", "adaln_input")
    block_lists = ("layers",)
    attention_names = ("attention",)
    output_places = {"final_layer": "all_final_layer.2-1"}  # noqa: RUF012
    not_compiled = "its transformer depends on the length of each text, so every batch of prompts would be compiled again"
    on_tensors: ZImageTensors | None = None

    @classmethod
    def check_settings(cls, config: WrappedConfig) -> None:
        patches = list(config.transformer["all_patch_size"]), list(config.transformer["all_f_patch_size"])
        if patches != ([2], [1]):
            raise InputError(f"Z-Image: patches of {patches[0]} pixels and {patches[1]} frames; expected [2] and [1]")
        if config.transformer.get("siglip_feat_dim"):
            raise InputError(
                "Z-Image: this transformer takes pictures as input (siglip_feat_dim); expected a text-to-image one"
            )

    @property
    def patch(self) -> int:
        return 2

    def run(self, x: torch.Tensor, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        tokens, mask = condition["tokens"], condition["mask"]
        if self.on_tensors is not None:
            return self.unembed(self.on_tensors(x, self._time(times), tokens, mask), tuple(x.shape[1:]))
        # Without numbers, where costs are counted, every text is as long as the longest.
        lengths = [mask.shape[1]] * len(mask) if mask.is_meta or is_fake(mask) else condition.lengths
        texts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        pictures = list(x[:, :, None].unbind(0))  # [C, 1, h, w] each: videos of one frame
        output = self.transformer(pictures, self._time(times), texts, return_dict=False)[0]
        return -torch.stack([picture[:, 0] for picture in output])

    def prepare_for_export(self, sample_shape: tuple[int, ...]) -> None:
        self.on_tensors = ZImageTensors(self.transformer, sample_shape)

    def time_vector(self, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        vector: torch.Tensor = self.transformer.t_embedder(self._time(times) * self.transformer.t_scale)
        return vector.to(condition["tokens"].dtype)

    def _time(self, times: torch.Tensor) -> torch.Tensor:
        return 1 - times * self.config.time_scale

    def image_tokens(self, output: Any) -> torch.Tensor:
        image: torch.Tensor = output[:, : self.current.tokens]
        return image

    def last_linear(self, head: nn.Module) -> nn.Linear:
        layer: Any = head.get_submodule("final_layer.linear")
        plain: nn.Linear = layer.get_base_layer() if hasattr(layer, "lora_A") else layer
        return plain

    def unembed(self, tokens: torch.Tensor, sample_shape: tuple[int, ...]) -> torch.Tensor:
        return -unpatchify_channels_last(tokens[:, : self.count_tokens(sample_shape)], sample_shape, self.patch)
