"""Benchmarks that users can repeat: `pyard bench onnx`."""
