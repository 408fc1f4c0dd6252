"""pyard: few-step students of diffusion transformers by autoregressive distillation, shipped to ONNX Runtime.

The public names below are imported on first use: `import pyard` itself costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyard.version import MISSING, __version__

_HOMES = {
    "ARDPipeline": "pyard.pipeline",
    "Description": "pyard.estimate.student_cost",
    "InputError": "pyard.errors",
    "NoiseSchedule": "pyard.diffusion.noise_schedule",
    "Student": "pyard.models.student",
    "StudentConfig": "pyard.models.student_config",
    "Teacher": "pyard.teachers",
    "TimeGrid": "pyard.diffusion.time_grid",
    "TrajectoryReader": "pyard.trajectories",
    "TrajectoryStore": "pyard.trajectories",
    "describe": "pyard.estimate.student_cost",
    "evaluate": "pyard.evaluation",
    "generate_trajectories": "pyard.trajectories",
    "load_ard_student": "pyard.models.dit.ard_checkpoint",
    "load_teacher": "pyard.teachers",
    "sample": "pyard.sampling.draw",
    "save_ard_student": "pyard.models.dit.ard_checkpoint",
    "train": "pyard.training",
}

__all__ = [*_HOMES, "__version__"]

# `as`: for type checkers, a name that is only imported is not exported.
if TYPE_CHECKING:
    from pyard.diffusion.noise_schedule import NoiseSchedule as NoiseSchedule
    from pyard.diffusion.time_grid import TimeGrid as TimeGrid
    from pyard.errors import InputError as InputError
    from pyard.estimate.student_cost import Description as Description
    from pyard.estimate.student_cost import describe as describe
    from pyard.evaluation import evaluate as evaluate
    from pyard.models.dit.ard_checkpoint import load_ard_student as load_ard_student
    from pyard.models.dit.ard_checkpoint import save_ard_student as save_ard_student
    from pyard.models.student import Student as Student
    from pyard.models.student_config import StudentConfig as StudentConfig
    from pyard.pipeline import ARDPipeline as ARDPipeline
    from pyard.sampling.draw import sample as sample
    from pyard.teachers import Teacher as Teacher
    from pyard.teachers import load_teacher as load_teacher
    from pyard.training import train as train
    from pyard.trajectories import TrajectoryReader as TrajectoryReader
    from pyard.trajectories import TrajectoryStore as TrajectoryStore
    from pyard.trajectories import generate_trajectories as generate_trajectories


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pyard' has no attribute {name!r}")
    try:
        module = importlib.import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("pyard."):
            raise
        raise ModuleNotFoundError(f"pyard.{name}: {MISSING}", name=error.name) from None
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
