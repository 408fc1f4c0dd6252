"""Inputs and outputs that stay on the model's device: onnxruntime's IOBinding, and CUDA graphs on top of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray


class FixedBuffers:
    """Runs a session on buffers with fixed addresses, as CUDA graphs need them; there is one set of buffers per set of shapes.

    The first call with a batch size and condition sizes records a CUDA graph (onnxruntime's `gpu_graph_id`). Later calls replay
    it, with one launch instead of thousands. On the CPU the same calls run without a graph.

    Args:
        session: a session of the form `sampler`; on CUDA, opened with the provider option `enable_cuda_graph`.
        output: name of its output.
        shape: shape of one row of the output.
        dtype: dtype of the output.
        device: `cuda` or `cpu`.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, output: str, shape: tuple[int, ...], dtype: type[np.generic], device: str
    ):
        self._session, self._output, self._shape, self._dtype, self._device = session, output, shape, dtype, device
        self._bound: dict[tuple[tuple[int, ...], ...], tuple[Any, dict[str, Any], Any, int]] = {}
        # All threads share the buffers, and a graph cannot be recorded while another one runs.
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The output for these inputs, whose first dimension is the batch."""
        shapes = tuple(array.shape for array in inputs.values())
        with self._lock:
            if shapes not in self._bound:
                self._bound[shapes] = (*self._bind(shapes[0][0], inputs), len(self._bound) + 1)
            binding, values, output, graph = self._bound[shapes]
            for name, array in inputs.items():
                values[name].update_inplace(np.ascontiguousarray(array))
            options = onnxruntime.RunOptions()
            if self._device == "cuda":
                options.add_run_config_entry("gpu_graph_id", str(graph))
            self._session.run_with_iobinding(binding, options)
            result: NDArray[Any] = output.numpy().copy()
            return result

    def _bind(self, rows: int, inputs: Mapping[str, NDArray[Any]]) -> tuple[Any, dict[str, Any], Any]:
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        # Copies, since a CPU OrtValue shares the array's memory and would write into the caller's.
        values = {name: make(array.copy(), self._device, 0) for name, array in inputs.items()}
        output = make(np.zeros((rows, *self._shape), dtype=self._dtype), self._device, 0)
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(self._output, output)
        return binding, values, output


def run_on_device(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, NDArray[Any] | Any], device: str
) -> dict[str, Any]:
    """Run a session once; its outputs stay on the device.

    Args:
        session: any.
        inputs: numpy arrays, or OrtValues that an earlier call left on the device.
        device: `cuda` or `cpu`.

    Returns:
        Name of each output to its OrtValue.
    """
    binding = session.io_binding()
    for name, value in inputs.items():
        if isinstance(value, np.ndarray):
            binding.bind_cpu_input(name, value)
        else:
            binding.bind_ortvalue_input(name, value)
    names = [output.name for output in session.get_outputs()]
    for name in names:
        binding.bind_output(name, device)
    session.run_with_iobinding(binding)
    return dict(zip(names, binding.get_outputs(), strict=True))
