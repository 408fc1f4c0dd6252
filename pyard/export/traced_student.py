"""A student of any backbone in the form that torch's exporter runs: one step or all of them, with sizes that may be symbolic.

B batch · S steps · H heads · Hk heads of keys · T tokens per step · K tokens of earlier steps that are still seen · Dh head dim
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from pyard.conditions import Condition
from pyard.errors import InputError
from pyard.export.assembly import remembered_layers
from pyard.models.backbone import AttentionShape
from pyard.models.history import ConcatenatingCache, History
from pyard.models.student import Student
from pyard.models.wrapped.backbone import WrappedBackbone
from pyard.models.wrapped.exportable import ExportableCalls
from pyard.models.wrapped.output_layers import OutputLayers

Past = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each attention that remembers, [B, Hk, K, Dh]


class VisiblePast(History):
    """The attention of a single step to keys of earlier steps, all of which the mask makes visible.

    The code does not use the number of these steps, so it may be symbolic.
    """

    def attend(self, attention: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attend_rows(attention, q, k, v)

    def attend_rows(
        self,
        attention: int,
        q: torch.Tensor,  # [B, H, Q, Dh]
        k: torch.Tensor,  # [B, Hk, own, Dh]
        v: torch.Tensor,  # [B, Hk, own, Dh]
        *,
        image: slice = slice(None),
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:  # [B, H, Q, Dh]
        cache = self.cache
        assert isinstance(cache, ConcatenatingCache)
        if attention != len(cache.present):
            raise InputError(
                f"history: attention {attention} is called as number {len(cache.present)}; count in order of execution"
            )
        past = list(cache.past[attention]) if attention < len(cache.past) else None
        cache.extend(attention, k[:, :, image], v[:, :, image])
        gqa = q.shape[1] != k.shape[1]
        if past is not None:
            if attn_mask is not None:
                earlier = (*attn_mask.shape[:-1], past[0].shape[2])
                shown = attn_mask.new_ones(earlier) if attn_mask.dtype == torch.bool else attn_mask.new_zeros(earlier)
                attn_mask = torch.cat([shown, attn_mask], dim=-1)
            if self.bias is not None:
                if gqa:
                    # torch.export cannot tell the strides of grouped keys that have one more channel. repeat_interleave would
                    # become a Reshape to -1, which an empty past does not survive.
                    group = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
                    k, v, *past = (tensor.index_select(1, group) for tensor in (k, v, *past))
                    gqa = False
                # One more channel, 1 in the keys of earlier steps: a mask would be as large as the logits in onnxruntime.
                scale = q.shape[-1] ** -0.5 if scale is None else scale
                channel = (self.bias[attention] / scale).clamp(min=torch.finfo(q.dtype).min / 2).to(q.dtype)  # [H]
                q = torch.cat([q, channel[:, None, None].expand(*q.shape[:3], 1)], dim=-1)
                past = [torch.cat([past[0], torch.ones_like(past[0][..., :1])], dim=-1), past[1]]
                k = torch.cat([k, torch.zeros_like(k[..., :1])], dim=-1)
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale, enable_gqa=gqa)


class HeadOfStep(nn.Module):
    """The head of a step whose number is a tensor: every weight is looked up among those of all steps.

    Args:
        heads: the heads of all steps, which only differ in their weights.
    """

    def __init__(self, heads: Sequence[nn.Module]):
        super().__init__()
        states = [{**dict(head.named_parameters()), **dict(head.named_buffers())} for head in heads]
        self.names = list(states[0])
        self.stacked = nn.ParameterList(
            nn.Parameter(torch.stack([state[name].detach() for state in states]), requires_grad=False) for name in self.names
        )
        self._head = [heads[0]]  # in a list, so that its own weights are no part of the graph
        self.number: torch.Tensor | None = None  # [1]

    def forward(self, *rows: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        assert self.number is not None
        weights = {name: stack.index_select(0, self.number)[0] for name, stack in zip(self.names, self.stacked, strict=True)}
        output: torch.Tensor = torch.func.functional_call(self._head[0], weights, rows, named)
        return output

    def at(self, number: torch.Tensor) -> None:
        """Become the head of this step, [1] int64."""
        self.number = number


class OutputLayersOfStep(nn.Module):
    """The output layers of a diffusers transformer for a step whose number is a tensor.

    Args:
        heads: the output layers of all steps.
    """

    def __init__(self, heads: Sequence[OutputLayers]):
        super().__init__()
        self.tables = list(dict(heads[0].named_parameters(recurse=False)))
        for name in dict(heads[0].named_children()):
            self.add_module(name, HeadOfStep([head.get_submodule(name) for head in heads]))
        for name in self.tables:
            stacked = torch.stack([head.get_parameter(name).detach() for head in heads])
            self.register_buffer(f"{name}_of_steps", stacked)

    def at(self, number: torch.Tensor) -> None:
        """Become the layers of this step, [1] int64."""
        for layer in self.children():
            assert isinstance(layer, HeadOfStep)
            layer.at(number)
        for name in self.tables:
            self.__dict__[name] = self.get_buffer(f"{name}_of_steps").index_select(0, number)[0]


class TracedStudent(nn.Module):
    """What both forms of an exported student have in common.

    Args:
        student: a student in float32.
        names: names of the condition's tensors.
        dtype: dtype in which the network computes.
        decoder: decoder of pictures, in float32.

    Attributes:
        shapes: shapes of what each attention with a history adds to the cache in a step; empty if the mask shows no earlier
            step.
    """

    times: torch.Tensor

    def __init__(self, student: Student, names: Sequence[str], dtype: torch.dtype, decoder: nn.Module | None):
        super().__init__()
        layers = remembered_layers(student)
        self.shapes: list[AttentionShape] = student.trunk.attention_shapes(layers, student.sample_shape) if layers else []
        self.config, self.names, self.dtype = student.config, names, dtype
        if dtype != torch.float32:
            student = copy.deepcopy(student).to(dtype)
        trunk = student.trunk
        if isinstance(trunk, WrappedBackbone):
            trunk = copy.deepcopy(trunk)
            trunk.prepare_for_export(student.sample_shape)
        self.trunk, self.decoder, self.jumps = trunk, decoder, student.jumps
        self.history_bias = student.history_bias
        self.register_buffer("times", student.embed_times.float())

    def run(
        self,
        latest: torch.Tensor,  # [B, C, ...] float32
        condition: tuple[torch.Tensor, ...],
        time: torch.Tensor,  # [1]
        heads: Sequence[nn.Module],  # one
        past: Past,
    ) -> tuple[torch.Tensor, Past]:  # [B, C, ...] float32
        """The network's output for one step, and all keys and values so far."""
        cache, history = ConcatenatingCache(past), None
        if self.shapes:
            history = VisiblePast(self.config.history_layers, 1, "causal", None, self.history_bias, cache)
        kinds = [tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in condition]
        named = Condition(dict(zip(self.names, kinds, strict=True)))
        with ExportableCalls():
            output = self.trunk(latest.to(self.dtype)[:, None], time[None], named, heads, history)[:, 0]
        if len(cache.present) != len(self.shapes):
            raise InputError(
                f"attention_shapes names {len(self.shapes)} attentions with a history; {len(cache.present)} used it"
            )
        return output.float(), cache.present


