"""FLOPs of a DiT by formula: what counting must agree with."""

from __future__ import annotations

from pyard.models.dit.network import DiTConfig
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
