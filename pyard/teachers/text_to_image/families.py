"""The differences between diffusers' text-to-image pipelines: guidance, defaults, sizes, and how each calls its scheduler.

C latent channels · h, w height and width of the latents · sigma 1 noise ... 0 data
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch

from pyard.errors import InputError
from pyard.models.codec import AUTOENCODERS
from pyard.models.wrapped.checkpoint import transformer_folder
from pyard.storage.numbers import whole_number
from pyard.storage.reading import read_object, reading
from pyard.teachers.text_to_image import encoding

INDEX_NAME = "model_index.json"

GuidanceKind = Literal["plain", "norm", "z_image"]

_PATCH = 2  # of packed latents, in latents along a side
# Default size, in latents along a side, of pipelines whose transformer's configuration has no size.
_DEFAULT_LATENTS = 128


class SchedulerCall(TypedDict, total=False):
    """Keyword arguments of a scheduler's `set_timesteps`, in addition to the number of steps or instead of it."""

    sigmas: list[float]
    mu: float


@dataclass(frozen=True)
class PipelineConfigs:
    """Configurations of a pipeline's transformer and VAE, as in their config.json.

    Args:
        transformer: configuration of the transformer.
        vae: configuration of the VAE; None: the pipeline has no VAE, and its samples are pixels.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any] | None

    @classmethod
    def read(cls, folder: str | Path, transformer: Path | None = None) -> PipelineConfigs:
        """Read the configurations of a pipeline folder.

        Args:
            folder: the pipeline's folder.
            transformer: what is read in place of its transformer. The configuration in that folder counts, as it does in
                diffusers; a single file has none.

        Raises:
            InputError: one of the files is missing or damaged.
        """
        folder = Path(folder)
        index = read_object(folder / INDEX_NAME, "the index of a diffusers pipeline")
        vae = None
        if component_class(index, "vae", folder) is not None:
            vae = read_object(folder / "vae" / "config.json", "the configuration of an autoencoder")
        place = folder / "transformer"
        if transformer is not None and transformer.is_dir():
            place = transformer_folder(transformer)
        return cls(read_object(place / "config.json", "the configuration of a transformer"), vae)

    def number(self, name: str) -> int:
        """An integer of the transformer's configuration."""
        return whole_number(f"the transformer's configuration: {name}", self.transformer.get(name), 1, 2**16)

    @property
    def vae_factor(self) -> int:
        """Number of pixels along one side of a latent."""
        if self.vae is None:
            return 1
        kind = AUTOENCODERS.get(str(self.vae.get("_class_name")))
        if kind is None:
            raise InputError(f"the VAE is a {self.vae.get('_class_name')}; expected one of {', '.join(AUTOENCODERS)}")
        with reading("the VAE's configuration"):
            return whole_number("the VAE's factor", kind.factor(self.vae), 1, 2**10)


