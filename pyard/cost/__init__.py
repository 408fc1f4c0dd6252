"""FLOPs and memory, and what devices have of both."""
