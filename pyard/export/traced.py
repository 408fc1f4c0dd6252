"""Both ONNX forms of a student of any backbone, traced as a whole by torch's exporter.

`sampler`: noise and condition -> sample, the S passes one after the other. `step`: latent, condition, step, past keys and
    values -> prediction, present keys and values, one graph for all steps, which looks up times, jumps and heads by the step's
    number and takes a past of any length.

    B batch · S steps · H heads · T tokens per step · K tokens of earlier steps that are still seen · Dh head dim
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from pyard.errors import InputError
from pyard.export.assembly import Form
from pyard.export.condition_inputs import TRACED_BATCH, ConditionInputs
from pyard.export.decoder import Decoder
from pyard.export.files import IR_VERSION
from pyard.export.parts import quiet_exporter, without_paths
from pyard.export.traced_student import TracedSampler, TracedStep, TracedStudent, still_seen
from pyard.models.backbone import AttentionShape
from pyard.models.student import Student
from pyard.ops import use_backend
from pyard.version import __version__


def trace_student(
    student: Student,
    form: Form,
    opset: int,
    inputs: ConditionInputs,
    dtype: torch.dtype = torch.float32,
    decoder: Decoder | None = None,
) -> ir.Model:
    """The ONNX model of a student of any backbone.

    Args:
        student: a student on the CPU, in float32.
        form: `sampler` or `step`.
        opset: version of the ONNX operators.
        inputs: the student's condition.
        dtype: dtype of weights, arithmetic, keys and values; noise, conditions, jumps and predictions are always float32.
        decoder: turns the sample, or each prediction, into pictures.

    Raises:
        InputError: the backbone cannot be traced, with the exporter's reason, such as a variable size that it turns into a
            constant, or an operation that ONNX does not have.
    """
    network = (TracedSampler if form == "sampler" else TracedStep)(student, inputs.names, dtype, decoder)
    arguments, sizes = _arguments(network, student, form, inputs)
    names = ["noise" if form == "sampler" else "latent", *inputs.names]
    kinds = [f"{attention}.{kind}" for attention in range(len(network.shapes)) for kind in ("key", "value")]
    outputs = ["sample"]
    if form == "step":
        names += ["step", *(f"past_key_values.{kind}" for kind in kinds)]
        outputs = ["prediction", *(f"present.{kind}" for kind in kinds), *(["image"] if decoder else [])]
    program = _export(network, arguments, sizes, names, outputs, opset)
    graph = program.model.graph
    _name_sizes(graph, sizes)
    _name_weights(graph, network)
    _transpose_weights(graph)
    _expand_masks(graph)
    program.optimize()
    model: ir.Model = program.model
    _split_gemms(model.graph)
    _transpose_weights(model.graph)
    _shape_outputs(model.graph, student, network.shapes, form)
    model.graph.name = f"pyard_{form}"
    without_paths(model)
    model.ir_version, model.producer_name, model.producer_version = IR_VERSION[opset], "pyard", __version__
    return model


def _arguments(network: TracedStudent, student: Student, form: Form, inputs: ConditionInputs) -> tuple[Any, Any]:
    batch = torch.export.Dim("batch")
    dims = {name: torch.export.Dim(name) for name in inputs.traced_sizes}
    free = tuple(
        {0: batch, **{i: dims[s] for i, s in enumerate(item.sizes, 1) if isinstance(s, str)}} for item in inputs.inputs
    )
    arguments: list[Any] = [torch.zeros(TRACED_BATCH, *student.sample_shape), inputs.example()]
    sizes: list[Any] = [{0: batch}, free]
    if form == "step":
        past = torch.export.Dim("past")
        keys = [
            torch.zeros(TRACED_BATCH, shape.heads, 3 * shape.tokens, shape.head_dim, dtype=network.dtype)
            for shape in network.shapes
            for _ in range(2)
        ]
        arguments += [torch.tensor(1), tuple(keys)]
        sizes += [None, tuple({0: batch, 2: past} for _ in keys)]
    return tuple(arguments), tuple(sizes)


def _export(network: TracedStudent, arguments: Any, sizes: Any, names: list[str], outputs: list[str], opset: int) -> Any:
    family = type(network.trunk).__name__
    try:
        with quiet_exporter(), use_backend("reference"):
            # Not done by torch.onnx.export, which would fall back to a trace in which variable sizes are constants.
            program = torch.export.export(network.eval(), arguments, dynamic_shapes=sizes, strict=False)
            _drop_idle_squeezes(program)
            return torch.onnx.export(
                program,
                input_names=names,
                output_names=outputs,
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except InputError:
        raise
    # torch.export and torch.onnx raise many kinds of exceptions: UserError, missing operators, a TypeError of the network.
    except Exception as error:
        raise InputError(f"{family} cannot be traced for ONNX: {_reason(error)}") from error


def _drop_idle_squeezes(program: torch.export.ExportedProgram) -> None:
    """Remove squeezes of dimensions with more than one entry, which torch ignores and ONNX refuses."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim:
            tensor, dim = node.args
            size = tensor.meta["val"].shape[dim]
            if isinstance(size, int) and size != 1:
                node.replace_all_uses_with(tensor)
                program.graph.erase_node(node)


