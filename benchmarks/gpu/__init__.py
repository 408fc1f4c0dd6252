"""What is measured on a GPU machine that is had for minutes: see benchmarks/GPU.md."""
