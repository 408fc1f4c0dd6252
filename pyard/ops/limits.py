"""The shapes and devices that the CUDA kernels support: consulted when a kernel is chosen, and named in errors.

The CPU kernels accept every shape. B batch, S num_steps, T tokens_per_step, D hidden size, H heads, Dh head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Of a launch's grid in y and z.
MOST_BLOCKS = 65535
MOST_ROWS = 2**30
CHUNK_BYTES = 16
# What a block of threads may have on sm_86, sm_89 and sm_120; sm_80, sm_90 and sm_100 have 163 KB and more.
SMALL_SHARED_BYTES = 99 * 1024
LARGEST_FLOAT32_HEAD_THERE = 80

ROW_OPERATORS = ("modulated_layer_norm", "gated_residual", "gated_residual_modulated_layer_norm")


@dataclass(frozen=True)
class CudaDevice:
    """What the kernels need to know about a GPU.

    Args:
        capability: compute capability, (8, 0) for an A100.
        shared_bytes: the most shared memory that a thread block may use.
    """

    capability: tuple[int, int]
    shared_bytes: int


@torch.compiler.assume_constant_result
def describe_device(device: torch.device) -> CudaDevice:
    """The properties of a GPU, from CUDA's runtime."""
    facts = torch.cuda.get_device_properties(device)
    # Older than this attribute is no GPU with less than what sm_86 has.
    return CudaDevice((facts.major, facts.minor), getattr(facts, "shared_memory_per_block_optin", SMALL_SHARED_BYTES))


def shape_obstacle(operator: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    """Why an operator's CUDA kernel cannot take a first tensor of this shape; "" if it can.

    Args:
        operator: Its name.
        shape: of x, of the keys ([B, H, Sk * T, Dh]) or of the stored steps ([n, S, ...]).
        dtype: of the same tensor.
    """
    per_chunk = CHUNK_BYTES // dtype.itemsize
    if operator in ROW_OPERATORS:
        B, S, T, D = shape
        if D % per_chunk or not 1 <= D <= 8192:
            return f"the hidden size is {D}, expected a multiple of {per_chunk} from {per_chunk} to 8192"
        if B > MOST_BLOCKS or S > 20000 or T > MOST_ROWS:
            return f"batch {B}, {S} steps and {T} tokens, expected at most {MOST_BLOCKS}, 20000 and 2^30"
    if operator == "gelu_tanh" and (shape[-1] % per_chunk or not 1 <= shape[-1] <= 2**24):
        return f"rows of {shape[-1]}, expected a multiple of {per_chunk} from {per_chunk} to 2^24"
    if operator == "block_attention":
        B, H, keys, head_dim = shape
        if head_dim % 8 or not 8 <= head_dim <= 128:
            return f"the head size is {head_dim}, expected a multiple of 8 from 8 to 128"
        if B > MOST_BLOCKS or H > MOST_BLOCKS or keys > MOST_ROWS:
            return f"batch {B}, {H} heads and {keys} keys, expected at most {MOST_BLOCKS}, {MOST_BLOCKS} and 2^30"
    if operator == "gather_trajectories":
        row = math.prod(shape[2:])
        if row % 8 or shape[1] > MOST_BLOCKS:
            return f"samples of {row} numbers and {shape[1]} steps, expected a multiple of 8 and at most {MOST_BLOCKS}"
    return ""


def device_obstacle(
    operator: str, shape: Sequence[int], dtype: torch.dtype, device: CudaDevice, architectures: Sequence[str]
) -> str:
    """Why this GPU cannot run the operator's kernel; "" if it can.

    Args:
        operator, shape, dtype: See `shape_obstacle`.
        device: The GPU.
        architectures: the GPUs that the kernels were compiled for, in the form of TORCH_CUDA_ARCH_LIST: `8.0`, `9.0+PTX`.
    """
    major, minor = device.capability
    if not any(_runs_on(architecture, device.capability) for architecture in architectures):
        return (
            f"the GPU has compute capability {major}.{minor} and the kernels were compiled for {', '.join(architectures)}; "
            f"install with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    wide = operator == "block_attention" and dtype == torch.float32 and shape[-1] > LARGEST_FLOAT32_HEAD_THERE
    if wide and device.shared_bytes < 163 * 1024:
        return (
            f"float32 heads of {shape[-1]} need more than the {device.shared_bytes >> 10} KB of shared memory that this GPU "
            f"has, expected at most {LARGEST_FLOAT32_HEAD_THERE}"
        )
    return ""


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on later minor versions of the same major version, PTX on all later GPUs; `9.0a` only on 9.0."""
    number, _, ptx = architecture.partition("+")
    major, minor = (int(part) for part in number.rstrip("a").split("."))
    if number.endswith("a"):
        return (major, minor) == capability
    same_major = major == capability[0] and minor <= capability[1]
    return same_major or (ptx == "PTX" and (major, minor) <= capability)
