"""Running a student fast: many batches with one cache, compiled steps, CUDA graphs, and batches that fit into memory.

B batch · S steps · C channels · N history layers · H heads · T tokens per step · Dh head dim · D hidden
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pyard.errors import InputError
from pyard.models.history import PreallocatedCache

if TYPE_CHECKING:
    from pyard.models.student import Student

# (noise [B, C, H, W], labels [B]) to the S predictions, each [B, C, H, W]
Rollout = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]

LARGEST_BATCH = 256


def plain_rollout(student: Student) -> Rollout:
    """The cached rollout; batches of one size share one cache."""
    kept: dict[int, PreallocatedCache] = {}

    def run(noise: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        if len(noise) not in kept:
            kept.clear()
            kept[len(noise)] = student.new_cache(len(noise))
        return list(student.rollout(noise, labels, kept[len(noise)]))

    return run


def compiled(student: Student) -> Student:
    """The student, weights shared, with its cached step compiled by `torch.compile`: one graph for each step of the grid."""
    faster = copy.copy(student)
    faster.step = torch.compile(student.step)  # type: ignore[method-assign]
    return faster


def graphed_rollout(student: Student, batch_size: int) -> Rollout:
    """The whole rollout as one CUDA graph for batches of up to `batch_size`: no launch costs between its kernels.

    Raises:
        InputError: the student is not on a CUDA device.
    """
    device = student.embed_times.device
    if device.type != "cuda":
        raise InputError(f"CUDA graphs need a student on a CUDA device; this one is on {device}")
    noise = torch.zeros((batch_size, *student.sample_shape), device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    rollout = plain_rollout(student)
    # Libraries allocate workspaces in their first calls, which a capture must not see.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            rollout(noise, labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        predictions = rollout(noise, labels)

    def run(some_noise: torch.Tensor, some_labels: torch.Tensor) -> list[torch.Tensor]:
        count = len(some_noise)
        noise[:count].copy_(some_noise)
        labels[:count].copy_(some_labels)
        graph.replay()
        return [prediction[:count].clone() for prediction in predictions]

    return run


def batch_size_that_fits(student: Student) -> int:
    """How many samples may run together in half of the free memory; at most 256, beyond which nothing gets faster."""
    network = student.config.network
    weight = next(student.trunk.parameters())
    # The widest moment of a block: the residual stream, its norm, the MLP's hidden units before and after GELU; q, k, v and
    # their copies are less. float32 copies inside operators double it.
    tokens = network.tokens_per_step * network.hidden_size * (3 + 2 * network.mlp_ratio)
    cache = 2 * student.config.history_layers * student.num_steps * network.tokens_per_step * network.hidden_size
    modulations = student.num_steps * network.depth * 6 * network.hidden_size
    needed = weight.element_size() * (2 * tokens + cache + modulations)
    return int(min(LARGEST_BATCH, max(1, free_memory(weight.device) / 2 // needed)))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        available = None
    return int(available[1]) << 10 if available else 4 << 30  # elsewhere there is no portable question


def is_out_of_memory(error: BaseException) -> bool:
    """True for torch's complaint that a device or the machine has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
