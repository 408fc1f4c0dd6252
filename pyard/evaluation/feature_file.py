"""Feature networks out of a file that the user has: TorchScript or ONNX, such as the Inception that FID is defined by."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from pyard.errors import InputError
from pyard.evaluation.features import Activations
from pyard.evaluation.inception_score import softmax
from pyard.evaluation.onnx_network import open_onnx
from pyard.evaluation.pixels import Quantise, ResizeMode, resized, to_bytes
from pyard.evaluation.torchscript_network import open_torchscript
from pyard.storage.files import file_sha256, stand_in

PixelRange = Literal["bytes", "unit", "symmetric"]

_WHERE = (
    "The Inception of published FIDs is inception-2015-12-05.pt, which NVIDIA offers with StyleGAN3 (NGC catalogue, "
    "nvidia/research/stylegan3, metrics) and StyleGAN2-ADA; pyard downloads nothing: put the file where this machine can read "
    "it"
)


@dataclass(frozen=True)
class FeatureSettings:
    """How images enter the network of a feature file, and which of its outputs are read.

    The defaults fit `inception-2015-12-05.pt`, which resizes and scales bytes itself. Outputs are given by number or name: of
    a tuple or dictionary that a TorchScript module returns, or a layer's path in it (`layers.mixed_6.conv`: its containers'
    earlier layers run before it); of an ONNX graph, inner tensors included.

    Args:
        quantise: how samples become bytes: `adm` is floor((x + 1) 127.5), `rounded` is floor(127.5 x + 128), both clipped.
        resize: side in pixels that images are resized to; none: not resized, since the network does it or needs no fixed
            size.
        resize_mode: `bilinear`, `antialias` (bilinear with a filter when shrinking) or `tf1` (TensorFlow 1's).
        pixels: range that the network expects: `bytes`, 0 to 255; `unit`, 0 to 1; or `symmetric`, (x - 128) / 128.
        mean: subtracted from each channel after that; none: 0.
        std: each channel is divided by it after that; none: 1.
        features: output for Fréchet distance, precision and recall; none: the first one.
        spatial: output for the spatial Fréchet distance (sFID); none: that of `inception-2015-12-05.pt`, else not measured.
        spatial_channels: number of leading channels of that output to keep; 7 in ADM's protocol.
        logits: output with a score for each class, before the softmax, for the Inception Score; none: that
            of `inception-2015-12-05.pt`, else not measured.
        fid_only: leave out sFID and Inception Score, which run the network two more times.
    """

    quantise: Quantise = "adm"
    resize: int | None = None
    resize_mode: ResizeMode = "bilinear"
    pixels: PixelRange = "bytes"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    features: str | None = None
    spatial: str | None = None
    spatial_channels: int = 7
    logits: str | None = None
    fid_only: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("quantise", Quantise), ("resize_mode", ResizeMode), ("pixels", PixelRange)):
            if getattr(self, name) not in get_args(choices):
                raise InputError(f"features: {name} is {getattr(self, name)!r}; expected one of {get_args(choices)}")
        for name in ("resize", "spatial_channels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"features: {name} is {value}; expected at least 1")


class FileFeatures:
    """A network from a file (implements `ActivationNetwork`).

    Args:
        path: a TorchScript file (`torch.jit.save`) or an `.onnx` file.
        settings: what it wants and gives.
        device: of a TorchScript network; None: CUDA where there is one. onnxruntime takes CUDA where it can.
        batch_size: images that run together.

    Raises:
        InputError: no such file, one that is neither, or outputs that it does not have.
    """

    def __init__(
        self,
        path: str | Path,
        settings: FeatureSettings | None = None,
        *,
        device: torch.device | str | None = None,
        batch_size: int = 64,
    ):
        path = Path(path)
        require_feature_file(path)
        self.settings = settings = settings or FeatureSettings()
        self.name = path.name
        self.batch_size = batch_size
        digest = hashlib.sha256(file_sha256(path).encode())
        digest.update(json.dumps(asdict(settings), sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        wanted = {"features": settings.features, "spatial": settings.spatial, "logits": settings.logits}
        if path.suffix == ".onnx":
            self._outputs = open_onnx(path, wanted)
        else:
            self._outputs = open_torchscript(path, wanted, self.device, with_all=not settings.fid_only)
        if settings.fid_only:
            self._outputs = {"features": self._outputs["features"]}

    def features(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [n, C, H, W], or float from -1 to 1, to features float64 [n, D]."""
        return self._run(images, ["features"])["features"].astype(np.float64)

    def activations(self, images: np.ndarray) -> Activations:
        """Images uint8 [n, C, H, W], or float from -1 to 1, to all that the network says of them, float32."""
        found = self._run(images, list(self._outputs))
        probabilities = found.get("probabilities")
        if "logits" in found:
            probabilities = softmax(found["logits"])
        return Activations(found["features"], found.get("spatial"), probabilities)

    @torch.inference_mode()
    def _run(self, images: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for start in range(0, len(images), self.batch_size):
            pixels = self._prepared(images[start : start + self.batch_size])
            for name in names:
                try:
                    output = self._outputs[name](pixels)
                except InputError:
                    raise
                except Exception as error:  # TorchScript's and onnxruntime's own have no other base class
                    raise InputError(
                        f"features {self.name}: the network fails on images of shape {tuple(pixels.shape)}; does it need "
                        f"another resize? {str(error).strip().splitlines()[-1]}"
                    ) from error
                if name == "spatial" and output.ndim == 4:
                    output = output[:, : self.settings.spatial_channels]
                if len(output) != len(pixels):
                    raise InputError(
                        f"features {self.name}: output {tuple(output.shape)} for {len(pixels)} images; expected [n, ...]"
                    )
                parts[name].append(output.float().flatten(1).cpu().numpy())
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def _prepared(self, images: np.ndarray) -> torch.Tensor:  # [n, C, H, W] to float32 [n, 3, H, W] as the network wants them
        settings = self.settings
        pixels = torch.from_numpy(to_bytes(images, settings.quantise)).to(self.device).float()
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1).contiguous()
        if settings.resize is not None:
            pixels = resized(pixels, settings.resize, settings.resize_mode)
        if settings.pixels != "bytes":
            pixels = pixels / 255 if settings.pixels == "unit" else (pixels - 128) / 128
        for values, apply in ((settings.mean, torch.sub), (settings.std, torch.div)):
            if values is not None:
                pixels = apply(pixels, torch.tensor(values, device=pixels.device).view(1, -1, 1, 1))
        return pixels


def require_feature_file(path: Path) -> None:
    """Raises InputError if a feature network's file is missing, or is something that was saved in its place."""
    if not path.is_file():
        raise InputError(f"features {path}: no such file. Expected a TorchScript or .onnx file. {_WHERE}")
    what = stand_in(path)
    if what is not None:
        raise InputError(f"features {path} is not a network: {what}")
