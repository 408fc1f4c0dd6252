"""Floating-point operations of an update, and what devices can do at best."""

from __future__ import annotations

from pyard.description import flops_of_pass
from pyard.models.student import StudentConfig

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


def student_flops(student: StudentConfig) -> float:
    """One forward pass of one sample through all S steps, its history included."""
    return float(sum(flops_of_pass(student, step) for step in range(student.grid.num_steps)))


def update_flops(student: StudentConfig, batch_size: int) -> float:
    """An update: forward, and twice that backward. What activation checkpointing computes again does not count (MFU)."""
    return 3.0 * batch_size * student_flops(student)


def peak_tflops(device_name: str, mixed_precision: str) -> float | None:
    """The data sheet's peak of a GPU whose name contains a known one; None: not known."""
    for name in sorted(PEAK_TFLOPS, key=len, reverse=True):
        if name in device_name:
            return PEAK_TFLOPS[name][mixed_precision == "no"]
    return None
