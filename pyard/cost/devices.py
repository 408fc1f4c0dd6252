"""What GPUs can do at best, by their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A GPU by its maker's data sheet: dense peaks in TFLOP/s (no sparsity) and memory.

    Args:
        half: of the tensor cores in 16-bit floats.
        tf32: of the tensor cores in TF32.
        float32: in float32 proper, which is what PyTorch computes in unless TF32 is allowed.
        memory: bytes.
    """

    half: float
    tf32: float
    float32: float
    memory: float


DEVICES = {
    "A100": Device(312.0, 156.0, 19.5, 80e9),
    "H100": Device(989.0, 495.0, 67.0, 80e9),
    "H200": Device(989.0, 495.0, 67.0, 141e9),
    "L40S": Device(362.0, 183.0, 91.6, 48e9),
    "L4": Device(121.0, 60.0, 30.3, 24e9),
    "A10G": Device(70.0, 35.0, 35.0, 24e9),
    "RTX 4090": Device(165.0, 83.0, 82.6, 24e9),
    "B200": Device(2250.0, 1100.0, 75.0, 180e9),
}


def peak_tflops(device_name: str, mixed_precision: str) -> float | None:
    """The data sheet's peak of a GPU whose name contains a known one, in what it multiplies in; None: not known.

    Without mixed precision, that is float32 unless `torch.set_float32_matmul_precision` allows TF32.
    """
    device = known_device(device_name)
    if device is None:
        return None
    if mixed_precision != "no":
        return device.half
    return device.float32 if torch.get_float32_matmul_precision() == "highest" else device.tf32


def known_device(name: str) -> Device | None:
    """The device whose name `name` contains as words, in any case and spacing (`h100`, `rtx4090`), the longest if several."""
    spelled = {known: re.escape(known).replace(r"\ ", "[ _-]?") for known in DEVICES}
    found = [known for known in DEVICES if re.search(rf"\b{spelled[known]}\b", name, re.IGNORECASE)]
    return DEVICES[max(found, key=len)] if found else None
