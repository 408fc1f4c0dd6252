"""Floating-point operations of any backbone, counted by torch while it runs without data, on the meta device.

A multiplication with its addition counts as two. Matrix products, convolutions and attention are counted; norms, activations
and sinusoids are not: together they are less than a percent.

    S steps · T tokens · D hidden · E width of the conditioning · W width of a discriminator's layers
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyard.conditions import Condition
from pyard.models.backbone import Denoiser
from pyard.models.step_subset import StepSubset
from pyard.models.student import Student

_Module = TypeVar("_Module", bound=nn.Module)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


def without_weights(module: _Module, empty: Callable[[torch.Tensor], torch.Tensor] = _on_meta) -> _Module:
    """A copy of a module with other tensors: by default on the meta device, shapes without numbers.

    Args:
        module: of any size; its tensors are not copied.
        empty: makes the copy's tensor of each parameter, buffer and tensor that is an attribute.
    """
    constants = [value for part in module.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers(), *constants):
        new = empty(tensor)
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return copy.deepcopy(module, memo)


def counted(run: Callable[[], object]) -> int:
    """FLOPs of what a function does to tensors on the meta device."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def flops_per_pass(student: Student, condition: Condition | None = None) -> tuple[int, ...]:
    """FLOPs of each of the S cached passes for one sample.

    Args:
        student: on any device.
        condition: of one sample; None: the first row of the student's table.
    """
    weightless = without_weights(student)
    condition = _one(student.require_conditions().take([0]) if condition is None else condition)
    latest = torch.empty((1, *student.sample_shape), device="meta")
    cache, counts = weightless.new_cache(1), []
    # Without a history all passes cost the same.
    for step in range(student.num_steps if student.config.history_layers else 1):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            latest, cache = weightless.step(latest, step, condition, cache)  # type: ignore[assignment]
        counts.append(int(counter.get_total_flops()))
    return tuple(counts) if len(counts) == student.num_steps else tuple(counts) * student.num_steps


def student_flops(student: Student, condition: Condition | None = None) -> float:
    """One forward pass of one sample through all S steps, its history included; for `condition`, see `flops_per_pass`."""
    return float(sum(flops_per_pass(student, condition)))


def subset_flops(student: Student, condition: Condition | None = None, steps: int | None = None) -> float:
    """`student_flops` of a pass whose blocks above the history run on so many of the S steps; None: on all."""
    whole = student_flops(student, condition)
    if steps is None or steps == student.num_steps:
        return whole
    weightless = without_weights(student)
    condition = _one(student.require_conditions().take([0]) if condition is None else condition)
    upper, begun = 0, 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():

        def begin(block: nn.Module, inputs: Any) -> None:
            nonlocal begun
            begun = int(counter.get_total_flops())

        def end(block: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal upper
            upper += int(counter.get_total_flops()) - begun

        for block in list(weightless.trunk.blocks)[weightless.config.history_layers :]:
            block.register_forward_pre_hook(begin)
            block.register_forward_hook(end)
        # Above the history every step costs the same.
        weightless.step(torch.empty((1, *student.sample_shape), device="meta"), 0, condition, weightless.new_cache(1))
    return whole - (student.num_steps - steps) * float(upper)


def update_flops(student: Student, batch_size: int, condition: Condition | None = None, steps: int | None = None) -> float:
    """An update, forward and backward. What activation checkpointing computes again does not count (MFU).

    Args:
        student: on any device. Where all of it is trained, the backward pass takes twice the forward; frozen weights get no
            gradient, so that with LoRA it takes little more than once, which is counted.
        batch_size: B.
        condition: of one sample; None: the first row of the student's table.
        steps: of the S, that run through the blocks above the history (`steps_per_update`); None: all.
    """
    if all(parameter.requires_grad for parameter in student.parameters()):
        return 3.0 * batch_size * subset_flops(student, condition, steps)
    weightless = without_weights(student)
    one = _one(student.require_conditions().take([0]) if condition is None else condition)
    history = torch.empty((1, student.num_steps, *student.sample_shape), device="meta")
    some = student.num_steps if steps is None else steps
    subset = StepSubset(weightless) if some < student.num_steps else None
    kept = torch.empty(some, dtype=torch.int64, device="meta")

    def both_ways() -> None:
        prediction = weightless(history, one) if subset is None else subset(history, one, kept)
        prediction.float().sum().backward()

    return float(batch_size * counted(both_ways))


def teacher_flops(network: Denoiser, condition: Condition, sample_shape: tuple[int, ...] | None = None) -> float:
    """One evaluation of a teacher for one sample, its predicted variance included; guidance takes two.

    Args:
        network: on any device.
        condition: of one sample.
        sample_shape: [C, ...]; None: the usual one.
    """
    weightless, one = without_weights(network), _one(condition)
    x = torch.empty((1, *(sample_shape or network.config.sample_shape)), device="meta")
    times = torch.empty(1, device="meta")
    with torch.no_grad():
        return float(counted(lambda: weightless(x, times, one)))


def feature_flops(network: Denoiser, condition: Condition, blocks: tuple[int, ...]) -> float:
    """What discriminators cost in the frozen teacher, for one sample of a batch and its real counterpart.

    Both pass forward to the highest block looked at, and the student's prediction gets its gradient back.
    """
    weightless, one = without_weights(network).requires_grad_(False), _one(condition)
    x = torch.empty((1, *network.config.sample_shape), device="meta")
    times = torch.empty(1, device="meta")

    def features(x: torch.Tensor) -> torch.Tensor:
        weightless.trunk.conditioning(times, one)
        seen = weightless.trunk.features(x, times, one, weightless.head, blocks)
        return torch.stack([tokens.sum() for tokens in seen]).sum()

    def forward() -> None:
        with torch.no_grad():
            features(x)

    def both_ways() -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(features(leaf), leaf)

    return float(counted(forward) + counted(both_ways))


def discriminator_flops(
    tokens: int, hidden: int, condition: int, *, width: int, depth: int, kernel_size: int, r1: bool, feature_matching: bool
) -> float:
    """One discriminator head in an update, for one sample of a batch and its real counterpart.

    It passes forward and back to its input on the way to the student's gradient; on the way to its own, both samples forward
    and back to its weights, and, behind its first layer, to its inputs. R1 adds the slopes of the real sample's logits and,
    twice that, their own slopes; feature matching one more pass of it.
    """
    first, rest = head_flops(tokens, hidden, condition, width=width, depth=depth, kernel_size=kernel_size)
    passes = 2 * (first + rest) + 2 * (2 * first + 3 * rest)
    if feature_matching:
        passes += first + rest
    if r1:
        passes += 3 * (first + rest)
    return passes


def head_flops(tokens: int, hidden: int, condition: int, *, width: int, depth: int, kernel_size: int) -> tuple[float, float]:
    """One discriminator head forward on one sample, by formula: its first layer, and the rest.

    Args:
        tokens, hidden, condition: T, D, E.
        width, depth, kernel_size: W, residual layers and their kernel.
    """
    rest = 2.0 * tokens * width * width * (depth * kernel_size + 1) + 2.0 * condition * width
    return 2.0 * tokens * hidden * width, rest


def _one(condition: Condition) -> Condition:
    return Condition({name: torch.empty_like(tensor[:1], device="meta") for name, tensor in condition.items()})
