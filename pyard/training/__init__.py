"""Training: a student learns from its teacher's stored trajectories."""

from pyard.training.config import TrainConfig
from pyard.training.distill import train, train_command

__all__ = ["TrainConfig", "train", "train_command"]
