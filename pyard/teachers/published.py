"""What a teacher's name says about its network: its sizes, without its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.backbone import Backbone, Denoiser
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import Trunk
from pyard.models.families import backbone_class
from pyard.models.folder import CONFIG_NAME, WEIGHTS_NAME, class_name, load_config, require_sizes
from pyard.storage.reading import reading
from pyard.storage.tensor_files import tensor_shapes
from pyard.teachers import is_text_to_image, load_teacher
from pyard.teachers.network_teacher import KINDS
from pyard.teachers.text_to_image.outline import PipelineOutline, pipeline_outline, without_weights
from pyard.teachers.text_to_image.published import PUBLISHED, published_pipeline

# (depth, hidden_size, num_heads): Peebles & Xie 2023, table 1; SiT (Ma et al. 2024) has the same.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

_NAME = re.compile(r"(?i)(dit|sit)-(s|b|l|xl)[-/]([248])(?:-(\d+)(?:x\d+)?)?(?:\.pt|\.safetensors)?")


@dataclass(frozen=True)
class TeacherOutline:
    """A teacher without its weights.

    Args:
        network: on the meta device.
        schedule: its forward process.
        pipeline: of a text-to-image pipeline, the rest of its settings.
    """

    network: Denoiser
    schedule: NoiseSchedule
    pipeline: PipelineOutline | None = None


def outline_of(source: str | Path, network: type[Backbone] | str | None = None) -> TeacherOutline:
    """A teacher without its weights, read or known, never trained.

    Args:
        source: `digits`; whatever `load_teacher` reads; a published name such as `DiT-XL/2`, `DiT-XL-2-512` or `SiT-B-2`,
            followed by the images' size if that is not 256; or a published text-to-image pipeline, such as `sd3.5-medium` or
            `stabilityai/stable-diffusion-3.5-medium`.
        network: class of a backbone that is none of pyard's, or "package.module:Class" to import it from.

    Raises:
        InputError: neither there nor known.
    """
    pipeline = pipeline_outline(source)
    if pipeline is not None:
        return TeacherOutline(pipeline.network, pipeline.schedule, pipeline)
    return TeacherOutline(*_network_of(source, network))


def is_teacher(source: str | Path) -> bool:
    """Whether `outline_of` knows a name, or takes a folder or file for a teacher's; a student's folder is none."""
    path = Path(source)
    if path.is_dir():
        return not (path / "student").is_dir() and (is_text_to_image(path) or class_name(path) in KINDS)
    return path.is_file() or str(source) == "digits" or is_text_to_image(source) or _is_published(str(source))


def _is_published(name: str) -> bool:
    return published_pipeline(name) is not None or _NAME.fullmatch(Path(name).as_posix()) is not None


def network_of(source: str | Path, network: type[Backbone] | str | None = None) -> tuple[Denoiser, NoiseSchedule]:
    """Network and schedule of `outline_of`."""
    found = outline_of(source, network)
    return found.network, found.schedule


def _network_of(source: str | Path, network: type[Backbone] | str | None) -> tuple[Denoiser, NoiseSchedule]:
    if str(source) == "digits":
        from pyard.teachers.digits import digits_network

        return without_weights(Trunk, digits_network()), NoiseSchedule()
    path = Path(source)
    if path.is_dir() and class_name(path) in KINDS:
        config = load_config(path, kind=KINDS)
        backbone = backbone_class(str(config.get("family", "dit")), network, path)
        with reading(path / CONFIG_NAME, f"it does not fit {backbone.__name__}", RuntimeError):
            sizes = backbone.config_class(**config["network"])
            if (path / WEIGHTS_NAME).exists():
                require_sizes(path, sizes.depth, tensor_shapes(path / WEIGHTS_NAME))
            return without_weights(backbone, sizes), NoiseSchedule.from_json(config["schedule"])
    if path.exists():
        teacher = load_teacher(source, network=network)
        return teacher.network.to("meta"), teacher.schedule
    name = _NAME.fullmatch(path.as_posix())
    if name is None:
        raise InputError(
            f"teacher {str(source)!r}: neither an existing path nor a published name; expected 'digits', a folder, a file, or "
            f"a name such as DiT-XL/2, SiT-XL-2-256, {', '.join(pipeline.name for pipeline in PUBLISHED)}"
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
    return without_weights(Trunk, published), NoiseSchedule(kind="flow", prediction="velocity") if flow else NoiseSchedule()
