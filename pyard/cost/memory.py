"""Memory of an update on one GPU, by formula.

P parameters of the student · L depth · D hidden · H heads · T tokens · S steps · B micro-batch · e bytes of a number in the
precision that matrices are multiplied in: 2 under mixed precision, 4 without
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

from pyard.models.dit.network import DiTConfig
from pyard.models.student_config import StudentConfig


class Discriminators(Protocol):
    """Sizes of the adversarial stage, by the names of its settings."""

    @property
    def blocks(self) -> tuple[int, ...] | None: ...
    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def kernel_size(self) -> int: ...


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU; the sum is what an update needs at most, for gradients grow while activations shrink.

    Args:
        weights: of the student, float32, and what mixed precision casts of them.
        averages: all EMAs.
        optimizer: two moments of each parameter.
        gradients: and with DDP as much again, its buckets.
        gathered: with FSDP, what is whole for a while: two blocks and all that is in no block.
        frozen: the teacher that the adversarial stage looks through.
        discriminators: weights, gradients and moments.
        activations: kept between forward and backward pass.
    """

    weights: float
    averages: float
    optimizer: float
    gradients: float
    gathered: float
    frozen: float
    discriminators: float
    activations: float

    @property
    def total(self) -> float:
        """Bytes in all; CUDA's own context (about 0.5 GB) and fragmentation come on top."""
        return float(sum(dataclasses.astuple(self)))


def update_memory(
    student: StudentConfig,
    parameters: int,
    batch: int,
    *,
    world: int = 1,
    averages: int = 1,
    mixed: bool = False,
    checkpointing: bool = False,
    sharded: bool = False,
    plain: bool = False,
    adversarial: Discriminators | None = None,
    teacher: tuple[DiTConfig, int] | None = None,
) -> Memory:
    """Memory of an update.

    Args:
        student: sizes.
        parameters: P.
        batch: B, samples of a micro-batch on each GPU.
        world: how many GPUs.
        averages: how many EMAs.
        mixed: bf16 or fp16.
        checkpointing: activation checkpointing.
        sharded: FSDP instead of DDP.
        plain: operators in plain PyTorch, which keep the normalised inputs of a block as well.
        adversarial: settings of the adversarial stage; None: regression.
        teacher: its network and parameters, for that stage.
    """
    share = 1 / world if sharded else 1.0
    cast = 2 * parameters if mixed else 0
    network = _dit(student)
    block = block_parameters(network)
    outside = parameters - network.depth * block
    states, discriminators, kept = 4 * parameters * share, 0.0, _activations(student, batch, mixed, checkpointing, plain)
    frozen = 0.0
    if adversarial is not None and teacher is not None:
        frozen = 4.0 * teacher[1] + (2.0 * teacher[1] if mixed else 0.0)
        blocks = tuple(range(teacher[0].depth)) if adversarial.blocks is None else adversarial.blocks
        discriminators = 16.0 * len(blocks) * head_parameters(teacher[0], adversarial)
        tokens = batch * teacher[0].tokens_per_step
        kept += tokens * (max(blocks) + 1) * block_bytes(teacher[0], mixed, plain)
        # Features of both samples in float32; a head keeps input, output and normalised output of each layer.
        kept += 4.0 * tokens * len(blocks) * (2 * network.hidden_size + adversarial.width * (5 + 4 * adversarial.depth))
    return Memory(
        # Of a block in shards, autograd keeps the cast weights until its backward pass, unless that computes it again.
        weights=states + (0 if sharded and checkpointing else cast),
        averages=averages * states,
        optimizer=2 * states,
        gradients=states + (4 * parameters if world > 1 and not sharded else 0),
        gathered=(4 + (2 if mixed else 0)) * (2 * block + outside) if sharded else 0.0,
        frozen=frozen,
        discriminators=discriminators,
        activations=kept,
    )


def _dit(student: StudentConfig) -> DiTConfig:
    assert isinstance(student.network, DiTConfig)
    return student.network


def block_bytes(network: DiTConfig, mixed: bool, plain: bool) -> float:
    """What a block keeps of each token for its backward pass.

    In float32, the residual stream twice and both branches: 4 (4 D). In the precision of the products, the input of qkv, q, k,
    v, the attention's output, the MLP's input and its hidden layer before and after the activation: e (D + 3 D + D + D + 8 D),
    the last for mlp_ratio 4. The logarithms of the softmax's sums, 4 H; a step's six modulations, e 6 D / T. In plain PyTorch
    two normalised inputs more, 8 D.
    """
    e, hidden = (2 if mixed else 4), network.hidden_size
    products = e * hidden * (6 + 2 * network.mlp_ratio)
    modulations = e * 6 * hidden / network.tokens_per_step
    return 16 * hidden + products + 4 * network.num_heads + modulations + (8 * hidden if plain else 0)


def block_parameters(network: DiTConfig) -> int:
    """Of one adaLN-Zero block: modulation, attention and MLP, with their biases."""
    hidden, mlp = network.hidden_size, round(network.hidden_size * network.mlp_ratio)
    return hidden * (6 * hidden + 4 * hidden + 2 * mlp) + 6 * hidden + 4 * hidden + mlp + hidden


def head_parameters(network: DiTConfig, settings: Discriminators) -> int:
    """Of one discriminator head."""
    hidden, width = network.hidden_size, settings.width
    layers = hidden * width + settings.depth * width * width * settings.kernel_size + (settings.depth + 1) * 3 * width
    return layers + width * width + width + hidden * width + width


def _activations(student: StudentConfig, batch: int, mixed: bool, checkpointing: bool, plain: bool) -> float:
    network = _dit(student)
    tokens = batch * student.grid.num_steps * network.tokens_per_step
    block = block_bytes(network, mixed, plain)
    # Checkpointing keeps each block's input, and all of the one that is computed again. The gradients in a block's backward
    # pass are about a quarter of what it kept; embeddings and heads keep their input and its normalised form.
    blocks = network.depth * 4 * network.hidden_size + block if checkpointing else network.depth * block
    return tokens * (blocks + 0.25 * block + 8 * network.hidden_size)
