"""What a sample is conditioned on: a number on disk, a bundle of tensors at the network's door."""

from pyard.conditions.condition import Condition, as_condition
from pyard.conditions.table import ClassConditions, Conditions, EmbeddingTable, load_conditions, save_conditions

__all__ = ["ClassConditions", "Condition", "Conditions", "EmbeddingTable", "as_condition", "load_conditions", "save_conditions"]