def _reason(error: BaseException) -> str:
    constant = re.search(r"You marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", str(error))
    if constant:
        name, size = constant.groups()
        return (
            f"its forward makes the size {name!r} a constant ({size}, that of the example): "
            "take it from tensor.shape, without len() or int(), and never compare it with a number"
        )
    cause = error
    while cause.__cause__ is not None:  # torch.onnx's own message tells its users what to report where
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {' '.join(lines[:3])[:400]}"


def _name_sizes(graph: ir.Graph, sizes: Any) -> None:
    """Rename torch's symbols (s24, …) to the names of the sizes, in every shape."""
    flat = torch.utils._pytree.tree_flatten(sizes, is_leaf=lambda leaf: leaf is None or isinstance(leaf, dict))[0]
    symbols = {}
    for value, free in zip(graph.inputs, flat, strict=True):
        for dim, size in (free or {}).items():
            assert value.shape is not None
            symbols[str(value.shape[dim].value)] = size.__name__  # type: ignore[union-attr]
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            named = [
                re.sub(r"\w+", lambda word: symbols.get(word[0], word[0]), str(dim.value))
                if isinstance(dim, ir.SymbolicDim)
                else dim
                for dim in value.shape
            ]
            value.shape = ir.Shape(named)


def _name_weights(graph: ir.Graph, network: TracedStudent) -> None:
    """Rename the blocks' weights to blocks.0.…, because the quantiser selects weights by name."""
    names = {id(parameter): f"blocks.{name}" for name, parameter in network.trunk.blocks.named_parameters()}
    for name, parameter in network.named_parameters():
        if id(parameter) in names and name in graph.initializers:
            graph.initializers[name].name = names[id(parameter)]


