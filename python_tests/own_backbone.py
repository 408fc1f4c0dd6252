"""The backbone of docs/own-teacher.md as a module that can be imported by name, as a user's would be."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import torch

from pyard.conditions import EmbeddingTable
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.models.backbone import Denoiser
from pyard.teachers.network_teacher import NetworkTeacher

PAGE = Path(__file__).parents[1] / "docs" / "own-teacher.md"


def write_module(folder: Path, name: str = "a_users_backbone") -> str:
    """Write it into a folder; returns what `--network` takes there."""
    (block,) = (
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "MyBackbone(Backbone)" in code
    )
    (folder / f"{name}.py").write_text("import torch\nfrom torch import nn\n\n" + block)
    return f"{name}:MyBackbone"


def own_module(folder: Path, name: str = "a_users_backbone") -> Any:
    """The module, imported from a folder that is on the path."""
    write_module(folder, name)
    importlib.invalidate_caches()
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def own_teacher(module: Any, **sizes: int) -> NetworkTeacher:
    """A teacher with four prompts of up to 5 tokens."""
    torch.manual_seed(0)
    prompts = EmbeddingTable([torch.randn(n, 8) for n in (3, 5, 2, 4, 1)])
    network = Denoiser(module.MyBackbone(module.MyConfig(**sizes)))
    return NetworkTeacher(network, NoiseSchedule(kind="flow", prediction="velocity"), conditions=prompts)
