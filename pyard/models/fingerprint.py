"""What tells one teacher from another."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from pyard.diffusion.noise_schedule import NoiseSchedule


def fingerprint_of(network: nn.Module, schedule: NoiseSchedule, settings: object = None) -> str:
    """sha256 of a network's weights, its noise schedule and whatever else decides its predictions.

    Args:
        network: parameters and buffers count, names included.
        schedule: of the teacher.
        settings: JSON-able; sizes and switches that the weights do not show.
    """
    return weights_digest(network, json.dumps([settings, schedule.to_json()], sort_keys=True))


def weights_digest(network: nn.Module, about: str = "") -> str:
    """sha256 of `about` and of a network's parameters and buffers, names included."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
