"""Training: regression on stored trajectories."""

from pyard.training.config import TrainConfig
from pyard.training.distill import train

__all__ = ["TrainConfig", "train"]
