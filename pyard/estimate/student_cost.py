"""What a student costs: parameters, multiplications, cache, and how much of that the history adds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from pyard.cost.flops import flops_per_pass, without_weights
from pyard.models.backbone import Backbone
from pyard.models.student import Student


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


def describe(student: Student | str | Path, *, network: type[Backbone] | str | None = None) -> Description:
    """Print what a student costs.

    Example: pyard describe runs/digits

    Args:
        student: the student, or the folder of a run or student.
        network: class of the backbone of a folder's student that is none of pyard's, or its "package.module:Class".

    Returns:
        The numbers, for one image.
    """
    student = student if isinstance(student, Student) else Student.from_pretrained(student, network=network)
    description = count(student)
    print(description)
    return description


def count(student: Student) -> Description:
    """The numbers of `describe`, counted while the student runs without data."""
    config = student.config
    shapes = student.trunk.attention_shapes(config.history_layers, student.sample_shape)
    kept = 2 * student.num_steps * sum(math.prod(shape) for shape in shapes)
    ghost = without_weights(student)
    plain = Student(dataclasses.replace(config, history_layers=0, history_bias=None), ghost.trunk, ghost.heads[0])
    plain.conditions = student.conditions
    return Description(
        num_steps=student.num_steps,
        history_layers=config.history_layers,
        parameters=sum(p.numel() for p in student.parameters()),
        trainable_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
        flops_per_pass=flops_per_pass(student),
        flops_without_history=sum(flops_per_pass(plain)),
        cache_bytes=kept * next(student.trunk.parameters()).element_size(),
    )


def _short(value: float, unit: str) -> str:
    if value < 1000:
        return f"{value:.0f} {unit}".rstrip()
    power = min(4, int(math.log10(value) / 3))
    return f"{value / 1000**power:.3g} {' kMGT'[power]}{unit}"
