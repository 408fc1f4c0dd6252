"""Floating-point operations of an update, and what devices can do at best.

L depth · D hidden · T tokens · K blocks looked at · W width of a discriminator's layers
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch

from pyard.models.dit.network import DiTConfig
from pyard.models.student import Student, StudentConfig
from pyard.ops.masks import visible_steps


class Discriminators(Protocol):
    """Sizes and terms of the adversarial stage, by the names of its settings."""

    @property
    def blocks(self) -> tuple[int, ...] | None: ...
    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def kernel_size(self) -> int: ...
    @property
    def r1(self) -> float: ...
    @property
    def feature_matching(self) -> float: ...


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


def adversarial_flops(network: DiTConfig, settings: Discriminators) -> float:
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


def head_flops(network: DiTConfig, settings: Discriminators) -> tuple[float, float]:
    """One discriminator head forward on one sample: its first layer, and the rest."""
    tokens, hidden, width = network.tokens_per_step, network.hidden_size, settings.width
    rest = 2.0 * tokens * width * width * (settings.depth * settings.kernel_size + 1) + 2.0 * hidden * width
    return 2.0 * tokens * hidden * width, rest


def _trunk_flops(network: DiTConfig, depth: int) -> float:
    """Embeddings and the lowest `depth` blocks, one sample, no history."""
    tokens, hidden = network.tokens_per_step, network.hidden_size
    mlp = round(hidden * network.mlp_ratio)
    block = 2 * tokens * hidden * (4 * hidden + 2 * mlp) + 2 * hidden * 6 * hidden + 4 * tokens**2 * hidden
    embed = 2 * tokens * network.patch_size**2 * network.in_channels * hidden + 2 * hidden * (network.frequency_size + hidden)
    return float(embed + depth * block)


def flops_of_pass(config: StudentConfig, step: int) -> int:
    """FLOPs of the matrix products of one cached pass for one sample, by formula.

    Norms, activations and the sinusoids are not counted: together they are less than a percent.
    """
    network = config.network
    tokens, hidden = network.tokens_per_step, network.hidden_size
    seen = len(visible_steps(config.mask, step, config.window)) * tokens
    biased = config.history_bias is not None and seen > tokens
    history = config.history_layers * _attention(network, seen, bias=biased)
    rest = (network.depth - config.history_layers) * _attention(network, tokens, bias=False)
    mlp_size = round(hidden * network.mlp_ratio)
    block = 2 * tokens * hidden * (3 * hidden + hidden + 2 * mlp_size) + 2 * hidden * 6 * hidden
    patch = network.patch_size**2 * network.in_channels
    embed = 2 * tokens * patch * hidden + 2 * hidden * (network.frequency_size + hidden)
    head = 2 * tokens * hidden * patch + 2 * hidden * 2 * hidden
    return embed + network.depth * block + history + rest + head


def counted_flops(student: Student) -> int:
    """FLOPs of all S cached passes for one sample, counted by torch while they run without data (the meta device)."""
    from torch.utils.flop_counter import FlopCounterMode

    ghost = copy.deepcopy(student).to("meta")
    noise = torch.empty((1, *student.sample_shape), device="meta")
    labels = torch.empty(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for _ in ghost.rollout(noise, labels):
            pass
    return int(counter.get_total_flops())


def _attention(network: DiTConfig, seen: int, *, bias: bool) -> int:
    # Queries with keys, weights with values; a bias is one more channel in each (`ops.block_attention`).
    width = network.hidden_size + (network.num_heads if bias else 0)
    return 2 * 2 * network.tokens_per_step * seen * width
