"""What a prediction is charged for, step by step.

B batch · S steps · C, H, W sample shape
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pyard.models.student_config import StudentConfig
from pyard.training.config import TrainConfig


@dataclass(frozen=True)
class RegressionLoss:
    """The loss of the S predictions of a batch.

    Args:
        kind: `mse`, the mean of d^2; `pseudo_huber`, sqrt(|d|^2 + c^2) - c with |d| over a sample's C*H*W numbers.
        huber_c: c.
        step_weights: S weights, mean 1.
        numbers: in a sample that `huber_c` is for: c grows with the square root of a sample's numbers; None: it is fixed.
    """

    kind: str
    huber_c: float
    step_weights: tuple[float, ...]
    numbers: int | None = None

    @classmethod
    def of(cls, config: TrainConfig, student: StudentConfig, sample_shape: tuple[int, ...] | None = None) -> RegressionLoss:
        """The loss that a configuration asks for.

        Args:
            config: settings.
            student: who learns.
            sample_shape: [C, ...] of the samples, whose times may depend on it; None: the usual one.
        """
        shape = student.trained_shape(sample_shape)
        grid, numbers = student.grid_of(shape), math.prod(shape)
        huber_c = 0.00054 * math.sqrt(numbers) if config.huber_c is None else config.huber_c
        if config.step_weights == "uniform":
            weights = [1.0] * grid.num_steps
        elif config.step_weights == "min_snr":
            # Clean data, where a trajectory ends, has an infinite ratio of signal to noise.
            weights = [min(_snr(student, time), config.min_snr_gamma) for time in grid.times[1:]]
        else:
            weights = [float(weight) for weight in config.step_weights]
        mean = sum(weights) / len(weights)
        return cls(
            config.loss, huber_c, tuple(weight / mean for weight in weights), numbers if config.huber_c is None else None
        )

    def per_step(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # [B, S or k, C, ...] twice -> [S or k]
        """The mean loss of each step, not weighted, in float32."""
        squares = (prediction.float() - target.float()).square()
        inner = tuple(range(2, squares.ndim))
        if self.kind == "mse":
            return squares.mean(dim=(0, *inner))
        c = self.huber_c * (1.0 if self.numbers is None else math.sqrt(math.prod(squares.shape[2:]) / self.numbers))
        return ((squares.sum(dim=inner) + c**2).sqrt() - c).mean(dim=0)

    def total(self, per_step: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:  # [S or k], int64 [k] -> []
        """The weighted mean over the steps, or over those of them that were kept: the same on average over all subsets."""
        weights = torch.tensor(self.step_weights, device=per_step.device)
        return (per_step * (weights if kept is None else weights[kept])).mean()


def _snr(student: StudentConfig, time: float) -> float:
    alpha, sigma = student.schedule.alpha(time), student.schedule.sigma(time)
    return math.inf if sigma == 0 else (alpha / sigma) ** 2
