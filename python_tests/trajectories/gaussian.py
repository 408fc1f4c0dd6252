"""A teacher without a network: data that is Gaussian around a mean of its class, for which everything has a formula."""

from __future__ import annotations

import sys
from pathlib import Path
from time import sleep
from typing import Any

import torch

from pyard.conditions import ClassConditions, Condition
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.teachers import Teacher
from pyard.trajectories import TrajectoryStore, generate_trajectories

SPREAD = 0.5


class GaussianTeacher:
    """Predicts eps (or velocity, as its schedule says) of x_0 ~ N(mean of the class, SPREAD^2), the mean of no class being 0.

    Args:
        shape: [C, H, W].
        num_classes: the mean of class k is (k + 1) / num_classes.
        delay: seconds that a prediction takes.
        explode_from: times below this give predictions that are not finite.
        schedule: of the forward process; None: DDPM's.
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (1, 4, 4),
        num_classes: int = 3,
        delay: float = 0.0,
        fingerprint: str = "gaussian",
        explode_from: float = -1.0,
        schedule: NoiseSchedule | None = None,
    ):
        self.schedule = schedule or NoiseSchedule()
        self.sample_shape = shape
        self.conditions = ClassConditions(num_classes)
        self.fingerprint = fingerprint
        self.device = torch.device("cpu")
        self.delay = delay
        self.explode_from = explode_from
        self.samples_computed = 0

    def predict(self, x: torch.Tensor, time: float, condition: Condition) -> torch.Tensor:
        if self.delay:
            sleep(self.delay)
        if time < self.explode_from:
            return x * float("inf")
        self.samples_computed += len(x)
        alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
        mean = self.mean(condition["label"]).to(x).reshape(-1, *[1] * (x.ndim - 1))
        denoised = mean + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x - alpha * mean)
        eps = (x - alpha * denoised) / sigma
        return eps if self.schedule.prediction == "eps" else eps - denoised

    def mean(self, labels: torch.Tensor) -> torch.Tensor:
        """The classes' means [B], 0 for no class."""
        return torch.where(labels == self.conditions.count, 0.0, (labels + 1.0) / self.conditions.count)


def write(out: Path, count: int = 20, teacher: Teacher | None = None, **settings: Any) -> TrajectoryStore:
    """A small store: batches of 4, shards of 8, S = 3 out of 6 steps."""
    small: dict[str, Any] = dict(num_steps=3, teacher_steps=6, batch_size=4, shard_size=8, seed=7, progress=False)
    return generate_trajectories(teacher or GaussianTeacher(), out, count, **{**small, **settings})


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a store but the locks."""
    files = (path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Arguments: folder, count, seconds of a prediction, part (or "").
    write(Path(sys.argv[1]), int(sys.argv[2]), GaussianTeacher(delay=float(sys.argv[3])), part=sys.argv[4] or None)
