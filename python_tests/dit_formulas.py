"""FLOPs and memory of a DiT by formula: what counting must agree with.

L depth · D hidden · H heads · T tokens · S steps · e bytes of a number in the precision that matrices are multiplied in: 2
under mixed precision, 4 without
"""

from __future__ import annotations

from pyard.models.dit.config import DiTConfig
from pyard.models.student_config import StudentConfig
from pyard.ops.masks import visible_steps


def flops_of_pass(config: StudentConfig, step: int) -> int:
    """FLOPs of the matrix products of one cached pass for one sample."""
    network = config.network
    assert isinstance(network, DiTConfig)
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


def flops_of_passes(config: StudentConfig) -> int:
    """FLOPs of all S cached passes for one sample."""
    return sum(flops_of_pass(config, step) for step in range(config.grid.num_steps))


def _attention(network: DiTConfig, seen: int, *, bias: bool) -> int:
    # Queries with keys, weights with values; a bias is one more channel in each (`ops.block_attention`).
    width = network.hidden_size + (network.num_heads if bias else 0)
    return 2 * 2 * network.tokens_per_step * seen * width


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


def frozen_block_bytes(network: DiTConfig, mixed: bool, plain: bool) -> float:
    """Of a block whose weights are not trained.

    The inputs of linear layers drop out: those of qkv and of both layers of the MLP, e (D + D + 4 D); that of the projection is
    kept as the attention's output. In plain PyTorch, so do the factors of scales and gates: two normalised inputs and two
    branches, 4 (4 D).
    """
    e, hidden = (2 if mixed else 4), network.hidden_size
    return block_bytes(network, mixed, plain) - 6 * e * hidden - (16 * hidden if plain else 0)


def block_parameters(network: DiTConfig) -> int:
    """Of one adaLN-Zero block: modulation, attention and MLP, with their biases."""
    hidden, mlp = network.hidden_size, round(network.hidden_size * network.mlp_ratio)
    return hidden * (6 * hidden + 4 * hidden + 2 * mlp) + 6 * hidden + 4 * hidden + mlp + hidden


def activation_bytes(student: StudentConfig, batch: int, mixed: bool, checkpointing: bool, plain: bool) -> float:
    """What an update keeps of a micro-batch."""
    network = student.network
    assert isinstance(network, DiTConfig)
    tokens = batch * student.grid.num_steps * network.tokens_per_step
    block = block_bytes(network, mixed, plain)
    # Checkpointing keeps each block's input, and all of the one that is computed again. The gradients in a block's backward
    # pass are about a quarter of what it kept; embeddings and heads keep their input and its normalised form.
    blocks = network.depth * 4 * network.hidden_size + block if checkpointing else network.depth * block
    return tokens * (blocks + 0.25 * block + 8 * network.hidden_size)
