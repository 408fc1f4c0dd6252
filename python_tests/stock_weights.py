"""The weights that a teacher reads, under the names of the stock transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pyard.teachers import load_teacher


def weights_of(folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Of the stock transformer that a teacher's network is."""
    network = load_teacher(folder, **settings).network
    return network.trunk.stock(network.head).state_dict()


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
