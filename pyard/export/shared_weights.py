"""Stores weights that are common to several graphs of a folder once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

_SMALLEST = 1024  # bytes; less stays in the graph
_ALIGNMENT, _LARGE, _PAGE = 64, 2**20, 4096  # bytes: large weights begin a page, which onnxruntime maps into memory


class SharedWeights:
    """A file of weights beside the graphs that use it, in which equal weights are stored once.

    Args:
        path: path of the file, which is overwritten.
    """

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[tuple[str, tuple[int, ...], bytes], tuple[int, int]] = {}  # (dtype, shape, sha256) to offset, length
        path.write_bytes(b"")

    def move(self, model_path: Path) -> None:
        """Move the weights of a graph in the same folder into the file, and remove the graph's own file of weights if it has
        one.

        Args:
            model_path: path of the graph, whose metadata do not change.
        """
        model = ir.load(model_path)
        own = {
            Path(value.const_value.path)
            for value in model.graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        with self.path.open("ab") as file:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _SMALLEST or tensor.dtype == ir.DataType.STRING:
                    continue
                content = tensor.tobytes()
                shape = tuple(int(size) for size in tensor.shape.numpy())
                key = (tensor.dtype.name, shape, hashlib.sha256(content).digest())
                if key not in self._places:
                    file.write(bytes(-file.tell() % (_PAGE if len(content) >= _LARGE else _ALIGNMENT)))
                    self._places[key] = (file.tell(), len(content))
                    file.write(content)
                offset, length = self._places[key]
                value.const_value = ir.ExternalTensor(
                    self.path.name,
                    offset,
                    length,
                    tensor.dtype,
                    shape=ir.Shape(shape),
                    name=str(value.name),
                    base_dir=self.path.parent,
                )
        model_path.write_bytes(ir.to_proto(model).SerializeToString())
        for path in own - {self.path}:
            path.unlink()
