"""Floating-point operations of an update, and what devices can do at best.

L depth · D hidden · T tokens · K blocks looked at · W width of a discriminator's layers
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from pyard.description import flops_of_pass
from pyard.models.dit import DiTConfig
from pyard.models.student import StudentConfig
from pyard.training.adversarial_config import AdversarialConfig


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


def student_flops(student: StudentConfig) -> float:
    """One forward pass of one sample through all S steps, its history included."""
    return float(sum(flops_of_pass(student, step) for step in range(student.grid.num_steps)))


def update_flops(student: StudentConfig, batch_size: int) -> float:
    """An update: forward, and twice that backward. What activation checkpointing computes again does not count (MFU)."""
    return 3.0 * batch_size * student_flops(student)


def teacher_flops(network: DiTConfig) -> float:
    """One evaluation of a teacher for one sample, its predicted variance included; guidance takes two."""
    assert network.out_channels is not None
    head = 2 * network.hidden_size * network.patch_size**2 * network.out_channels * network.tokens_per_step
    return _trunk_flops(network, network.depth) + head + 2 * network.hidden_size * 2 * network.hidden_size


def adversarial_flops(network: DiTConfig, settings: AdversarialConfig) -> float:
    """What the adversarial stage adds to one sample's share of an update: the frozen teacher's passes and the discriminators'.

    The teacher passes the student's prediction forward, the gradient back to its input (once the products with weights, twice
    those of the attention) and the real sample forward. A discriminator passes on the way to the student's gradient forward
    and back to its input; on the way to its own, both samples forward and back to its weights, and, behind its first layer,
    to its inputs. R1 adds the slopes of the real sample's logits and, twice that, their own slopes; feature matching one more
    pass of it.
    """
    blocks = tuple(range(network.depth)) if settings.blocks is None else settings.blocks
    depth = max(blocks) + 1
    attention = depth * 4.0 * network.tokens_per_step**2 * network.hidden_size
    teacher = 3 * _trunk_flops(network, depth) + attention
    first, rest = head_flops(network, settings)
    passes = 2 * (first + rest) + 2 * (2 * first + 3 * rest)
    if settings.feature_matching:
        passes += first + rest
    if settings.r1:
        passes += 3 * (first + rest)
    return teacher + len(blocks) * passes


def head_flops(network: DiTConfig, settings: AdversarialConfig) -> tuple[float, float]:
    """One discriminator head forward on one sample: its first layer, and the rest."""
    tokens, hidden, width = network.tokens_per_step, network.hidden_size, settings.width
    rest = 2.0 * tokens * width * width * (settings.depth * settings.kernel_size + 1) + 2.0 * hidden * width
    return 2.0 * tokens * hidden * width, rest


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
    """The device whose name `name` contains as words, the longest if several."""
    found = [known for known in DEVICES if re.search(rf"\b{re.escape(known)}\b", name)]
    return DEVICES[max(found, key=len)] if found else None


def _trunk_flops(network: DiTConfig, depth: int) -> float:
    """Embeddings and the lowest `depth` blocks, one sample, no history."""
    tokens, hidden = network.tokens_per_step, network.hidden_size
    mlp = round(hidden * network.mlp_ratio)
    block = 2 * tokens * hidden * (4 * hidden + 2 * mlp) + 2 * hidden * 6 * hidden + 4 * tokens**2 * hidden
    embed = 2 * tokens * network.patch_size**2 * network.in_channels * hidden + 2 * hidden * (network.frequency_size + hidden)
    return float(embed + depth * block)
