"""Who can teach: anything that predicts, knows its noise schedule and can be told from another by its fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pyard.errors import InputError

if TYPE_CHECKING:
    import torch

    from pyard.noise_schedule import NoiseSchedule
    from pyard.teachers.dit import DiTTeacher


@runtime_checkable
class Teacher(Protocol):
    """What trajectories are generated with.

    Attributes:
        schedule: forward process and what `predict` returns.
        sample_shape: (C, H, W) of one sample.
        num_classes: labels are 0 ... num_classes - 1; the label `num_classes` itself means "no class".
        fingerprint: changes whenever the predictions do; trajectories and students remember it.
        device: where `predict` wants its tensors.
    """

    schedule: NoiseSchedule
    sample_shape: tuple[int, int, int]
    num_classes: int

    @property
    def fingerprint(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    def predict(
        self,
        x: torch.Tensor,  # [B, C, H, W], x_t
        time: float,
        labels: torch.Tensor,  # [B] int64
    ) -> torch.Tensor:  # [B, C, H, W]
        """The network's output F at one time for a batch; what it means is `schedule.prediction`."""
        ...


def load_teacher(source: str | Path) -> DiTTeacher:
    """Load a teacher.

    Args:
        source: `digits`, the built-in teacher of scikit-learn's handwritten digits (trained on first use, then cached), or the
            folder of a teacher that pyard wrote.

    Returns:
        The teacher, ready for `generate_trajectories` and `train`.

    Raises:
        InputError: nothing there that pyard knows how to read.
    """
    from pyard.teachers.dit import DiTTeacher

    if str(source) == "digits":
        from pyard.teachers.digits import digits_teacher

        return digits_teacher()
    if not Path(source).exists():
        raise InputError(f"teacher {str(source)!r}: neither a built-in teacher ('digits') nor an existing folder")
    return DiTTeacher.from_pretrained(source)