def _split_gemms(graph: ir.Graph) -> None:
    """Replace Gemm by a product and a sum: onnxruntime's quantiser would do so in place, once per use of a weight."""
    for node in list(graph):
        kinds = {name: attribute.value for name, attribute in node.attributes.items()}
        plain = (kinds.get("alpha", 1.0), kinds.get("beta", 1.0), kinds.get("transA", 0)) == (1.0, 1.0, 0)
        if node.op_type != "Gemm" or not plain or len(node.inputs) < 3:
            continue
        x, weight, bias = node.inputs[:3]
        nodes = []
        if kinds.get("transB", 0):
            nodes.append(ir.Node("", "Transpose", [weight], [ir.AttrInt64s("perm", [1, 0])], name=f"{node.name}.transpose"))
            weight = nodes[-1].outputs[0]
        product = ir.Node("", "MatMul", [x, weight], name=str(node.name))
        total = ir.Node("", "Add", [product.outputs[0], bias], name=f"{node.name}.bias")
        for added in (*nodes, product, total):
            added.outputs[0].name = f"{added.name}:0"
            added.outputs[0].type = node.outputs[0].type
            graph.insert_before(node, added)
        product.outputs[0].shape = total.outputs[0].shape = node.outputs[0].shape
        ir.convenience.replace_all_uses_with(node.outputs[0], total.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _transpose_weights(graph: ir.Graph) -> None:
    """Replace each transposition of a weight by a transposed weight, which is stored once under the weight's name.

    torch stores [out, in], and ONNX's MatMul takes [in, out]. The exporter's optimiser does this only for small weights, under
    new names.
    """
    transposed: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or not weight.is_initializer():
            continue
        order = tuple(node.attributes["perm"].as_ints())
        if (weight, order) not in transposed:
            array = weight.const_value.numpy().transpose(order).copy()
            name = f"{weight.name}.transposed"
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape), type=weight.type)
            graph.register_initializer(value)
            transposed[weight, order] = value
        ir.convenience.replace_all_uses_with(node.outputs[0], transposed[weight, order])
        graph.remove(node, safe=True)
    for weight, _ in transposed:
        if not weight.uses() and weight.name in graph.initializers:
            del graph.initializers[str(weight.name)]


def _expand_masks(graph: ir.Graph) -> None:
    """Repeat attention masks over the queries, because onnxruntime's operator only broadcasts over batch and heads."""
    for node in list(graph):
        if node.op_type != "Attention" or len(node.inputs) < 4 or node.inputs[3] is None:
            continue
        query, mask = node.inputs[0], node.inputs[3]
        if query is None or query.shape is None or mask.shape is None or mask.shape[-2] == query.shape[2]:
            continue
        length = ir.Node("", "Shape", [query], [ir.AttrInt64("start", 2), ir.AttrInt64("end", 3)], name=f"{node.name}.queries")
        one = _int64(graph, f"{node.name}.one", 1)
        shape = ir.Node("", "Concat", [length.outputs[0], one], [ir.AttrInt64("axis", 0)], name=f"{node.name}.mask_shape")
        expanded = ir.Node("", "Expand", [mask, shape.outputs[0]], name=f"{node.name}.mask")
        expanded.outputs[0].type = mask.type
        for added in (length, shape, expanded):
            added.outputs[0].name = f"{added.name}:0"
            graph.insert_before(node, added)
        node.replace_input_with(3, expanded.outputs[0])


def _shape_outputs(graph: ir.Graph, student: Student, shapes: Sequence[AttentionShape], form: Form) -> None:
    """Cut the present keys and values to those that the mask shows to the next step, and set every output's shape."""
    graph.outputs[0].shape = ir.Shape(["batch", *list(graph.outputs[0].shape or ())[1:]])
    if form != "step":
        return
    for i in range(2 * len(shapes)):
        shape, value = shapes[i // 2], graph.outputs[1 + i]
        first, end = still_seen(student.config.mask, student.config.window, shape.tokens)
        if (first, end) != (0, None):
            name, whole = value.name, f"{value.name}.all"
            value.name = whole
            limits = [
                _int64(graph, f"{name}.{k}", n)
                for k, n in (("first", first), ("end", 2**62 if end is None else end), ("axis", 2))
            ]
            node = ir.Node("", "Slice", [value, *limits], name=f"{name}.slice")
            node.outputs[0].name, node.outputs[0].type = name, value.type
            graph.append(node)
            graph.outputs[1 + i] = value = node.outputs[0]
        value.shape = ir.Shape(["batch", shape.heads, "present", shape.head_dim])


def _int64(graph: ir.Graph, name: str, number: int) -> ir.Value:
    tensor = ir.tensor([number], dtype=ir.DataType.INT64, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    graph.register_initializer(value)
    return value
