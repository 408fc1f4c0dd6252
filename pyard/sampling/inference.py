"""Running a student fast: one cache for many batches, compiled steps, CUDA graphs, and batches that fit into memory.

B batch · S steps · C channels · N history layers · H heads · T tokens per step · Dh head dim · D hidden
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pyard.conditions import Condition
from pyard.conditions.condition import pad_to
from pyard.errors import InputError
from pyard.models.history import PreallocatedCache

if TYPE_CHECKING:
    from pyard.models.student import Student

# (noise [B, C, ...], condition of B rows) to the S predictions, each [B, C, ...]
Rollout = Callable[[torch.Tensor, Condition], list[torch.Tensor]]

LARGEST_BATCH = 256


def plain_rollout(student: Student) -> Rollout:
    """The cached rollout; batches of the same size share a cache."""
    kept: dict[torch.Size, PreallocatedCache] = {}

    def run(noise: torch.Tensor, condition: Condition) -> list[torch.Tensor]:
        if noise.shape not in kept:
            kept.clear()
            kept[noise.shape] = student.new_cache(len(noise), tuple(noise.shape[1:]))
        return list(student.rollout(noise, condition, kept[noise.shape]))

    return run


def compiled(student: Student) -> Student:
    """A student with the same weights whose cached step is compiled by `torch.compile`: one graph per step of the grid."""
    faster = copy.copy(student)
    faster.step = torch.compile(student.step)  # type: ignore[method-assign]
    return faster


def graphed_rollout(student: Student, batch_size: int, like: Condition, sample_shape: tuple[int, ...] | None = None) -> Rollout:
    """The whole rollout as one CUDA graph for batches of up to `batch_size`, without launch costs between its kernels.

    Args:
        student: a student on a CUDA device.
        batch_size: size of the largest batch.
        like: any condition of the kind and length that will be used; longer ones are refused.
        sample_shape: [C, ...] of all samples; None: the usual one.

    Raises:
        InputError: the student is not on a CUDA device.
    """
    device = student.embed_times.device
    if device.type != "cuda":
        raise InputError(f"CUDA graphs need a student on a CUDA device; this one is on {device}")
    noise = torch.zeros((batch_size, *(sample_shape or student.sample_shape)), device=device)
    first = like.index(slice(0, 1)).to(device)
    condition = Condition({name: tensor.expand(batch_size, *tensor.shape[1:]).clone() for name, tensor in first.items()})
    rollout = plain_rollout(student)
    # Libraries allocate workspaces in their first calls, which must happen before the capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            rollout(noise, condition)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        predictions = rollout(noise, condition)

    def run(some_noise: torch.Tensor, some_condition: Condition) -> list[torch.Tensor]:
        count = len(some_noise)
        noise[:count].copy_(some_noise)
        for name, tensor in condition.items():
            tensor[:count].copy_(pad_to(some_condition[name], tensor.shape[1:]))
        graph.replay()
        return [prediction[:count].clone() for prediction in predictions]

    return run


def batch_size_that_fits(student: Student, sample_shape: tuple[int, ...] | None = None) -> int:
    """How many samples fit together into half of the free memory; at most 256, because larger batches are not faster."""
    weight = next(student.trunk.parameters())
    # The widest moment of a block: the residual stream, its norm, the MLP's hidden units (four times the width) before and
    # after their activation; q, k, v and their copies are less. float32 copies inside operators double it.
    tokens = student.trunk.tokens_per_step(sample_shape or student.sample_shape) * student.trunk.hidden_size * 11
    shapes = student.trunk.attention_shapes(student.config.history_layers, sample_shape or student.sample_shape)
    cache = 2 * student.num_steps * sum(math.prod(shape) for shape in shapes)
    modulations = student.num_steps * student.config.network.depth * 6 * student.trunk.hidden_size
    needed = weight.element_size() * (2 * tokens + cache + modulations)
    return int(min(LARGEST_BATCH, max(1, free_memory(weight.device) / 2 // needed)))


def free_memory(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        available = None
    return int(available[1]) << 10 if available else 4 << 30  # elsewhere there is no portable question


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is torch's error that a device or the machine is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
