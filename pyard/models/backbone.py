"""The interface of a backbone: a student's transformer without its output layers (the head).

Students, training, cost estimates and export only use this interface. Each `pyard/models/<family>/` has an implementation;
docs/own-teacher.md shows how to add yours.

    B batch · S steps · C channels · T tokens per step · D hidden · H heads · N history layers
"""

from __future__ import annotations

import abc
import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn

from pyard.conditions import Condition, as_condition
from pyard.errors import InputError
from pyard.models.history import History


class BackboneConfig(Protocol):
    """The sizes of a backbone, which are JSON-able and sufficient to build one with new weights."""

    @property
    def depth(self) -> int:
        """L, the number of blocks."""
        ...

    @property
    def num_heads(self) -> int:
        """H, the number of query heads of the attentions that may have a history."""
        ...

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """[C, ...] of one sample; if the backbone takes several sizes, the usual one."""
        ...

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of the keyword arguments that create an equal configuration."""
        ...


class AttentionShape(NamedTuple):
    """The shape of the keys that one self-attention adds to the cache in a step, for one sample: [heads, tokens, head_dim]."""

    heads: int
    tokens: int
    head_dim: int


class StepHeads(nn.ModuleList):
    """The output layers of a student: one for each step, or one shared by all.

    Args:
        head: the head of which all are copies at the start.
        count: S, or 1 for a shared head.
    """

    def __init__(self, head: nn.Module, count: int):
        super().__init__(copy.deepcopy(head) for _ in range(count))

    def steps(self, first: int, count: int) -> list[nn.Module]:
        """The heads of the steps first ... first + count - 1; a single one if all steps share a head."""
        heads = list(self)
        return heads if len(heads) == 1 else heads[first : first + count]


def apply_heads(heads: Sequence[Callable[..., torch.Tensor]], *rows: torch.Tensor) -> torch.Tensor:
    """Run every row through the head of its step.

    Args:
        heads: one for each step, or one for all.
        rows: the heads' inputs, each [B * steps, ...], in which the steps of a sample are consecutive.

    Returns:
        [B * steps, ...]
    """
    if len(heads) == 1:
        output: torch.Tensor = heads[0](*rows)
        return output
    # Contiguous slices: BLAS rounds strided ones by their address, and a resumed run must repeat every bit.
    by_step = [tensor.unflatten(0, (-1, len(heads))).transpose(0, 1).contiguous() for tensor in rows]
    return torch.stack([head(*(tensor[s] for tensor in by_step)) for s, head in enumerate(heads)], dim=1).flatten(0, 1)


class Backbone(nn.Module, abc.ABC):
    """A transformer without its head, which runs any number of steps at once.

    Everything except the attentions of the lowest N blocks treats the S steps of a sample as separate samples: a backbone folds
    S into the batch, and those attentions call `history` instead of scaled_dot_product_attention.

    Class attributes:
        config_class: its configuration, a frozen dataclass (`BackboneConfig`).
        row_arguments: names of the arguments of a block's `forward` that have a row for each step, needed for training on some
            of the steps (`steps_per_update`); None: such training is refused.
        not_compiled: the reason why training with torch.compile is refused; None: it is supported.
        folds_steps: whether `row_arguments` are [B * S, ...], with a sample's steps consecutive, or [B, S, ...].

    Attributes:
        config: the sizes.
        blocks: the transformer's blocks in order of execution. Activation checkpointing, sharding and LoRA work on these
            blocks.
    """

    config_class: ClassVar[type[Any]]
    row_arguments: ClassVar[tuple[str, ...] | None] = None
    not_compiled: ClassVar[str | None] = None
    folds_steps: ClassVar[bool] = True
    config: BackboneConfig
    blocks: nn.ModuleList

    @abc.abstractmethod
    def forward(
        self,
        x: torch.Tensor,  # [B, S, C, ...]
        times: torch.Tensor,  # [B or 1, S], in the teacher's time
        condition: Condition,  # B rows
        heads: Sequence[nn.Module],  # S of them, or one
        history: History | None = None,  # None: no attention remembers
    ) -> torch.Tensor:  # [B, S, C_out, ...]
        """The network's output for every step."""

    @abc.abstractmethod
    def new_head(self) -> nn.Module:
        """A new head: the layers from the last block to the output, of which a student may have one for each step."""

    @abc.abstractmethod
    def attention_shapes(self, layers: int, sample_shape: tuple[int, ...]) -> list[AttentionShape]:
        """Shapes of the keys that each self-attention of the lowest `layers` blocks caches per step, in order of execution."""

    @abc.abstractmethod
    def conditioning(self, times: torch.Tensor, condition: Condition) -> torch.Tensor:  # [B], B rows -> [B, E]
        """One vector for each sample that encodes its time and condition; the discriminators are conditioned on it."""

    @abc.abstractmethod
    def unembed(self, tokens: torch.Tensor, sample_shape: tuple[int, ...]) -> torch.Tensor:  # [R, T, ...] -> [R, C_out, ...]
        """Rearrange what a head's `last_linear` returned into samples; this has no weights."""

    @classmethod
    def family(cls) -> str:
        """The name of this backbone in folders: that of a registered family, otherwise `package.module:Class`."""
        from pyard.models.families import family_name

        return family_name(cls)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, if the backbone is conditioned on a class; None: it has another condition."""
        return None

    @property
    def has_null_class(self) -> bool:
        """Whether the backbone also has a "no class"."""
        return True

    def check_sample(self, sample_shape: tuple[int, ...]) -> None:
        """Raise an InputError if samples of this shape are not supported; backbones of several sizes override this."""
        if tuple(sample_shape) != tuple(self.config.sample_shape):
            raise InputError(f"samples of shape {tuple(sample_shape)}; this network takes {tuple(self.config.sample_shape)}")

    def for_student(self, head: nn.Module) -> tuple[Backbone, nn.Module]:
        """Copies of the backbone and a head for a student, with as many output as input channels."""
        return copy.deepcopy(self), copy.deepcopy(head)

    def last_linear(self, head: nn.Module) -> nn.Linear:
        """The last linear layer of a head, at which the adversarial stage balances its gradients."""
        # Not the matrices of a low-rank addition, which stand behind the layer that they are added to.
        linears = [m for name, m in head.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
        if not linears:
            raise InputError(f"adversarial: the head of {type(self).__name__} has no linear layer; override last_linear")
        return linears[-1]

    def prepare(self, times: torch.Tensor, condition: Condition) -> Sequence[Condition]:
        """The conditions of the S steps of a rollout, including everything that can be computed once from time and condition.

        Args:
            times: times of all steps, [1, S].
            condition: condition of the rollout, B rows.

        Returns:
            S conditions, each for one step of `forward`, possibly with further tensors; the base class adds none.
        """
        return [condition] * times.shape[1]

    def features(
        self,
        x: torch.Tensor,  # [B, C, ...]
        times: torch.Tensor,  # [B]
        condition: Condition,
        head: nn.Module,
        blocks: Sequence[int],
    ) -> list[torch.Tensor]:  # K times [B, T, D]
        """The outputs of some blocks, for discriminators; the base class runs the whole network and records them."""
        seen: dict[int, torch.Tensor] = {}

        def keep(index: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
                seen[index] = self.image_tokens(output)

            return hook

        handles = [self.blocks[i].register_forward_hook(keep(i)) for i in blocks]
        try:
            self(x[:, None], times[:, None], condition, [head])
        finally:
            for handle in handles:
                handle.remove()
        return [seen[i].flatten(0, seen[i].ndim - 3) for i in blocks]

    def image_tokens(self, output: Any) -> torch.Tensor:  # [R, T, D], or with further dimensions in front
        """The image tokens in a block's output: by default the first tensor, if there are several."""
        found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        return found

    def recomputation(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Return a function that makes a context in which a block of the current pass can be recomputed after the pass."""
        return contextlib.nullcontext

    @classmethod
    def without_weights(cls) -> contextlib.AbstractContextManager[Any]:
        """The context to build a backbone in whose weights are read afterwards; without computed constants, it may be meta."""
        return contextlib.nullcontext()

    def tokens_per_step(self, sample_shape: tuple[int, ...] | None = None) -> int:
        """T, the number of tokens per step."""
        return self.attention_shapes(1, sample_shape or self.config.sample_shape)[0].tokens

    @property
    def hidden_size(self) -> int:
        """D, the width of what `features` returns; by default, the number of heads times their width."""
        return self.config.num_heads * self.attention_shapes(1, self.config.sample_shape)[0].head_dim

    def conditioning_size(self, condition: Condition) -> int:
        """E, the width of `conditioning`."""
        one = condition.index(slice(0, 1)).to(next(self.parameters()).device)
        with torch.no_grad():
            return self.conditioning(torch.zeros(1, device=one.device), one).shape[-1]

    def unread_parameters(self) -> list[str]:
        """Names of parameters on which no output depends, so that they get no gradient."""
        return []

    def lora_targets(self) -> list[str]:
        """Names of the linear layers that get low-rank additions: by default all in the blocks."""
        return [f"blocks.{name}" for name, module in self.blocks.named_modules() if isinstance(module, nn.Linear)]


class Denoiser(nn.Module):
    """A teacher's network, a backbone with one head: maps x_t, t and a condition to a prediction."""

    def __init__(self, trunk: Backbone, head: nn.Module | None = None):
        super().__init__()
        self.trunk = trunk
        self.head = trunk.new_head() if head is None else head

    @property
    def config(self) -> BackboneConfig:
        """Sizes."""
        return self.trunk.config

    def forward(
        self,
        x: torch.Tensor,  # [B, C, ...]
        times: torch.Tensor,  # [B], may be fractional
        condition: Condition | torch.Tensor,  # B rows, or class labels int64 [B]
    ) -> torch.Tensor:  # [B, C_out, ...]
        output: torch.Tensor = self.trunk(x[:, None], times[:, None], as_condition(condition), [self.head])
        return output[:, 0]
