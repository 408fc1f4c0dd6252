"""What a student costs: parameters, multiplications, cache, and how much of that the history adds."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from pyard.models.dit import DiTConfig
from pyard.models.student import Student, StudentConfig
from pyard.ops.masks import visible_steps


@dataclass(frozen=True)
class Description:
    """The costs of a student for one image; a multiplication with its addition counts as two FLOPs.

    Args:
        num_steps: S.
        history_layers: N.
        parameters: of the whole student.
        trainable_parameters: of those, what training changes.
        flops_per_pass: of each of the S passes; later ones see more history.
        flops_without_history: of all S passes with N = 0.
        cache_bytes: keys and values that are kept between the passes, in the dtype of the weights.
    """

    num_steps: int
    history_layers: int
    parameters: int
    trainable_parameters: int
    flops_per_pass: tuple[int, ...]
    flops_without_history: int
    cache_bytes: int

    @property
    def flops_per_image(self) -> int:
        """Of all S passes."""
        return sum(self.flops_per_pass)

    @property
    def history_percent(self) -> float:
        """What the history adds to the FLOPs of the same student with N = 0."""
        return 100 * (self.flops_per_image / self.flops_without_history - 1)

    def __str__(self) -> str:
        passes = ", ".join(_short(flops, "FLOPs") for flops in self.flops_per_pass)
        trained = "" if self.trainable_parameters == self.parameters else f", {_short(self.trainable_parameters, '')} trained"
        return "\n".join([
            f"steps              {self.num_steps}, history in the lowest {self.history_layers} layers",
            f"parameters         {_short(self.parameters, '')}{trained}",
            f"per pass           {passes}",
            f"per image          {_short(self.flops_per_image, 'FLOPs')}",
            f"cache per image    {_short(self.cache_bytes, 'B')}",
            f"cost of history    +{self.history_percent:.2f} % of the FLOPs without",
        ])  # fmt: skip


def describe(student: Student | str | Path) -> Description:
    """Print what a student costs.

    Example: pyard describe runs/digits

    Args:
        student: the student, or the folder of a run or student.

    Returns:
        The numbers, for one image.
    """
    student = student if isinstance(student, Student) else Student.from_pretrained(student)
    description = count(student)
    print(description)
    return description


def count(student: Student) -> Description:
    """The numbers of `describe`, from the sizes of matrices alone."""
    config, network = student.config, student.config.network
    plain = dataclasses.replace(config, history_layers=0)
    weight = next(student.trunk.parameters())
    kept = 2 * config.history_layers * student.num_steps * network.tokens_per_step * network.hidden_size
    return Description(
        num_steps=student.num_steps,
        history_layers=config.history_layers,
        parameters=sum(p.numel() for p in student.parameters()),
        trainable_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
        flops_per_pass=tuple(flops_of_pass(config, s) for s in range(student.num_steps)),
        flops_without_history=sum(flops_of_pass(plain, s) for s in range(student.num_steps)),
        cache_bytes=kept * weight.element_size(),
    )


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


def _short(value: float, unit: str) -> str:
    if value < 1000:
        return f"{value:.0f} {unit}".rstrip()
    power = min(4, int(math.log10(value) / 3))
    return f"{value / 1000**power:.3g} {' kMGT'[power]}{unit}"
