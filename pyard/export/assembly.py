"""Both ONNX forms of a student, assembled from copies of its traced parts; each weight is stored once.

`sampler`: noise, label -> sample, the S passes one after the other. `step`: latent, label, step, past keys and values ->
    prediction, present keys and values. Everything that depends only on time is a constant: the time embeddings and the jumps'
    coefficients.

    B batch · n steps of one call · D hidden · H heads · Dh head dim · K tokens of earlier steps that are still seen
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from pyard.errors import InputError
from pyard.export.decoder import Decoder, trace_decoder
from pyard.export.files import IR_VERSION
from pyard.export.parts import TracedPart, block_weights, embed_weights, head_weights, trace
from pyard.models.dit.network import Trunk
from pyard.models.student import Student
from pyard.ops import use_backend
from pyard.version import __version__

Form = Literal["sampler", "step"]

Cache = list[tuple[ir.Value, ir.Value]]  # keys and values of each layer that remembers, [B, H, K, Dh]


def assemble(
    student: Student, form: Form, opset: int, dtype: torch.dtype = torch.float32, decoder: Decoder | None = None
) -> ir.Model:
    """The ONNX model of a student.

    Args:
        student: a student on the CPU, in float32.
        form: `sampler` or `step`.
        opset: version of the ONNX operators.
        dtype: dtype of weights, arithmetic, keys and values; latents, jumps and predictions are always float32.
        decoder: turns the sample, or each prediction, into pictures, in float32 (many decoders overflow in half precision).
    """
    assembly = _Assembly(student, opset, dtype)
    assembly.decoder = decoder
    inputs, outputs = assembly.sampler() if form == "sampler" else assembly.step()
    imports = {"": opset, **({"com.microsoft": 1} if any(node.domain for node in assembly.nodes) else {})}
    graph = ir.Graph(inputs, outputs, nodes=assembly.nodes, opset_imports=imports, name=f"pyard_{form}")
    for value in assembly.constants.values():
        if value.uses():
            graph.register_initializer(value)
    return ir.Model(graph, ir_version=IR_VERSION[opset], producer_name="pyard", producer_version=__version__)


def remembered_layers(student: Student) -> int:
    """The number of layers that keep keys and values from one step to the next: N, or 0 if the mask shows no earlier step."""
    config = student.config
    alone = config.mask == "diagonal" or (config.mask == "window" and config.window == 1) or student.num_steps == 1
    return 0 if alone else config.history_layers


class _Assembly:
    """The nodes and constants of a graph under construction."""

    def __init__(self, student: Student, opset: int, dtype: torch.dtype):
        if not isinstance(student.trunk, Trunk):
            raise InputError(f"the assembled graph is that of a DiT; this student's network is {student.config.family}")
        self.student, self.trunk = student, student.trunk
        self.config = self.trunk.config
        self.dtype = dtype
        biased = student.history_bias is not None and remembered_layers(student) > 0
        self.parts, self.traced_constants = trace(self.trunk, dtype, opset, biased)
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}
        self.onnx_dtype = ir.DataType.FLOAT if dtype == torch.float32 else ir.DataType.FLOAT16
        self.known: dict[tuple[str, tuple[int, ...], bytes], str] = {}  # constants without a name of their own
        self.blocks: dict[int, dict[str, ir.Value]] = {}
        self.decoder: Decoder | None = None
        self.opset = opset
        self.scope = ""

    def sampler(self) -> tuple[list[ir.Value], list[ir.Value]]:
        noise, label = self._input("noise", ["batch", *self.student.sample_shape]), self._label()
        latent = noise
        conditions, modulations = self._modulations(self._times(), label)
        cache: Cache | None = None
        for step in range(self.student.num_steps):
            self.scope = f"step{step}/"
            tokens, cache = self._blocks(latent, [self._pick(m, step) for m in modulations], cache)
            head = self.student.heads[step % len(self.student.heads)]
            weights = self._head_constants(f"heads.{step % len(self.student.heads)}", head)
            output = self._head(tokens, self._pick(conditions, step), weights)
            if self.student.jumps:
                a, b = (self._constant(np.float32(c)) for c in self.student.jumps[step])
                output = self._jump(latent, output, a, b)
            latent = output
        self.scope = ""
        return [noise, label], [self._picture(latent, "sample") if self.decoder else self._sample(latent, "sample")]

    def step(self) -> tuple[list[ir.Value], list[ir.Value]]:
        student, config = self.student, self.config
        latent, label = self._input("latent", ["batch", *student.sample_shape]), self._label()
        number = ir.Value(name="step", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        keys_shape = ["batch", config.num_heads, "past", config.head_dim]
        past = [
            tuple(self._input(f"past_key_values.{layer}.{kind}", keys_shape, self.onnx_dtype) for kind in ("key", "value"))
            for layer in range(remembered_layers(student))
        ]
        of_step = self._op("Unsqueeze", number, self._constant(np.array([0])))  # [1]
        conditions, modulations = self._modulations(self._op("Gather", self._times(), of_step, axis=0), label)
        tokens, cache = self._blocks(latent, [self._pick(m, 0) for m in modulations], [(k, v) for k, v in past])
        weights = self._head_constants("heads.0", student.heads[0])
        if len(student.heads) > 1:
            every = [self._head_arrays(head) for head in student.heads]
            stacked = {name: torch.stack([weights[name] for weights in every]) for name in every[0]}
            weights = {n: self._op("Gather", self._weight(f"heads.{n}", w), number, axis=0) for n, w in stacked.items()}
        output = self._head(tokens, self._pick(conditions, 0), weights)
        if student.jumps:
            table = np.asarray(student.jumps, dtype=np.float32)
            a, b = (self._op("Gather", self._constant(column.copy()), number, axis=0) for column in table.T)
            output = self._jump(latent, output, a, b)
        outputs = [self._sample(output, "prediction")]
        shape = ["batch", config.num_heads, "present", config.head_dim]
        for layer, pair in enumerate(cache):
            kinds = zip(pair, ("key", "value"), strict=True)
            outputs += [self._output(value, f"present.{layer}.{kind}", shape, self.onnx_dtype) for value, kind in kinds]
        if self.decoder:
            outputs.append(self._picture(output, "image"))
        return [latent, label, number, *(value for pair in past for value in pair)], outputs

    def _times(self) -> ir.Value:  # [S, D]
        with use_backend("reference"), torch.no_grad():
            embedded = self.trunk.time_embed(self.student.embed_times.float())
        return self._weight("time_embedding", embedded)

    def _modulations(self, times: ir.Value, label: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """The conditioning [B, n, D] of n steps and from it every block's modulation [B, n, 6D]: their weights, a third of a
        DiT's, are read once for all steps."""
        (conditions,) = self._part(
            "condition", [times, label], {"labels": self._weight("labels", self.trunk.label_embed.weight)}
        )
        blocks = enumerate(self.trunk.dit_blocks)
        return conditions, [self._linear(conditions, f"blocks.{i}.modulation", b.modulation) for i, b in blocks]

    def _blocks(
        self, latent: ir.Value, modulations: Sequence[ir.Value], past: Cache | None
    ) -> tuple[ir.Value, Cache]:  # [B, T, D]
        trunk = self.trunk
        weights = {name: self._weight(f"embed.{name}", weight) for name, weight in embed_weights(trunk).items()}
        (tokens,) = self._part("embed", [latent], weights)
        present: Cache = []
        scope = self.scope
        for layer, block in enumerate(trunk.dit_blocks):
            self.scope = f"{scope}block{layer}/"
            remembers = layer < remembered_layers(self.student)
            bias = self.student.history_bias[layer] if remembers and self.student.history_bias is not None else None
            if layer not in self.blocks:  # once, not in every pass: it copies
                named = block_weights(block, bias).items()
                self.blocks[layer] = {name: self._weight(f"blocks.{layer}.{name}", weight) for name, weight in named}
            weights = self.blocks[layer]
            inputs = [tokens, modulations[layer]]
            if not remembers:
                (tokens,) = self._part("block", inputs, weights)
            else:
                part = "first_block" if past is None else "later_block"
                tokens, key, value = self._part(part, [*inputs, *(past[layer] if past else ())], weights)
                present.append((self._still_seen(key), self._still_seen(value)))
        self.scope = scope
        return tokens, present

    def _still_seen(self, present: ir.Value) -> ir.Value:
        """What the mask shows the next step of a layer's keys or values [B, H, K, Dh]: all, the first, or the last ones."""
        tokens, mask = self.config.tokens_per_step, self.student.config.mask
        if mask == "causal":
            return present
        first, end = (0, tokens) if mask == "anchor" else (-((self.student.config.window or 1) - 1) * tokens, 2**62)
        return self._op("Slice", present, *(self._constant(np.array([n])) for n in (first, end, 2)))

    def _head_arrays(self, head: Any) -> dict[str, torch.Tensor]:
        modulation = {
            "modulation_weight": _transposed(head.modulation.weight),
            "modulation_bias": head.modulation.bias.detach(),
        }
        return {**head_weights(head), **modulation}

    def _head_constants(self, name: str, head: Any) -> dict[str, ir.Value]:
        return {n: self._weight(f"{name}.{n}", w) for n, w in self._head_arrays(head).items()}

    def _head(self, tokens: ir.Value, condition: ir.Value, weights: Mapping[str, ir.Value]) -> ir.Value:
        product = self._op("MatMul", condition, weights["modulation_weight"])
        modulation = self._op("Add", product, weights["modulation_bias"])
        (output,) = self._part("head", [tokens, modulation], {name: weights[name] for name in ("weight", "bias")})
        return output

    def _jump(self, latent: ir.Value, output: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._op("Add", self._op("Mul", a, latent), self._op("Mul", b, output))

    def _linear(self, x: ir.Value, name: str, module: Any) -> ir.Value:
        product = self._op("MatMul", x, self._weight(f"{name}.weight", _transposed(module.weight)))
        return self._op("Add", product, self._weight(f"{name}.bias", module.bias.detach()))

    def _pick(self, stacked: ir.Value, step: int) -> ir.Value:  # [B, n, ...] -> [B, ...]
        return self._op("Gather", stacked, self._constant(np.array(step)), axis=1)

    def _part(self, name: str, inputs: Sequence[ir.Value], weights: Mapping[str, ir.Value]) -> list[ir.Value]:
        """Copy a part's nodes onto new inputs and weights."""
        part = self.parts[name]
        prefix = {"first_block": "block", "later_block": "block"}.get(name, name)
        traced = self.traced_constants
        replaced = {traced[f"{prefix}.{n}"]: value for n, value in weights.items() if f"{prefix}.{n}" in traced}
        return self._copy(part, inputs, replaced)

    def _copy(self, part: TracedPart, inputs: Sequence[ir.Value], weights: Mapping[ir.Value, ir.Value]) -> list[ir.Value]:
        new: dict[ir.Value, ir.Value] = {**weights, **dict(zip(part.inputs, inputs, strict=True))}
        for node in part.nodes:
            for source in node.inputs:
                if source is not None and source not in new:
                    assert source.const_value is not None, f"{source.name} is not an input, weight or constant"
                    new[source] = self._constant(source.const_value.numpy())
            copied = self._node(
                node.op_type,
                [None if source is None else new[source] for source in node.inputs],
                node.attributes.values(),
                len(node.outputs),
                domain=node.domain,
            )
            new.update(zip(node.outputs, copied.outputs, strict=True))
        return [new[value] for value in part.outputs]

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self._node(op_type, inputs, ir.convenience.convert_attributes(attributes), 1).outputs[0]

    def _node(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Iterable[ir.Attr], outputs: int, domain: str = ""
    ) -> ir.Node:
        name = f"{self.scope}{op_type}_{len(self.nodes)}"
        values = [ir.Value(name=f"{name}:{i}") for i in range(outputs)]
        node = ir.Node(domain, op_type, inputs, list(attributes), outputs=values, name=name)
        self.nodes.append(node)
        return node

    def _weight(self, name: str, tensor: torch.Tensor) -> ir.Value:
        if name not in self.constants:
            self._store(name, tensor.detach().to(self.dtype).contiguous().numpy())
        return self.constants[name]

    def _constant(self, value: Any) -> ir.Value:
        """An unnamed constant, which is stored only once and keeps its dtype."""
        array = np.array(value)
        name = self.known.setdefault((array.dtype.str, array.shape, array.tobytes()), f"constant_{len(self.known)}")
        if name not in self.constants:
            self._store(name, array)
        return self.constants[name]

    def _store(self, name: str, array: np.ndarray) -> None:
        kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        tensor = ir.tensor(array, name=name)
        self.constants[name] = ir.Value(name=name, const_value=tensor, type=kind, shape=ir.Shape(array.shape))

    def _input(self, name: str, shape: list[Any], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def _label(self) -> ir.Value:
        return self._input("label", ["batch"], ir.DataType.INT64)

    def _sample(self, value: ir.Value, name: str) -> ir.Value:
        return self._output(value, name, ["batch", *self.student.sample_shape], ir.DataType.FLOAT)

    def _picture(self, latent: ir.Value, name: str) -> ir.Value:  # [B, C, H, W] -> uint8 [B, height, width, 3]
        assert self.decoder is not None
        part, weights = trace_decoder(self.decoder, self.student.sample_shape, self.opset)
        for weight, value in weights.items():
            assert value.const_value is not None
            self._store(f"vae.{weight}", value.const_value.numpy())
        (picture,) = self._copy(part, [latent], {value: self.constants[f"vae.{n}"] for n, value in weights.items()})
        sizes = part.outputs[0].shape
        assert sizes is not None
        return self._output(picture, name, ["batch", *list(sizes)[1:]], ir.DataType.UINT8)

    def _output(self, value: ir.Value, name: str, shape: list[Any], dtype: ir.DataType) -> ir.Value:
        named = self._op("Identity", value)
        named.name, named.shape, named.type = name, ir.Shape(shape), ir.TensorType(dtype)
        return named


def _transposed(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().T.contiguous()
