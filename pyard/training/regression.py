"""The regression stage: the student learns the S outputs of stored trajectories in one parallel pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pyard.conditions import Condition
from pyard.cost.flops import update_flops
from pyard.models.backbone import Backbone
from pyard.models.history import ConcatenatingCache
from pyard.models.step_subset import StepSubset
from pyard.models.student import Student
from pyard.storage.checkpoints import Stateful, ema_of
from pyard.training.config import TrainConfig
from pyard.training.losses import RegressionLoss
from pyard.training.processes import Processes, seed_of
from pyard.trajectories import TrajectoryBatch

_SUBSET = -1  # of the steps of an update, as a part of its seed: no process has this rank


@dataclass(frozen=True)
class Measured:
    """What an update found out, before it changed anything.

    Args:
        loss: that was minimised, over all processes.
        per_step: [S], the loss of each step, not weighted, over all processes; NaN of a step that had no part in the update.
        grad_norm: before clipping.
        more: other numbers for the log.
    """

    loss: torch.Tensor
    per_step: torch.Tensor
    grad_norm: torch.Tensor
    more: dict[str, torch.Tensor]

    def finite(self) -> bool:
        """Whether loss and gradient are numbers: the only place that waits for the device."""
        numbers = torch.stack([self.loss.float(), self.grad_norm.float(), *(v.float() for v in self.more.values())])
        return bool(torch.isfinite(numbers).all())


class Stage(Protocol):
    """What the training loop repeats.

    Attributes:
        parts: what a checkpoint must hold.
        flops: of an update, all processes together; what activation checkpointing computes again does not count.
    """

    parts: dict[str, Stateful]
    flops: float

    @property
    def learning_rate(self) -> float:
        """Of the update that comes next."""
        ...

    def compute(self, step: int, batch: TrajectoryBatch) -> Measured:
        """Loss and gradients of an update; changes no weight."""
        ...

    def apply(self) -> None:
        """Change the weights by the gradients."""
        ...

    def skip(self) -> None:
        """Drop the gradients."""
        ...


class Passes(nn.Module):
    """The student's passes in training, as one module, so that DDP sees every one of them.

    Args:
        student: who learns.
        subset: its pass with some of the steps alone; None: there are no such passes.
    """

    def __init__(self, student: Student, subset: StepSubset | None = None):
        super().__init__()
        self.student, self.subset = student, subset

    def forward(
        self,
        history: torch.Tensor,  # [B, S, C, ...]
        condition: Condition,  # B rows
        through_cache: bool = False,
        kept: torch.Tensor | None = None,  # int64 [k]: the steps to predict; None: all
    ) -> torch.Tensor:  # [B, S or k, C, ...]
        """The parallel pass on `history`, or a rollout from its first entry with gradients through its own history."""
        if kept is not None and self.subset is not None:
            return self.subset(history, condition, kept)
        if through_cache:
            return torch.stack(list(self.student.rollout(history[:, 0], condition, ConcatenatingCache())), dim=1)
        return self.student(history, condition)


@torch.no_grad()
def own_history(student: Student, noise: torch.Tensor, condition: Condition | torch.Tensor) -> torch.Tensor:  # [B, S, C, ...]
    """The inputs that the student would see if it sampled: the noise, then its own predictions."""
    predictions = list(student.rollout(noise, condition, ConcatenatingCache()))
    return torch.stack([noise, *(p.to(noise.dtype) for p in predictions[:-1])], dim=1)


class Regression:
    """Teacher-forced regression, with a share of updates on the student's own history (implements `Stage`).

    Args:
        config: settings.
        student: on its device; every one of its parameters that wants a gradient is trained.
        processes: who trains.
    """

    def __init__(self, config: TrainConfig, student: Student, processes: Processes):
        self.config, self.student, self.processes = config, student.train(), processes
        self.steps = config.steps_per_update if config.steps_per_update != student.num_steps else None
        self.flops = update_flops(student, config.batch_size, steps=self.steps)
        self.losses = {shape: RegressionLoss.of(config, student.config, shape) for shape in student.sample_shapes}
        self.emas = [ema_of(student, decay) for decay in config.ema_decays]
        if config.activation_checkpointing:
            checkpoint_activations(student)
        subset = None if self.steps is None else StepSubset(student)
        if config.compile:
            student.compile()
        if processes.sharded:
            from pyard.training.sharded import shard

            for module in (student, *self.averages):
                shard(module, processes)
        unread = [f"student.trunk.{name}" for name in student.trunk.unread_parameters()]
        self.model = processes.data_parallel(Passes(student, subset), unread)
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scheduler = get_scheduler(
            config.lr_schedule, self.optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
        )
        self.parts: dict[str, Stateful] = {"model": student, "optimizer": self.optimizer, "scheduler": self.scheduler}
        self.parts |= {"ema" if i == 0 else f"ema-{ema_name(d)}": self.emas[i] for i, d in enumerate(config.ema_decays)}
        if processes.scaler.is_enabled():
            self.parts["scaler"] = processes.scaler

    @property
    def averages(self) -> list[Student]:
        """The averaged students, the result first."""
        modules = [ema.module for ema in self.emas]
        return [module for module in modules if isinstance(module, Student)]

    def compute(self, step: int, batch: TrajectoryBatch) -> Measured:
        """Loss and gradients of an update on this process's share of a batch."""
        rollout = self._rolls_out(step)
        through_cache = rollout and self.config.rollout_gradient == "backprop"
        kept = None if self.steps is None else self._drawn_steps(step, self.steps)
        loss = self.losses[tuple(batch.history.shape[2:])]
        totals, per_steps = [], []
        for micro, last in micro_batches(batch.to(self.processes.device), self.config.gradient_accumulation):
            history = micro.history
            if rollout and not through_cache:
                # Autocast of its own: it remembers cast weights, and those of a pass without gradients have none.
                with self.processes.autocast():
                    history = own_history(self.student, history[:, 0], micro.condition)
            with self._synchronised(last), self.processes.autocast():
                prediction = self.model(history, micro.condition, through_cache, kept)
                target = micro.target if kept is None else micro.target.index_select(1, kept)
                per_step = loss.per_step(prediction, target)  # [S or k]
                total = loss.total(per_step, kept)
                self.processes.scaler.scale(total / self.config.gradient_accumulation).backward()
            totals.append(total.detach())
            per_steps.append(per_step.detach())
        reduced = self.processes.mean(torch.stack([torch.stack(totals).mean(), *torch.stack(per_steps).mean(dim=0)]))
        measured = reduced[1:]
        if kept is not None:
            measured = measured.new_full((self.student.num_steps,), torch.nan).index_copy(0, kept, measured)
        return Measured(reduced[0], measured, self._clip(), {})

    def apply(self) -> None:
        """Update weights and averages."""
        self.processes.scaler.step(self.optimizer)
        self._advance()
        for ema in self.emas:
            ema.update_parameters(self.student)

    @property
    def learning_rate(self) -> float:
        """Of the update that comes next."""
        return float(self.scheduler.get_last_lr()[0])

    def skip(self) -> None:
        """Drop the gradients; the schedules go on, for they count updates."""
        # No `scaler.step`: it would apply the student's gradients if they are finite and a discriminator's are not. What was
        # infinite the scaler saw when they were unscaled, and lowers its scale for.
        self._advance()

    def _advance(self) -> None:
        self.processes.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def _clip(self) -> torch.Tensor:
        self.processes.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _rolls_out(self, step: int) -> bool:
        if self.config.rollout_probability == 0 or step <= self.config.rollout_start:
            return False
        random = torch.Generator().manual_seed(seed_of(self.config.seed, step))
        return bool(torch.rand((), generator=random) < self.config.rollout_probability)

    def _drawn_steps(self, step: int, count: int) -> torch.Tensor:  # int64 [count]
        random = torch.Generator().manual_seed(seed_of(self.config.seed, step, _SUBSET))
        drawn = torch.randperm(self.student.num_steps, generator=random)[:count]
        return drawn.sort().values.to(self.processes.device)

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        # Gradients are averaged over the processes once an update, in the backward pass of its last micro-batch.
        if isinstance(self.student, FSDPModule):
            self.student.set_requires_gradient_sync(last)
        return nullcontext() if last or not isinstance(self.model, DistributedDataParallel) else self.model.no_sync()


def micro_batches(batch: TrajectoryBatch, count: int) -> Iterator[tuple[TrajectoryBatch, bool]]:
    """A process's share of a batch in `count` equal pieces, and whether each is the last."""
    pieces = zip(batch.history.chunk(count), batch.target.chunk(count), batch.condition.split(count), strict=True)
    for i, piece in enumerate(pieces, start=1):
        yield TrajectoryBatch(*piece), i == count


def checkpoint_activations(student: Student) -> None:
    """Keep only the inputs of the transformer's blocks, and compute the rest again in the backward pass."""
    for block in student.trunk.blocks:
        block.forward = _recomputed(block.forward, student.trunk)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., torch.Tensor], trunk: Backbone) -> Callable[..., torch.Tensor]:
    def recomputed(*args: object, **kwargs: object) -> torch.Tensor:
        again = trunk.recomputation()
        run = functools.partial(forward, **kwargs)
        contexts: Any = {} if again is nullcontext else {"context_fn": lambda: (nullcontext(), again())}
        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False, **contexts)

    return recomputed


def ema_name(decay: float) -> str:
    """0.9999 -> '0.9999': the name of a further average in files."""
    return f"{decay:g}"
