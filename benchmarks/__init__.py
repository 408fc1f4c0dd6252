"""Measurements, each a command: `python -m benchmarks.cpu_ops`."""
