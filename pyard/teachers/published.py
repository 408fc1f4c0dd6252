"""What a teacher's name says about its network: its sizes, without its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.dit.network import DiTConfig
from pyard.models.folder import CONFIG_NAME, load_config
from pyard.teachers import load_teacher

# (depth, hidden_size, num_heads): Peebles & Xie 2023, table 1; SiT (Ma et al. 2024) has the same.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def network_of(source: str | Path) -> tuple[DiTConfig, NoiseSchedule]:
    """A teacher's sizes and schedule, read or known, never trained.

    Args:
        source: `digits`; whatever `load_teacher` reads; or a published name such as `DiT-XL/2`, `DiT-XL-2-512` or `SiT-B-2`,
            followed by the images' size if that is not 256.

    Raises:
        InputError: neither there nor known.
    """
    if str(source) == "digits":
        from pyard.teachers.digits import digits_network

        return digits_network(), NoiseSchedule()
    path = Path(source)
    if path.is_dir() and (path / CONFIG_NAME).is_file() and _class_name(path) == "DiTTeacher":
        config = load_config(path, kind="DiTTeacher")
        return DiTConfig(**config["network"]), NoiseSchedule.from_json(config["schedule"])
    if path.exists():
        teacher = load_teacher(source)
        return teacher.network.config, teacher.schedule
    name = re.fullmatch(r"(?i)(dit|sit)-(s|b|l|xl)[-/]([248])(?:-(\d+)(?:x\d+)?)?(?:\.pt|\.safetensors)?", path.as_posix())
    if name is None:
        raise InputError(
            f"teacher {str(source)!r}: nothing there, and no published name; expected 'digits', a folder, a file, or a name "
            "such as DiT-XL/2 or SiT-XL-2-256"
        )
    family, size, patch, resolution = name.groups()
    depth, hidden, heads = SIZES[size.upper()]
    network = DiTConfig(
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
    return network, NoiseSchedule(kind="flow", prediction="velocity") if flow else NoiseSchedule()


def _class_name(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / CONFIG_NAME).read_text()).get("_class_name"))
    except (ValueError, AttributeError):
        return None
