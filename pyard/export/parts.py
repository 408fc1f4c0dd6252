"""The few different parts of a student's pass, each traced once by torch's ONNX exporter, for any S and depth.

Every layer of every pass is a copy of the same block with other weights, and tracing costs about 10 ms per node. So one block
of each kind is traced, and `pyard.export.assembly` assembles the copies.

    B batch · n steps of one call · T tokens per step · D hidden · H heads · Dh head dim · K tokens of earlier steps · P patch
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from torch.nn import functional as F

from pyard.models.dit.network import Block, Head, Trunk, patchify, unpatchify

FIRST_OPSET_WITH_ATTENTION = 23

# part -> (its inputs, its outputs) in the traced graph
SIGNATURES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "embed": (("latent",), ("embedded",)),
    "condition": (("times", "label"), ("conditions",)),
    "block": (("tokens", "modulation"), ("block_out",)),
    "first_block": (("tokens", "modulation"), ("first_out", "first_key", "first_value")),
    "later_block": (("tokens", "modulation", "past_key", "past_value"), ("later_out", "later_key", "later_value")),
    "head": (("tokens", "head_modulation"), ("head_out",)),
}


@dataclass(frozen=True)
class TracedPart:
    """One part as ONNX nodes, which `assembly` copies with other weights.

    Args:
        inputs, outputs: values of the traced graph, in the order of `SIGNATURES`.
        nodes: the nodes, in an order in which they can run.
    """

    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]


def block_weights(block: nn.Module, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A block's weights as ONNX's MatMul takes them, [in, out], with q, k and v separate, so that no node has to split a
    product.

    Args:
        block: a block of the trunk, without its modulation, which `assembly` computes for all steps at once.
        bias: [H], the learned bias for keys of earlier steps, or None.
    """
    assert isinstance(block, Block)
    weights = {}
    names = ("q", "k", "v")
    parts = zip(names, block.attention.qkv.weight.chunk(3), block.attention.qkv.bias.chunk(3), strict=True)
    linears = [*parts, *((n, m.weight, m.bias) for n, m in
               (("proj", block.attention.proj), ("fc1", block.fc1), ("fc2", block.fc2)))]  # fmt: skip
    for name, weight, offset in linears:
        weights[f"{name}_weight"] = weight.detach().T.contiguous()
        weights[f"{name}_bias"] = offset.detach().contiguous()
    if bias is not None:
        head_dim = block.attention.qkv.in_features // block.attention.num_heads
        weights["history_channel"] = (bias.detach() * math.sqrt(head_dim))[:, None, None]
    return weights


def head_weights(head: Head) -> dict[str, torch.Tensor]:
    """A head's weights as ONNX's MatMul takes them, without its modulation, which `assembly` computes."""
    return {"weight": head.linear.weight.detach().T.contiguous(), "bias": head.linear.bias.detach()}


def embed_weights(trunk: Trunk) -> dict[str, torch.Tensor]:
    """The patch embedder's weights. The position embedding is added to the bias, which then is [T, D]."""
    bias = trunk.patch_embed.bias.detach() + trunk.pos_embed
    return {"weight": trunk.patch_embed.weight.detach().T.contiguous(), "bias": bias}