@dataclass(frozen=True)
class PipelineFamily:
    """What pyard needs to know about one diffusers pipeline class.

    Args:
        pipeline: name of the pipeline class.
        backbone: name of the backbone that its transformer becomes.
        encode: how to call its `encode_prompt`.
        encoders: the components with which it encodes text, and whether each is required.
        cfg_scale: its default guidance, as s in F_u + s (F_c - F_u).
        num_steps: its default number of steps.
        max_sequence_length: its default limit of text tokens.
        longest_sequence: largest allowed limit of text tokens; None: any.
        negative_prompt: default negative prompt; `QwenImagePipeline` only guides if one is given, and its model card uses " ".
        guidance: how the two predictions are combined. plain: as above. norm: as above, then each 2 x 2 patch (all channels) is
            scaled to the norm that it has in F_c. z_image: as above, but only F_c if 1 - sigma > cfg_truncation; a sample whose
            norm is more than cfg_normalization (unless 0) times that of F_c is scaled down to it.
        cfg_normalization: default value, for z_image.
        cfg_truncation: default value, for z_image.
        guidance_value: default guidance scale that is passed to a transformer with `guidance_embeds`; None: there is none.
        packs: whether its transformer's channels are those of packed 2 x 2 latents.
        default_size: number of latents along a side by default: `sample_size`, as in the transformer's configuration, or
            `fixed`, 128.
        sizes: whether a size that is not a whole number of patches is `refused` or `rounded` down.
        passes_sigmas: whether it passes its own, evenly spaced sigmas to the scheduler.
        passes_mu: when it passes a shift to the scheduler that grows with the number of image tokens; `dynamic`: if the
            scheduler uses it.
        mu: how that shift grows: `linear` between the scheduler's `base_shift` and `max_shift`, or `fitted`, as FLUX.2's, which
            also depends on the number of steps.
        max_shift: largest value of a linear shift, if the scheduler's configuration has none.
        without_guidance: argument of its call that switches classifier-free guidance off, and the value; None: it is off by
            default.
        has_resolution_bins: whether its call draws the nearest of a list of sizes by default.
    """

    pipeline: str
    backbone: str
    encode: encoding.PromptEncoding
    encoders: Mapping[str, bool]
    cfg_scale: float
    num_steps: int
    max_sequence_length: int
    longest_sequence: int | None = None
    negative_prompt: str = ""
    guidance: GuidanceKind = "plain"
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    guidance_value: float | None = None
    packs: bool = False
    default_size: Literal["sample_size", "fixed"] = "fixed"
    sizes: Literal["refused", "rounded"] = "refused"
    passes_sigmas: bool = True
    passes_mu: Literal["never", "dynamic", "always"] = "always"
    mu: Literal["linear", "fitted"] = "linear"
    max_shift: float = 1.15
    without_guidance: tuple[str, float] | None = ("guidance_scale", 1.0)
    has_resolution_bins: bool = False

    def patch_size(self, configs: PipelineConfigs) -> int:
        """Number of latents along one side of an image token."""
        patch = configs.transformer.get("patch_size") if self.default_size == "sample_size" else _PATCH
        return int(patch or _PATCH)

    def embedded_guidance(self, configs: PipelineConfigs) -> float | None:
        """The default guidance scale in the condition; None: the transformer takes none.

        Raises:
            InputError: the transformer takes one and the pipeline has no default.
        """
        if not configs.transformer.get("guidance_embeds"):
            return None
        if self.guidance_value is None:
            raise InputError(
                f"{self.pipeline}: its transformer needs an embedded guidance, which has no default here; give "
                "embedded_guidance"
            )
        return self.guidance_value

    def default_pixels(self, configs: PipelineConfigs) -> tuple[int, int]:
        """(height, width) in pixels that the pipeline draws by default."""
        latents = configs.number("sample_size") if self.default_size == "sample_size" else _DEFAULT_LATENTS
        # These pipelines default to 1024 pixels, whatever their VAE.
        names_pixels = self.backbone in ("aura_flow", "z_image") and configs.vae is not None
        pixels = 1024 if names_pixels else latents * configs.vae_factor
        return pixels, pixels

    def sample_shape(
        self, configs: PipelineConfigs, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """[C, h, w] of a picture's latents, or of its pixels if the pipeline has no VAE.

        Unless they are called with use_resolution_binning=False, PixArt's pipelines draw the nearest of a list of sizes and
        rescale the picture; this is the shape for exactly the requested size.

        Args:
            configs: configurations in the pipeline's folder.
            height: height of the picture in pixels; None: the default.
            width: width of the picture, likewise.

        Raises:
            InputError: the pipeline cannot draw this size.
        """
        default = self.default_pixels(configs)
        factor = configs.vae_factor
        multiple = factor * self.patch_size(configs)
        latents = []
        for name, pixels in (
            ("height", default[0] if height is None else height),
            ("width", default[1] if width is None else width),
        ):
            if pixels < multiple or (pixels % multiple and self.sizes == "refused"):
                raise InputError(
                    f"{name}: {pixels} pixels; {self.pipeline} draws multiples of {multiple}: give "
                    f"{max(round(pixels / multiple), 1) * multiple}"
                )
            latents.append(pixels // multiple * multiple // factor)
        limit = configs.transformer.get("pos_embed_max_size")
        if limit is not None and self.backbone == "aura_flow":
            limit = math.isqrt(configs.number("pos_embed_max_size"))  # it counts all places
        if limit is not None and max(latents) > int(limit) * self.patch_size(configs):
            raise InputError(
                f"{max(latents) * factor} pixels: the transformer's position embedding ends at "
                f"{int(limit) * multiple} (pos_embed_max_size {configs.transformer['pos_embed_max_size']})"
            )
        channels = configs.number("in_channels")
        if self.packs and channels % _PATCH**2:
            raise InputError(f"{self.pipeline}: its transformer has {channels} input channels; expected those of 2 x 2 latents")
        return channels // (_PATCH**2 if self.packs else 1), latents[0], latents[1]

    def scheduler_call(
        self, scheduler_config: Mapping[str, Any], num_steps: int, sample_shape: tuple[int, ...], patch_size: int = _PATCH
    ) -> SchedulerCall:
        """The arguments with which the pipeline calls its scheduler's `set_timesteps`.

        Args:
            scheduler_config: `.config` of the scheduler object, which includes the defaults of its class.
            num_steps: number of steps.
            sample_shape: [C, h, w] of the latents.
            patch_size: latents along a side of an image token.
        """
        call = SchedulerCall()
        if self.passes_sigmas and not (self.backbone in ("flux", "flux2") and scheduler_config.get("use_flow_sigmas")):
            # In each pipeline's own precision, because the scheduler rounds the two to different float32 numbers.
            if self.backbone == "z_image":
                call["sigmas"] = torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
            else:
                call["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps).tolist()
        if self.passes_mu == "always" or (self.passes_mu == "dynamic" and scheduler_config.get("use_dynamic_shifting")):
            tokens = (sample_shape[-2] // patch_size) * (sample_shape[-1] // patch_size)
            if self.mu == "fitted":
                return call | {"mu": _fitted_mu(tokens, num_steps)}
            few, many = scheduler_config.get("base_image_seq_len", 256), scheduler_config.get("max_image_seq_len", 4096)
            low, high = scheduler_config.get("base_shift", 0.5), scheduler_config.get("max_shift", self.max_shift)
            slope = (high - low) / (many - few)
            call["mu"] = tokens * slope + (low - slope * few)
        return call


def _fitted_mu(tokens: int, num_steps: int) -> float:
    """FLUX.2's shift: a line through what was measured at 10 and at 200 steps, each linear in the number of image tokens.

    `compute_empirical_mu` in diffusers' `pipeline_flux2.py`.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * num_steps + (at_200 - 200.0 * slope)


def component_class(index: Mapping[str, Any], name: str, folder: Path) -> tuple[str, str] | None:
    """(library, class) of a component in a pipeline's index; None: the pipeline does not have it."""
    found = index.get(name)
    if found is None or (isinstance(found, list) and found[:1] == [None]):
        return None
    if not (isinstance(found, list) and len(found) == 2 and all(isinstance(part, str) for part in found)):
        raise InputError(f"{folder / INDEX_NAME}: {name} is {found!r:.60}; expected the names of a library and a class")
    return found[0], found[1]
