"""Floating-point operations of a student and its teacher, counted as two for a multiplication and an addition."""

from __future__ import annotations

from pyard.models.dit import DiTConfig
from pyard.models.student import StudentConfig
from pyard.ops.masks import visible_steps

# Dense peak of a GPU's tensor cores in TFLOP/s, from the makers' data sheets (no sparsity): (16-bit floats, TF32).
PEAK_TFLOPS = {
    "A100": (312.0, 156.0),
    "H100": (989.0, 495.0),
    "H200": (989.0, 495.0),
    "L40S": (362.0, 183.0),
    "L4": (121.0, 60.0),
    "A10G": (70.0, 35.0),
    "RTX 4090": (165.0, 83.0),
    "B200": (2250.0, 1100.0),
}


def block_flops(network: DiTConfig) -> float:
    """One forward pass of one sample through a DiT: projections, attention, MLP, adaLN, embeddings and head."""
    T, D, P2 = network.tokens_per_step, network.hidden_size, network.patch_size**2
    mlp = int(D * network.mlp_ratio)
    tokenwise = 2 * T * D * (3 * D + D + 2 * mlp)
    attention = 4 * T * T * D
    conditioning = 2 * D * 6 * D
    assert network.out_channels is not None
    ends = 2 * T * D * P2 * (network.in_channels + network.out_channels) + 2 * D * 2 * D
    time = 2 * D * (network.frequency_size + D)
    return float(network.depth * (tokenwise + attention + conditioning) + ends + time)


def student_flops(student: StudentConfig) -> float:
    """One forward pass of one sample through all S steps, its history included."""
    network, steps = student.network, student.grid.num_steps
    seen = sum(len(visible_steps(student.mask, step, student.window)) for step in range(steps))
    history = student.history_layers * (seen - steps) * 4 * network.tokens_per_step**2 * network.hidden_size
    return steps * block_flops(network) + history


def update_flops(student: StudentConfig, batch_size: int) -> float:
    """An update: forward, and twice that backward. What activation checkpointing computes again does not count (MFU)."""
    return 3.0 * batch_size * student_flops(student)


def peak_tflops(device_name: str, mixed_precision: str) -> float | None:
    """The data sheet's peak of a GPU whose name contains a known one; None: not known."""
    for name in sorted(PEAK_TFLOPS, key=len, reverse=True):
        if name in device_name:
            return PEAK_TFLOPS[name][mixed_precision == "no"]
    return None
