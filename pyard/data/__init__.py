"""Data sets for teachers and adversarial stages, and pictures."""
