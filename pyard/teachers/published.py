"""What a teacher's name says about its network: its sizes, without its weights."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.backbone import Backbone, BackboneConfig, Denoiser
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import Trunk
from pyard.models.families import backbone_class
from pyard.models.folder import CONFIG_NAME, WEIGHTS_NAME, class_name, load_config, require_sizes
from pyard.storage.reading import reading
from pyard.storage.tensor_files import tensor_shapes
from pyard.teachers import load_teacher
from pyard.teachers.network_teacher import KINDS

# (depth, hidden_size, num_heads): Peebles & Xie 2023, table 1; SiT (Ma et al. 2024) has the same.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def network_of(source: str | Path, network: type[Backbone] | str | None = None) -> tuple[Denoiser, NoiseSchedule]:
    """A teacher's network without its weights (on the meta device) and its schedule, read or known, never trained.

    Args:
        source: `digits`; whatever `load_teacher` reads; or a published name such as `DiT-XL/2`, `DiT-XL-2-512` or `SiT-B-2`,
            followed by the images' size if that is not 256.
        network: class of a backbone that is none of pyard's, or "package.module:Class" to import it from.

    Raises:
        InputError: neither there nor known.
    """
    if str(source) == "digits":
        from pyard.teachers.digits import digits_network

        return _without_weights(Trunk, digits_network()), NoiseSchedule()
    path = Path(source)
    if path.is_dir() and class_name(path) in KINDS:
        config = load_config(path, kind=KINDS)
        backbone = backbone_class(str(config.get("family", "dit")), network, path)
        with reading(path / CONFIG_NAME, f"it does not fit {backbone.__name__}", RuntimeError):
            sizes = backbone.config_class(**config["network"])
            if (path / WEIGHTS_NAME).exists():
                require_sizes(path, sizes.depth, tensor_shapes(path / WEIGHTS_NAME))
            return _without_weights(backbone, sizes), NoiseSchedule.from_json(config["schedule"])
    if path.exists():
        teacher = load_teacher(source, network=network)
        return teacher.network.to("meta"), teacher.schedule
    name = re.fullmatch(r"(?i)(dit|sit)-(s|b|l|xl)[-/]([248])(?:-(\d+)(?:x\d+)?)?(?:\.pt|\.safetensors)?", path.as_posix())
    if name is None:
        raise InputError(
            f"teacher {str(source)!r}: nothing there, and no published name; expected 'digits', a folder, a file, or a name "
            "such as DiT-XL/2 or SiT-XL-2-256"
        )
    family, size, patch, resolution = name.groups()
    depth, hidden, heads = SIZES[size.upper()]
    published = DiTConfig(
        input_size=int(resolution or 256) // 8,
        in_channels=4,
        out_channels=8,
        patch_size=int(patch),
        hidden_size=hidden,
        depth=depth,
        num_heads=heads,
        num_classes=1000,
    )
    flow = family.lower() == "sit"
    return _without_weights(Trunk, published), NoiseSchedule(kind="flow", prediction="velocity") if flow else NoiseSchedule()


def _without_weights(backbone: type[Backbone], sizes: BackboneConfig) -> Denoiser:
    try:
        with torch.device("meta"):
            return Denoiser(backbone(sizes))  # type: ignore[call-arg]
    except RuntimeError:  # some networks look at the numbers of their constants
        return Denoiser(backbone(sizes)).to("meta")  # type: ignore[call-arg]
