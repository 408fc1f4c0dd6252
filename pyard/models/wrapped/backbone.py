"""A diffusers transformer as a backbone.

B batch · S steps · R = B * S rows · C channels · h, w sides of a sample · n text tokens · T image tokens · D hidden
"""

from __future__ import annotations

import abc
import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from pyard.conditions import Condition
from pyard.errors import InputError
from pyard.models.backbone import AttentionShape, Backbone, Denoiser
from pyard.models.history import History
from pyard.models.pretrained import check_config
from pyard.models.wrapped.attention import Place, remember
from pyard.models.wrapped.config import WrappedConfig
from pyard.models.wrapped.current_pass import CurrentPass
from pyard.models.wrapped.output_layers import OutputLayers, put_output, take_output


class WrappedBackbone(Backbone):
    """A diffusers transformer whose output layers are separated as a head, and whose lowest self-attentions have a history.

    A subclass for each family defines in a few lines how the transformer is called, where its self-attentions are, and how its
    tokens become samples.

    Args:
        config: the sizes.
        transformer: the model, which is changed in place; its output layers must have been taken out. None: a new one.

    Class attributes:
        transformer_name: name of its class in diffusers.
        block_lists: attributes of the transformer that contain its blocks, in order of execution.
        attention_names: names of a block's self-attentions over image tokens, in order of execution; a block may lack some.
        output_places: paths in the transformer of the output layers, by name.
        image_first: whether image tokens come before text tokens in those attentions.
        unread_layers: layers of the last block whose output is not used, such as the last ones for text tokens.
        flow_time_scale: factor by which the pipelines multiply a flow's sigma before they pass it to the transformer.
    """

    config_class: ClassVar[type[Any]] = WrappedConfig
    row_arguments: ClassVar[tuple[str, ...] | None] = ("hidden_states", "encoder_hidden_states", "temb")
    transformer_name: ClassVar[str]
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    attention_names: ClassVar[tuple[str, ...]] = ("attn",)
    output_places: ClassVar[Mapping[str, str]] = {"norm_out": "norm_out", "proj_out": "proj_out"}
    image_first: ClassVar[bool] = True
    unread_layers: ClassVar[tuple[str, ...]] = ()
    flow_time_scale: ClassVar[float] = 1.0

    config: WrappedConfig

    def __init__(self, config: WrappedConfig, transformer: Any = None, current: CurrentPass | None = None):
        super().__init__()
        self.config = config
        self.current = current or CurrentPass()
        if transformer is None:
            transformer = self._new(config.transformer)
            take_output(transformer, self.output_places, self.current)
        self.transformer = transformer
        self._blocks_of_attentions: list[int] = []
        for i, block in enumerate(self.blocks):
            for attention in self.attentions_of(block):
                remember(attention, Place(self.current, i, len(self._blocks_of_attentions), self.image_first))
                self._blocks_of_attentions.append(i)

    @classmethod
    def wrap(cls, transformer: Any, sample_shape: Sequence[int], *, time_scale: float, pixels: int = 8) -> Denoiser:
        """A network around a loaded transformer, whose weights are not copied.

        Args:
            transformer: the diffusers model; changed in place.
            sample_shape, time_scale, pixels: as in `WrappedConfig`.
        """
        config = cls.config_class(cls.own_settings(transformer.config), tuple(sample_shape), time_scale, pixels)
        cls.check_settings(config)
        current = CurrentPass()
        head = take_output(transformer, cls.output_places, current)
        return Denoiser(cls(config, transformer, current), head)

    @classmethod
    def own_settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the diffusers class, with defaults for those that a configuration lacks.

        Published folders may have settings of an older class, which diffusers drops as well.

        Args:
            config: as in the transformer's `config.json`.
        """
        import diffusers

        parameters = list(inspect.signature(getattr(diffusers, cls.transformer_name).__init__).parameters.values())[1:]
        found = {one.name: config.get(one.name, one.default) for one in parameters}
        return {name: value for name, value in found.items() if value is not inspect.Parameter.empty}

    @classmethod
    def check_settings(cls, config: WrappedConfig) -> None:
        """Raise an InputError for settings of the transformer that pyard would not reproduce."""

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]  # no module of its own, which would name the weights twice
        """The transformer's blocks in order of execution."""
        return nn.ModuleList(block for name in self.block_lists for block in getattr(self.transformer, name))

    def attentions_of(self, block: nn.Module) -> list[nn.Module]:
        """The self-attentions of a block, in order of execution."""
        found = (getattr(block, name, None) for name in self.attention_names)
        return [attention for attention in found if isinstance(attention, nn.Module)]

    def forward(
        self,
        x: torch.Tensor,  # [B, S, C, h, w]
        times: torch.Tensor,  # [B or 1, S]
        condition: Condition,  # B rows: tokens [B, n, D], mask bool [B, n], more by family
        heads: Sequence[nn.Module],
        history: History | None = None,
    ) -> torch.Tensor:  # [B, S, C_out, h, w]
        batch, steps = x.shape[:2]
        self.check_sample(tuple(x.shape[2:]))
        dtype = self.dtype
        rows = x.flatten(0, 1).to(dtype)
        with self.current.running(history, heads, batch, self.count_tokens(tuple(x.shape[2:]))):
            output = self.run(rows, times.expand(batch, steps).flatten(), _cast(condition.repeat(steps), dtype))
            if history is not None:
                self._require_attended(history.layers)
        return output.unflatten(0, (batch, steps))

    def _require_attended(self, layers: int) -> None:
        found, expected = len(self.current.attended), sum(block < layers for block in self._blocks_of_attentions)
        if found != expected:
            raise InputError(
                f"history: {found} of the {expected} attentions with a history have run. A cache that skips blocks cannot be "
                "used with a history; call disable_cache() on the transformer"
            )

    @abc.abstractmethod
    def run(
        self,
        x: torch.Tensor,  # [R, C, h, w]
        times: torch.Tensor,  # [R], pyard's
        condition: Condition,  # R rows
    ) -> torch.Tensor:  # [R, C_out, h, w], pyard's prediction
        """Call the transformer in the same way as its pipeline."""

    @abc.abstractmethod
    def time_vector(self, times: torch.Tensor, condition: Condition) -> torch.Tensor:  # [B], B rows -> [B, E]
        """The network's embedding of the time and of other conditions that enter with it."""

    @property
    def patch(self) -> int:
        """Side length of a token's patch, in elements of the sample."""
        return int(self.config.transformer.get("patch_size") or 1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the blocks compute: that of their first matrix."""
        return next(module.weight.dtype for module in self.blocks.modules() if isinstance(module, nn.Linear))

    def count_tokens(self, sample_shape: tuple[int, ...]) -> int:
        """T, the number of tokens of a sample of this shape."""
        return (sample_shape[1] // self.patch) * (sample_shape[2] // self.patch)

    def check_sample(self, sample_shape: tuple[int, ...]) -> None:
        channels = self.config.sample_shape[0]
        shape = tuple(sample_shape)
        if len(shape) != 3 or shape[0] != channels or any(side < self.patch or side % self.patch for side in shape[1:]):
            raise InputError(
                f"samples of shape {shape}; this {self.transformer_name} takes ({channels}, h, w) with h and w multiples of "
                f"{self.patch}"
            )

    def attention_shapes(self, layers: int, sample_shape: tuple[int, ...]) -> list[AttentionShape]:
        self.check_sample(sample_shape)
        per_block = (self.attentions_of(block) for block in self.blocks[:layers])
        return [self.attention_shape(attention, sample_shape) for group in per_block for attention in group]

    def attention_shape(self, attention: nn.Module, sample_shape: tuple[int, ...]) -> AttentionShape:
        """The shape of one step's keys in one self-attention."""
        width, heads = int(attention.to_k.out_features), int(attention.heads)  # type: ignore[arg-type, union-attr]
        head_dim = int(attention.to_q.out_features) // heads  # type: ignore[arg-type, union-attr]
        return AttentionShape(width // head_dim, self.count_tokens(sample_shape), head_dim)

    def conditioning(self, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        condition = _cast(condition, self.dtype)
        mask = condition["mask"][..., None].to(self.dtype)
        text = (condition["tokens"] * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.cat([self.time_vector(times, condition), text], dim=1)

    def new_head(self) -> OutputLayers:
        shallow = {**self.config.transformer, **dict.fromkeys(self.config.depth_settings, 0)}
        return take_output(self._new(shallow), self.output_places, CurrentPass())

    def for_student(self, head: nn.Module) -> tuple[Self, nn.Module]:
        return copy.deepcopy(self), copy.deepcopy(head)

    def stock(self, head: nn.Module) -> Any:
        """A copy of the original diffusers transformer, with the weights of backbone and head and without a history."""
        with self.without_weights():
            whole = self._new(self.config.transformer)
        put = copy.deepcopy(self.transformer)
        put_output(put, self.output_places, copy.deepcopy(head))
        whole.load_state_dict(put.state_dict(), assign=True)
        return whole.eval()

    def stock_state(self, head: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of backbone and head under the names of the diffusers transformer; nothing is copied."""
        state = dict(self.transformer.state_dict())
        for name, tensor in head.state_dict().items():
            layer, dot, rest = name.partition(".")
            state[self.output_places[layer] + dot + rest] = tensor
        return state

    def on_base(self, state: dict[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A student's tensors, in the shapes of the transformer that it was made from.

        Args:
            state: tensors of the student, as from `stock_state`.
            base: tensors of the transformer.
        """
        return state

    def lora_targets(self) -> list[str]:
        """The matrices of attentions and MLPs. Modulation layers are left out: they belong to norms and see no tokens."""
        blocks = {id(block) for block in self.blocks}
        names = [name for name, module in self.transformer.named_modules() if id(module) in blocks]
        unread = self._unread()
        return [
            f"transformer.{block}.{name}"
            for block in names
            for name, module in self.transformer.get_submodule(block).named_modules()
            if isinstance(module, nn.Linear) and not any("norm" in part or "mod" in part.lower() for part in name.split("."))
            if not f"transformer.{block}.{name}.".startswith(unread)
        ]

    def unread_parameters(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if name.startswith(self._unread())]

    def _unread(self) -> tuple[str, ...]:
        last = self.blocks[-1]
        block = next(name for name, module in self.named_modules() if module is last)
        return tuple(f"{block}.{layer}." for layer in self.unread_layers)

    def recomputation(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        return self.current.again()

    def prepare_for_export(self, sample_shape: tuple[int, ...]) -> None:
        """Replace, in place, what a graph cannot express: complex numbers, lists of samples, lengths as Python integers.

        Results for samples of this shape stay the same up to rounding. Afterwards, the network only runs within
        `ExportableCalls`.
        """

    @classmethod
    def without_weights(cls) -> contextlib.AbstractContextManager[Any]:
        from accelerate import init_empty_weights

        # Buffers, and tables that are not parameters, are constants that no checkpoint contains.
        context: contextlib.AbstractContextManager[Any] = init_empty_weights(include_buffers=False)
        return context

    @classmethod
    def _new(cls, settings: Mapping[str, Any]) -> Any:
        import diffusers

        kind = getattr(diffusers, cls.transformer_name)
        check_config(settings, Path(cls.transformer_name), {})
        try:
            return kind.from_config(dict(settings))
        except Exception as error:  # whatever sizes do to a class that is not ours
            found = " ".join(str(error).split())[:300]
            raise InputError(f"{cls.transformer_name}: diffusers cannot build it: {found or type(error).__name__}") from None


def _cast(condition: Condition, dtype: torch.dtype) -> Condition:
    return condition.with_tensors({name: t.to(dtype) if t.is_floating_point() else t for name, t in condition.items()})