class TracedSampler(TracedStudent):
    """All S steps in one call."""

    def __init__(self, student: Student, names: Sequence[str], dtype: torch.dtype, decoder: nn.Module | None):
        super().__init__(student, names, dtype, decoder)
        self.heads = student.heads if dtype == torch.float32 else copy.deepcopy(student.heads).to(dtype)

    def forward(self, noise: torch.Tensor, condition: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """noise [B, C, ...] float32 -> sample [B, C, ...] float32, or pictures."""
        past: Past = []
        latest = noise
        for step in range(self.config.grid.num_steps):
            output, present = self.run(latest, condition, self.times[step : step + 1], self.heads.steps(step, 1), past)
            if self.jumps:
                a, b = self.jumps[step]
                output = a * latest + b * output
            limits = [still_seen(self.config.mask, self.config.window, shape.tokens) for shape in self.shapes]
            past = [(k[:, :, slice(*ends)], v[:, :, slice(*ends)]) for (k, v), ends in zip(present, limits, strict=True)]
            latest = output
        return latest if self.decoder is None else self.decoder(latest)


class TracedStep(TracedStudent):
    """Any one step, by its number."""

    jump_table: torch.Tensor

    def __init__(self, student: Student, names: Sequence[str], dtype: torch.dtype, decoder: nn.Module | None):
        super().__init__(student, names, dtype, decoder)
        heads = list(student.heads if dtype == torch.float32 else copy.deepcopy(student.heads).to(dtype))
        self.head = heads[0] if len(heads) == 1 else _head_of_step(heads)
        self.register_buffer("jump_table", torch.tensor(student.jumps, dtype=torch.float32).reshape(-1, 2))

    def forward(
        self,
        latent: torch.Tensor,  # [B, C, ...] float32
        condition: tuple[torch.Tensor, ...],
        step: torch.Tensor,  # [] int64
        past: tuple[torch.Tensor, ...],  # keys, values, keys, values, ... [B, H, K, Dh]
    ) -> tuple[torch.Tensor, ...]:
        """prediction [B, C, ...] float32, the present keys and values [B, H, K + T, Dh], and pictures."""
        number = step.reshape(1)
        if isinstance(self.head, HeadOfStep | OutputLayersOfStep):
            self.head.at(number)
        pairs = list(zip(past[::2], past[1::2], strict=True))
        output, present = self.run(latent, condition, self.times.index_select(0, number), [self.head], pairs)
        if self.jumps:
            a, b = self.jump_table.index_select(0, number).unbind(1)  # [1] each
            output = a * latent + b * output
        pictures = () if self.decoder is None else (self.decoder(output),)
        return output, *(tensor for pair in present for tensor in pair), *pictures


def _head_of_step(heads: list[nn.Module]) -> HeadOfStep | OutputLayersOfStep:
    layers = [head for head in heads if isinstance(head, OutputLayers)]
    return OutputLayersOfStep(layers) if layers else HeadOfStep(heads)


def still_seen(mask: str, window: int | None, tokens: int) -> tuple[int, int | None]:
    """Which of the keys so far the mask shows to the next step, as the ends of a slice."""
    if mask == "anchor":
        return 0, tokens
    return (-((window or 1) - 1) * tokens, None) if mask == "window" else (0, None)
