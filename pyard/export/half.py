"""Converts a graph to half precision, except layers whose values it cannot represent.

The float32 graph is run to see how large its values become. Nodes that read or write a value beyond half of fp16's range stay
in float32, and so do operations that half precision would make inaccurate without overflowing: sums of squares, and angles
before a sine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from pyard.errors import InputError

# Half of the largest number, because other prompts may reach higher values.
LIMIT = float(np.finfo(np.float16).max) / 2

_IN_FLOAT32 = {"Constant", "ConstantOfShape", "Exp", "Pow", "Range", "Reciprocal", "ReduceMean", "ReduceSum", "Sqrt"}
_ANGLES = {"Cos", "Sin"}
_KEPT_INPUTS = "past_key_values"  # keys and values: in half precision from one step to the next
_PROBE = ".largest"


def halve(source: Path, target: Path, feeds: Iterable[Mapping[str, NDArray[Any]]], *, external_data: bool) -> list[str]:
    """Write a copy of a float32 model in half precision. Inputs and outputs stay float32, except keys and values.

    Args:
        source: the float32 file.
        target: the file to write; metadata are copied.
        feeds: typical inputs of the model, at least one.
        external_data: write weights to `<target>.data`.

    Returns:
        The layers that stay in float32 because their values are too large, by the names of their weights.

    Raises:
        InputError: the model has branches or loops.
    """
    with TemporaryDirectory(dir=source.parent) as folder:
        typed = Path(folder) / source.name
        onnx.shape_inference.infer_shapes_path(str(source), str(typed))
        for data in source.parent.glob(f"{source.name}.data"):
            (Path(folder) / data.name).hardlink_to(data)
        model = ir.load(typed)
        if any(_has_graph(node) for node in model.graph):
            raise InputError("fp16: the graph has branches or loops; use precision fp32 or int8")
        largest = _largest(model, Path(folder) / "probed.onnx", feeds, external_data)
        large = {node for node in model.graph if _reaches(node, largest)}
        exact = large | {node for node in model.graph if node.op_type in _IN_FLOAT32} | _before_angles(model.graph)
        _convert(model.graph, exact)
        ir.save(model, target, external_data=f"{target.name}.data" if external_data else None)
    return sorted({_layer_of(node) for node in large})


def _has_graph(node: ir.Node) -> bool:
    return any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values())


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _largest(model: ir.Model, path: Path, feeds: Iterable[Mapping[str, NDArray[Any]]], external_data: bool) -> dict[str, float]:
    """The largest finite absolute value of each float32 tensor of the graph, by name."""
    probed = model.clone()
    graph = probed.graph
    zero = ir.Value(name=f"zero{_PROBE}", const_value=ir.tensor(np.zeros(1, np.float32), name=f"zero{_PROBE}"))
    flat = ir.Value(name=f"flat{_PROBE}", const_value=ir.tensor(np.array([-1]), name=f"flat{_PROBE}"))
    for constant in (zero, flat):
        graph.register_initializer(constant)
    outputs = []
    for node in list(graph):
        for value in [output for output in node.outputs if _is_float(output)]:
            # With a zero, because an empty past has no largest value.
            vector = ir.node("Reshape", [value, flat])
            more = ir.node("Concat", [vector.outputs[0], zero], {"axis": 0})
            size = ir.node("Abs", more.outputs)
            biggest = ir.node("ReduceMax", size.outputs, {"keepdims": 0})
            output = biggest.outputs[0]
            output.name, output.dtype, output.shape = f"{value.name}{_PROBE}", ir.DataType.FLOAT, ir.Shape([])
            graph.extend([vector, more, size, biggest])
            outputs.append(output)
    graph.outputs.extend(outputs)
    ir.save(probed, path, external_data=f"{path.name}.data" if external_data else None)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [str(output.name) for output in outputs]
    known = {tensor.name for tensor in session.get_inputs()}
    largest = dict.fromkeys((name.removesuffix(_PROBE) for name in names), 0.0)
    for feed in feeds:
        found = session.run(names, {name: array for name, array in feed.items() if name in known})
        for name, size in zip(largest, found, strict=True):
            # Infinity comes from a mask, and half precision has it too; NaN would be an error of the graph.
            largest[name] = max(largest[name], float(size) if np.isfinite(size) else 0.0)
    for value in model.graph.initializers.values():
        if _is_float(value) and value.const_value is not None and value.const_value.size:
            array = np.abs(value.const_value.numpy())
            largest[str(value.name)] = float(np.max(array, initial=0.0, where=np.isfinite(array)))
    return largest


def _reaches(node: ir.Node, largest: Mapping[str, float]) -> bool:
    return any(largest.get(str(value.name), 0.0) > LIMIT for value in (*node.inputs, *node.outputs) if value is not None)


def _before_angles(graph: ir.Graph) -> set[ir.Node]:
    """Sines, cosines, and all nodes that compute their angles."""
    found: set[ir.Node] = set()
    waiting = [node for node in graph if node.op_type in _ANGLES]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(p for value in node.inputs if value is not None and (p := value.producer()) is not None)
    return found


def _layer_of(node: ir.Node) -> str:
    """The name of the weight that a node uses, or else the one that the nearest preceding node uses."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop(0)
        for value in current.inputs:
            if value is None:
                continue
            if value.is_initializer() and (name := str(value.name)).split(".")[-1] in ("weight", "bias", "transposed"):
                return name.removesuffix(".transposed").rpartition(".")[0]
            producer = value.producer()
            if producer is not None and producer not in seen:
                seen.add(producer)
                waiting.append(producer)
    return str(node.name)


