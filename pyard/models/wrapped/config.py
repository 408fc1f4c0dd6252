"""The configuration of a wrapped transformer: its own settings, and what else a pass needs to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pyard.errors import InputError
from pyard.storage.numbers import number, whole_number


@dataclass(frozen=True)
class WrappedConfig:
    """Configuration of a backbone that is a diffusers transformer.

    Args:
        transformer: settings of the diffusers class, as in its `config.json`.
        sample_shape: [C, h, w] of the usual sample.
        time_scale: factor by which pyard's time is multiplied before it is given to the network; 1 if the network takes noise
            levels.
        pixels: number of pixels per element along one side of a sample, which is the VAE's factor; 1: samples are pictures.

    Class attributes:
        depth_settings: names of the settings that count blocks, in order of execution.
        heads_setting: name of the setting that counts query heads.
    """

    transformer: Mapping[str, Any]
    sample_shape: tuple[int, ...]
    time_scale: float = 1.0
    pixels: int = 8

    depth_settings: ClassVar[tuple[str, ...]] = ("num_layers",)
    heads_setting: ClassVar[str] = "num_attention_heads"

    def __post_init__(self) -> None:
        if not isinstance(self.transformer, Mapping):
            raise InputError(
                f"transformer: its configuration is a {type(self.transformer).__name__}; expected a mapping of settings"
            )
        settings = {key: value for key, value in self.transformer.items() if not key.startswith("_")}
        object.__setattr__(self, "transformer", _plain(settings))
        missing = [name for name in (*self.depth_settings, self.heads_setting) if name not in settings]
        if missing:
            raise InputError(f"transformer: its configuration has no {', '.join(missing)}")
        shape = tuple(whole_number("transformer: a size of sample_shape", size, 1, 2**20) for size in self.sample_shape)
        if not 1 <= len(shape) <= 6:
            raise InputError(f"transformer: sample_shape is {shape}; expected [C, h, w]")
        object.__setattr__(self, "sample_shape", shape)
        number("transformer: time_scale", self.time_scale, -1e6, 1e6)
        whole_number("transformer: pixels", self.pixels, 1, 2**12)
        # Checked before any block is built, because diffusers does not check these settings.
        for name in (*self.depth_settings, self.heads_setting):
            whole_number(f"transformer: {name}", settings[name], 0, 10**4)

    @property
    def depth(self) -> int:
        """L, the number of blocks."""
        return sum(int(self.transformer[name]) for name in self.depth_settings)

    @property
    def num_heads(self) -> int:
        """H, the number of query heads of the self-attentions."""
        return int(self.transformer[self.heads_setting])

    def to_json(self) -> dict[str, Any]:
        """The keyword arguments that create an equal configuration."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    """Replace tuples by lists, as JSON returns them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