class _Part(nn.Module):
    """A module whose parameters have the names that `assembly` replaces."""

    def __init__(self, trunk: Trunk, weights: Mapping[str, torch.Tensor]):
        super().__init__()
        self.config = trunk.config
        for name, tensor in weights.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def weight_of(self, name: str) -> torch.Tensor:
        return self.get_parameter(name)

    def modulated(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
        # A single node: unlike torch, ONNX allows a norm's weight and bias to be a vector for each sample, [B, 1, D].
        attributes: dict[str, Any] = {"axis": -1, "epsilon": eps}
        return torch.onnx.ops.symbolic("LayerNormalization", (x, 1 + scale, shift), attributes, dtype=x.dtype, shape=x.shape)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight_of(f"{name}_weight") + self.weight_of(f"{name}_bias")


class BlockPart(_Part):
    """One block, whose attention is a single node."""

    def __init__(self, trunk: Trunk, weights: Mapping[str, torch.Tensor], opset: int):
        super().__init__(trunk, weights)
        self.opset = opset

    def forward(
        self,
        x: torch.Tensor,  # [B, T, D]
        modulation: torch.Tensor,  # [B, 6D]
        past: tuple[torch.Tensor, torch.Tensor] | None = None,  # keys and values [B, H, K, Dh] of the earlier steps
        remember: bool = False,
    ) -> tuple[torch.Tensor, ...]:  # [B, T, D], and if it remembers keys and values [B, H, K + T, Dh]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=-1)
        hidden = self.modulated(x, shift1, scale1, self.config.norm_eps)
        q, k, v = (self.linear(name, hidden) for name in "qkv")  # [B, T, D]
        present: tuple[torch.Tensor, ...] = ()
        if not remember:
            attended = self._attend_within(q, k, v)
        else:
            q, k, v = (self._split_heads(tensor) for tensor in (q, k, v))
            if past is not None:
                keys, values = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
            else:
                keys, values = k, v
            present = (keys, values)
            if past is not None and "history_channel" in self._parameters:
                # The bias is one more channel, 1 in q and bias * sqrt(Dh) in the keys of earlier steps: no mask is needed.
                earlier = self.weight_of("history_channel").expand(*past[0].shape[:3], 1)
                channel = torch.cat([earlier, torch.zeros_like(k[..., :1])], dim=2)
                q, keys = F.pad(q, (0, 1), value=1.0), torch.cat([keys, channel], dim=-1)
            attended = self._attend(q, keys, values)  # [B, T, D]
        x = x + gate1 * self.linear("proj", attended)
        assert self.config.mlp_norm_eps is not None
        hidden = self.modulated(x, shift2, scale2, self.config.mlp_norm_eps)
        hidden = F.gelu(self.linear("fc1", hidden), approximate="tanh")
        return x + gate2 * self.linear("fc2", hidden), *present

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, D] -> [B, H, T, Dh]
        return x.unflatten(-1, (self.config.num_heads, self.config.head_dim)).transpose(1, 2)

    def _attend_within(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # each [B, T, D]
        heads = self.config.num_heads
        if self.opset >= FIRST_OPSET_WITH_ATTENTION:
            return torch.onnx.ops.attention(q, k, v, q_num_heads=heads, kv_num_heads=heads)[0]
        return self._multi_head_attention(q, k, v)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # [B, H, _, _] -> [B, T, D]
        if self.opset >= FIRST_OPSET_WITH_ATTENTION:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.config.head_dim**-0.5)
            return out.transpose(1, 2).flatten(2)
        v = F.pad(v, (0, k.shape[-1] - v.shape[-1]))  # the operator wants keys and values of one size
        out = self._multi_head_attention(q.transpose(1, 2).flatten(2), k, v)
        return out.unflatten(-1, (self.config.num_heads, -1))[..., : self.config.head_dim].flatten(2)

    def _multi_head_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # onnxruntime's own operator, which takes q as [B, T, H*Dh], k and v like it or as [B, H, _, Dh].
        attributes: dict[str, Any] = {"num_heads": self.config.num_heads, "scale": self.config.head_dim**-0.5}
        operator = "com.microsoft::MultiHeadAttention"
        return torch.onnx.ops.symbolic(operator, (q, k, v), attributes, dtype=q.dtype, shape=q.shape, version=1)


class HeadPart(_Part):
    """The final layer, to a float32 image."""

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:  # [B,T,D], [B,2D] -> [B,C,H,W] float32
        shift, scale = modulation[:, None].chunk(2, dim=-1)
        tokens = self.modulated(x, shift, scale, self.config.norm_eps) @ self.weight_of("weight") + self.weight_of("bias")
        return unpatchify(tokens, self.config.patch_size, self.config.in_channels).float()


