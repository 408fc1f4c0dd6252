"""Converts between latents and images: a diffusers autoencoder with its scaling, stored with a teacher or student."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pyard.errors import InputError
from pyard.models.fingerprint import weights_digest
from pyard.models.latent_layout import Scaling, latent_size, layout_of, pack, unpack
from pyard.models.pretrained import only_variant, read_pretrained
from pyard.storage.reading import read_object

if TYPE_CHECKING:
    from diffusers import ModelMixin

FOLDER = "vae"
_CONFIG_NAME = "config.json"
# diffusers ignores a key with an underscore, keeps it and writes it again, so that it travels wherever the VAE does.
_GRID_KEY = "_packed_grid"


class Codec(Protocol):
    """Converts a student's samples to images, and images to samples: `LatentCodec`, or a class of the user's."""

    def check(self, sample_shape: tuple[int, ...]) -> None:
        """Raise an InputError unless samples of this shape can be decoded."""
        ...

    def image_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(channels, height, width) of the image that a sample of this shape becomes."""
        ...

    def decode(self, latents: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        """Samples [n, *sample_shape] to images [n, 3, H, W] float32, about -1 to 1."""
        ...

    def encode(self, images: torch.Tensor, batch_size: int = 8, *, sample_shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Images [n, 3, H, W], -1 to 1, to samples in float32, of the given shape if there are several."""
        ...

    def posterior(
        self, images: torch.Tensor, batch_size: int = 8, *, sample_shape: tuple[int, ...] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images, as in `encode`, to the mean and the standard deviation of their samples, each with the samples' shape."""
        ...

    def fingerprint(self) -> str:
        """A text that differs between codecs whose latents differ."""
        ...

    def save(self, folder: Path) -> None:
        """Write the codec into the model's folder."""
        ...


@dataclass(frozen=True)
class _Kind:
    """The differences between classes of autoencoders.

    Args:
        channels: name of the setting for the number of latent channels.
        factor: function of the configuration that returns the number of pixels along one side of a latent.
        image_channels: function of the configuration that returns the number of image channels.
        frames: whether images are videos of one frame: latents [B, C, 1, h, w].
        normalises: whether its scaling is that of a batch norm over latents packed 2 x 2.
    """

    channels: str
    factor: Callable[[Mapping[str, Any]], int]
    image_channels: Callable[[Mapping[str, Any]], int]
    frames: bool = False
    normalises: bool = False


AUTOENCODERS = {
    "AutoencoderKL": _Kind(
        "latent_channels",
        lambda config: 2 ** (len(config["block_out_channels"]) - 1),
        lambda config: config["out_channels"],
    ),
    "AutoencoderKLFlux2": _Kind(
        "latent_channels",
        lambda config: 2 ** (len(config["block_out_channels"]) - 1),
        lambda config: config["out_channels"],
        normalises=True,
    ),
    "AutoencoderKLQwenImage": _Kind(
        "z_dim",
        lambda config: 2 ** len(config["temperal_downsample"]),
        lambda config: config["input_channels"],
        frames=True,
    ),
    # Wan's scale_factor_spatial is what its pipeline says of it, not what its layers do.
    "AutoencoderKLWan": _Kind(
        "z_dim",
        lambda config: 2 ** len(config["temperal_downsample"]) * (config["patch_size"] or 1),
        lambda config: config["out_channels"] // (config["patch_size"] or 1) ** 2,
        frames=True,
    ),
}


class LatentCodec:
    """A VAE that is read when it is first needed. It is not a submodule of its teacher or student, so it is never trained.

    Samples are its latents, scaled as in diffusers' pipelines (`pyard.models.latent_layout`): [C, h, w], [C, 1, h, w], or
    packed 2 x 2, [4C, h/2, w/2] or [T, 4C]. The layout is recognised by the shape.

    Args:
        source: the folder of a diffusers autoencoder, or one in memory: `AutoencoderKL`, `AutoencoderKLFlux2`,
            `AutoencoderKLQwenImage` or `AutoencoderKLWan`.
        grid: rows and columns of samples [T, 4C]; None: those in the VAE's configuration, or else a square.
    """

    def __init__(self, source: str | Path | ModelMixin, grid: tuple[int, int] | None = None):
        self._folder = Path(source) if isinstance(source, str | Path) else None
        self._source: Any = None if isinstance(source, str | Path) else source
        self._vae: Any = None
        self._new_grid = grid

    @classmethod
    def beside(cls, *folders: Path) -> LatentCodec | None:
        """The codec in the sub-folder `vae` of the first of these folders that has one."""
        return next((cls(folder / FOLDER) for folder in folders if (folder / FOLDER / _CONFIG_NAME).exists()), None)

    @property
    def vae(self) -> Any:
        """The autoencoder, a diffusers module.

        Raises:
            InputError: the folder has no autoencoder, or one of a class that pyard does not support.
        """
        if self._vae is None:
            vae = _read(self._folder) if self._folder is not None else self._source
            _kind_of(vae)
            if self._new_grid is not None:
                vae.register_to_config(**{_GRID_KEY: list(self._new_grid)})
            self._vae = vae.eval().requires_grad_(False)
        return self._vae

    @property
    def channels(self) -> int:
        """C, the number of the VAE's latent channels."""
        return int(self.vae.config[_kind_of(self.vae).channels])

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of packed tokens [T, 4C]; None: a square."""
        grid = self.vae.config.get(_GRID_KEY)
        return None if grid is None else (int(grid[0]), int(grid[1]))

    def scaling(self) -> Scaling:
        """How latents are scaled.

        Raises:
            InputError: the configuration contradicts itself.
        """
        if _kind_of(self.vae).normalises:
            norm = self.vae.bn
            return Scaling.of_batch_norm(norm.running_mean, norm.running_var, self.vae.config.batch_norm_eps, self.channels)
        return Scaling.of(self.vae.config, self.channels)

    def check(self, sample_shape: tuple[int, ...]) -> None:
        """Raise an InputError unless the VAE decodes samples of this shape."""
        self.image_shape(sample_shape)
        self.scaling()

    def image_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(channels, height, width) of the image that a sample of this shape becomes."""
        kind, config = _kind_of(self.vae), self.vae.config
        factor = kind.factor(config)
        height, width = latent_size(tuple(sample_shape), self.channels, self.grid)
        return kind.image_channels(config), height * factor, width * factor

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        """Samples [n, *sample_shape] to images [n, 3, H, W] float32, about -1 to 1."""
        self.vae.to(latents.device)
        return torch.cat([self.decode_batch(part) for part in latents.split(batch_size)])

    def decode_batch(self, latents: torch.Tensor) -> torch.Tensor:
        """`decode` one batch on the VAE's device, without control flow that depends on values, so that it can be traced."""
        plain = self.scaling().to_vae(unpack(latents, self.channels, self.grid).float()).to(self.vae.dtype)
        if not _kind_of(self.vae).frames:
            image: torch.Tensor = self.vae.decode(plain, return_dict=False)[0]
        else:
            image = self.vae.decode(plain[:, :, None], return_dict=False)[0][:, :, 0]
        return image.float()

    @torch.inference_mode()
    def encode(self, images: torch.Tensor, batch_size: int = 8, *, sample_shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Images to samples, which are the mode of the posterior.

        Args:
            images: [n, 3, H, W], -1 to 1.
            batch_size: number of images encoded together.
            sample_shape: shape of the samples, if they are packed; None: [C, h, w].

        Returns:
            float32 [n, *sample_shape].
        """
        modes = torch.cat([part.mode() for part in self._posteriors(images, batch_size)])
        return self._as_samples(self.scaling().from_vae(self._without_frame(modes)), sample_shape)

    @torch.inference_mode()
    def posterior(
        self, images: torch.Tensor, batch_size: int = 8, *, sample_shape: tuple[int, ...] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images to mean and standard deviation of their samples, each float32 [n, *sample_shape]; arguments as in `encode`."""
        parts = self._posteriors(images, batch_size)
        mean, std = (self._without_frame(torch.cat([getattr(part, name) for part in parts])) for name in ("mean", "std"))
        scaling = self.scaling()
        return self._as_samples(scaling.from_vae(mean), sample_shape), self._as_samples(scaling.spread(std), sample_shape)

    def fingerprint(self) -> str:
        """sha256 of the VAE's weights and the scaling."""
        scaling = self.scaling()
        # A pair where there is no more to say: caches of encoded images that hold it are older than the statistics.
        about = (scaling.scaling, scaling.shift) if scaling.mean is None else scaling
        return weights_digest(self.vae, str(about))

    def save(self, folder: Path) -> None:
        """Write the VAE into the sub-folder `vae`."""
        if self._folder is not None and self._new_grid is None:
            shutil.copytree(self._folder, folder / FOLDER)
        else:
            self.vae.save_pretrained(str(folder / FOLDER))

    def _posteriors(self, images: torch.Tensor, batch_size: int) -> list[Any]:
        vae = self.vae.to(images.device)
        images = images.to(vae.dtype)
        images = images[:, :, None] if _kind_of(vae).frames else images
        return [vae.encode(part).latent_dist for part in images.split(batch_size)]

    def _without_frame(self, latents: torch.Tensor) -> torch.Tensor:  # float32 [n, C, h, w]
        return (latents[:, :, 0] if _kind_of(self.vae).frames else latents).float()

    def _as_samples(self, latents: torch.Tensor, sample_shape: tuple[int, ...] | None) -> torch.Tensor:
        if sample_shape is None:
            return latents
        packed = pack(latents, layout_of(tuple(sample_shape), self.channels))
        size = latent_size(tuple(sample_shape), self.channels, self.grid)
        if tuple(latents.shape[2:]) != size:
            found = "{} x {}".format(*latents.shape[2:])
            raise InputError(
                f"these images have latents of {found}; samples of shape {sample_shape} hold {size[0]} x {size[1]}"
            )
        return packed

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentCodec:
        # An average of the student's weights, or its copy in another precision, decodes with the same VAE.
        return self


def require_latent_codec(codec: Codec, purpose: str) -> LatentCodec:
    """The codec, if it is a diffusers autoencoder; otherwise an InputError."""
    if not isinstance(codec, LatentCodec):
        raise InputError(f"{purpose} needs a VAE of diffusers (LatentCodec); this codec is a {type(codec).__name__}")
    return codec


def _kind_of(vae: Any) -> _Kind:
    found = next((AUTOENCODERS[cls.__name__] for cls in type(vae).__mro__ if cls.__name__ in AUTOENCODERS), None)
    if found is None:
        raise InputError(f"the VAE is a {type(vae).__name__}; expected one of {', '.join(AUTOENCODERS)}")
    return found


def _read(folder: Path) -> Any:
    import diffusers

    file = folder / _CONFIG_NAME
    if not file.is_file():
        raise InputError(f"{folder}: expected the folder of a diffusers autoencoder; there is no {_CONFIG_NAME}")
    config = read_object(file, "the configuration of a diffusers autoencoder")
    found = config.get("_class_name")
    if not isinstance(found, str) or found not in AUTOENCODERS:
        raise InputError(f"{folder}: the VAE is a {found!s:.60}; expected one of {', '.join(AUTOENCODERS)}")
    variant = only_variant(folder, "diffusion_pytorch_model")
    return read_pretrained(getattr(diffusers, found), folder, torch_dtype=torch.float32, variant=variant)
