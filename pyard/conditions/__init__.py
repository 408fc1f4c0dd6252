"""What a sample is conditioned on: stored as a number, given to the network as named tensors."""

from pyard.conditions.condition import Condition, as_condition
from pyard.conditions.prompt_file import PromptLine, read_prompts
from pyard.conditions.prompts import Encoded, PromptTable, TextEncoder
from pyard.conditions.table import ClassConditions, Conditions, EmbeddingTable, load_conditions, save_conditions

__all__ = [
    "ClassConditions",
    "Condition",
    "Conditions",
    "EmbeddingTable",
    "Encoded",
    "PromptLine",
    "PromptTable",
    "TextEncoder",
    "as_condition",
    "load_conditions",
    "read_prompts",
    "save_conditions",
]
