"""Training: a student learns from its teacher's stored trajectories, then, if wanted, from discriminators."""

from pyard.training.adversarial_config import AdversarialConfig
from pyard.training.config import TrainConfig
from pyard.training.distill import train, train_command

__all__ = ["AdversarialConfig", "TrainConfig", "train", "train_command"]
