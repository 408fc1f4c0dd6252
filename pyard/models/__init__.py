"""Networks: the diffusion transformer, the history it is given, and the student they make."""