def _convert(graph: ir.Graph, exact: set[ir.Node]) -> None:
    """Give every node except the exact ones half-precision inputs and outputs, with casts in between."""
    inputs, outputs = list(graph.inputs), [value for value in graph.outputs if value is not None]
    floats = {value for node in graph for value in (*node.inputs, *node.outputs) if value is not None and _is_float(value)}
    halves: dict[ir.Value, ir.Value] = {}
    wholes: dict[ir.Value, ir.Value] = {}
    first = next(iter(graph))
    for value in inputs:
        if value in floats and str(value.name).startswith(_KEPT_INPUTS):
            value.dtype = ir.DataType.FLOAT16
            halves[value] = value
    for node in list(graph):
        if node not in exact:
            for value in node.outputs:
                if value in floats:
                    value.dtype = ir.DataType.FLOAT16
                    halves[value] = value
            if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
        for i, given in enumerate(node.inputs):
            if given is None or given not in floats:
                continue
            if node not in exact:
                if given not in halves:
                    halves[given] = _other(graph, given, ir.DataType.FLOAT16, first)
                node.replace_input_with(i, halves[given])
            elif given.dtype == ir.DataType.FLOAT16:
                if given not in wholes:
                    wholes[given] = _other(graph, given, ir.DataType.FLOAT, first)
                node.replace_input_with(i, wholes[given])
    for i, value in enumerate(outputs):
        kept = str(value.name).startswith("present.")
        wanted = ir.DataType.FLOAT16 if kept else ir.DataType.FLOAT
        if value in floats and value.dtype != wanted:
            name, shape = value.name, value.shape
            value.name = f"{name}.inner"
            graph.outputs[i] = other = _other(graph, value, wanted, first)
            other.name, other.shape = name, shape
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in graph.outputs:
            del graph.initializers[name]


def _other(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, first: ir.Node) -> ir.Value:
    """A value in the other precision: a converted constant, or a cast after the node that computes it."""
    suffix = "half" if dtype == ir.DataType.FLOAT16 else "float"
    if value.is_initializer() and value.const_value is not None:
        kind = np.float16 if dtype == ir.DataType.FLOAT16 else np.float32
        with np.errstate(over="ignore"):
            array = value.const_value.numpy().astype(kind)
        name = f"{value.name}.{suffix}"
        constant = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=value.shape, type=ir.TensorType(dtype))
        graph.register_initializer(constant)
        return constant
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], name=f"{value.name}.to_{suffix}")
    output = cast.outputs[0]
    output.name, output.dtype, output.shape = f"{value.name}.{suffix}", dtype, value.shape
    producer = value.producer()
    if producer is None:
        graph.insert_before(first, cast)
    else:
        graph.insert_after(producer, cast)
    return output