class EmbedPart(_Part):
    """The patch embedder."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:  # [B, C, H, W] float32 -> [B, T, D]
        patches = patchify(latent.to(self.weight_of("weight").dtype), self.config.patch_size)
        return patches @ self.weight_of("weight") + self.weight_of("bias")


class ConditionPart(_Part):
    """The conditioning vectors of n steps; everything that depends only on the time is an input."""

    def forward(self, times: torch.Tensor, label: torch.Tensor) -> torch.Tensor:  # [n, D], [B] -> [B, n, D]
        return F.silu(times + F.embedding(label, self.weight_of("labels"))[:, None])


class Parts(nn.Module):
    """All parts side by side, each with its own inputs, so that one call of the exporter traces them all."""

    def __init__(self, student: Trunk, dtype: torch.dtype, opset: int, biased: bool):
        super().__init__()
        config = student.config
        trunk = Trunk(dataclasses.replace(config, depth=1)).to(dtype)
        bias = torch.zeros(config.num_heads, dtype=dtype) if biased else None
        self.embed = EmbedPart(trunk, embed_weights(trunk))
        self.condition = ConditionPart(trunk, {"labels": trunk.label_embed.weight.detach()})
        self.block = BlockPart(trunk, block_weights(trunk.blocks[0], bias), opset)
        self.head = HeadPart(trunk, head_weights(Head(config).to(dtype)))

    def forward(
        self,
        latent: torch.Tensor,
        times: torch.Tensor,
        label: torch.Tensor,
        tokens: torch.Tensor,
        modulation: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
        head_modulation: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        return (
            self.embed(latent),
            self.condition(times, label),
            *self.block(tokens, modulation),
            *self.block(tokens, modulation, remember=True),
            *self.block(tokens, modulation, (past_key, past_value), remember=True),
            self.head(tokens, head_modulation),
        )


@functools.lru_cache(maxsize=8)
def trace(trunk: Trunk, dtype: torch.dtype, opset: int, biased: bool) -> tuple[dict[str, TracedPart], dict[str, ir.Value]]:
    """Trace every part of a student of these sizes once. The traced weights are placeholders.

    Args:
        trunk: trunk of the student, of which only the sizes are used.
        dtype: dtype in which the graph computes.
        opset: version of the ONNX operators.
        biased: whether the attentions to earlier steps have a learned bias.

    Returns:
        The parts by their names in `SIGNATURES`, and the weights and constants that they refer to, by name.
    """
    # Sizes that no dimension of the network has: torch.export treats 1 as a constant, and equal sizes as one size.
    batch, steps, past = (torch.export.Dim(name) for name in ("batch", "steps", "past"))
    config = trunk.config
    tokens = torch.zeros(2, config.tokens_per_step, config.hidden_size, dtype=dtype)
    keys = torch.zeros(2, config.num_heads, 3 * config.tokens_per_step, config.head_dim, dtype=dtype)
    arguments = {
        "latent": (torch.zeros(2, *config.sample_shape), {0: batch}),
        "times": (torch.zeros(3, config.hidden_size, dtype=dtype), {0: steps}),
        "label": (torch.zeros(2, dtype=torch.int64), {0: batch}),
        "tokens": (tokens, {0: batch}),
        "modulation": (torch.zeros(2, 6 * config.hidden_size, dtype=dtype), {0: batch}),
        "past_key": (keys, {0: batch, 2: past}),
        "past_value": (keys.clone(), {0: batch, 2: past}),
        "head_modulation": (torch.zeros(2, 2 * config.hidden_size, dtype=dtype), {0: batch}),
    }
    ends = [name for _, outputs in SIGNATURES.values() for name in outputs]
    graph = run_exporter(Parts(trunk, dtype, opset, biased), arguments, ends, opset)
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    parts = {}
    for name, (inputs, outputs) in SIGNATURES.items():
        last = tuple(values[output] for output in outputs)
        parts[name] = TracedPart(tuple(values[i] for i in inputs), last, _nodes_behind(graph, last))
    return parts, {str(name): value for name, value in graph.initializers.items()}


def run_exporter(module: nn.Module, arguments: dict[str, tuple[torch.Tensor, Any]], outputs: list[str], opset: int) -> ir.Graph:
    """Run torch's dynamo exporter without its messages.

    Args:
        module: the module to trace.
        arguments: an example of each input and its sizes that are not fixed, by the input's name.
        outputs: their names.
        opset: version of the ONNX operators.
    """
    with quiet_exporter():
        program = torch.onnx.export(
            module,
            tuple(tensor for tensor, _ in arguments.values()),
            input_names=list(arguments),
            output_names=outputs,
            dynamic_shapes=tuple(sizes for _, sizes in arguments.values()),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    without_paths(program.model)
    return program.model.graph


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Disable gradients and the messages of torch's exporter."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    try:
        registration.setLevel(logging.ERROR)  # it warns that torchvision is not installed
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            yield
    finally:
        registration.setLevel(level)


def without_paths(model: ir.Model) -> None:
    """Remove the source lines that the exporter records at every node: paths of this machine, larger than a small student."""
    ClearMetadataAndDocStringPass()(model)


def _nodes_behind(graph: ir.Graph, outputs: tuple[ir.Value, ...]) -> tuple[ir.Node, ...]:
    needed = {value.producer() for value in outputs}
    kept = []
    for node in reversed(list(graph)):
        if node in needed:
            kept.append(node)
            needed.update(value.producer() for value in node.inputs if value is not None)
    return tuple(reversed(kept))
