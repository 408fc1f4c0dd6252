"""Memory of an update on one GPU, for any backbone: activations as they are counted, the rest as parameters times bytes.

P parameters of the student · B micro-batch · T tokens · D hidden · E width of the conditioning · W width of a
discriminator's layers
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import nn

from pyard.conditions import Condition
from pyard.cost.activations import Kept, count_kept, fake_copy, peak_live
from pyard.cost.flops import without_weights
from pyard.models.backbone import Denoiser
from pyard.models.step_subset import StepSubset
from pyard.models.student import Student


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU; the sum is what an update needs at most, for gradients grow while activations shrink.

    Args:
        weights: of the student, float32, and what mixed precision casts of them.
        averages: all EMAs.
        optimizer: two moments of each parameter.
        gradients: and with DDP as much again, its buckets.
        gathered: with FSDP, what is whole for a while: two blocks and all that is in no block.
        frozen: the teacher that the adversarial stage looks through.
        discriminators: weights, gradients and moments.
        activations: kept between forward and backward pass.
    """

    weights: float
    averages: float
    optimizer: float
    gradients: float
    gathered: float
    frozen: float
    discriminators: float
    activations: float

    @property
    def total(self) -> float:
        """Bytes in all; CUDA's own context (about 0.5 GB) and fragmentation come on top."""
        return float(sum(dataclasses.astuple(self)))


@dataclass(frozen=True)
class AdversarialMemory:
    """What the adversarial stage adds, in bytes.

    Args:
        frozen: the teacher, float32, and what mixed precision casts of it.
        discriminators: weights, gradients and moments.
        per_sample: activations of the teacher and the discriminators, for one sample and its real counterpart.
    """

    frozen: float
    discriminators: float
    per_sample: float


def update_memory(
    student: Student,
    kept: Kept,
    batch: int,
    *,
    world: int = 1,
    averages: int = 1,
    mixed: bool = False,
    checkpointing: bool = False,
    sharded: bool = False,
    adversarial: AdversarialMemory | None = None,
) -> Memory:
    """Memory of an update.

    Frozen weights, those below low-rank additions, are held once for the student and its averages, in their own dtype; under
    FSDP the student and each average have shards of their own of them.

    Args:
        student: on any device; its parameters say whether they are trained.
        kept: by its forward pass, see `student_activations`.
        batch: B, samples of a micro-batch on each GPU.
        world: how many GPUs.
        averages: how many EMAs.
        mixed: bf16 or fp16.
        checkpointing: activation checkpointing.
        sharded: FSDP instead of DDP.
        adversarial: of that stage, see `adversarial_memory`; None: regression.
    """
    trained, frozen = _trained(student)
    share = world if sharded else 1
    states = 4 * trained / share
    cast = 2 * trained + sum(2 * p.numel() for p in frozen if p.dtype == torch.float32) if mixed else 0
    held = sum(p.numel() * p.element_size() for p in frozen) / share
    in_blocks = [sum(_gathered(p, mixed) for p in block.parameters()) for block in student.trunk.blocks]
    whole = sum(_gathered(p, mixed) for p in student.parameters())
    added = adversarial or AdversarialMemory(0.0, 0.0, 0.0)
    return Memory(
        # Of a block in shards, autograd keeps the cast weights until its backward pass, unless that computes it again.
        weights=states + held + (0 if sharded and checkpointing else cast),
        averages=averages * (states + (held if sharded else 0)),
        optimizer=2 * states,
        gradients=states + (4 * trained if world > 1 and not sharded else 0),
        gathered=float(2 * max(in_blocks, default=0) + whole - sum(in_blocks)) if sharded else 0.0,
        frozen=added.frozen,
        discriminators=added.discriminators,
        activations=batch * (kept.peak(checkpointing) + added.per_sample),
    )


def student_activations(
    student: Student,
    condition: Condition,
    *,
    mixed: bool = False,
    device_type: str = "cuda",
    steps: int | None = None,
) -> Kept:
    """What the parallel pass keeps of one sample.

    Args:
        student: on any device; its parameters say whether they are trained.
        condition: of one sample.
        mixed: matrices are multiplied in 16 bits.
        device_type: where the training runs: it decides which operators do, and plain ones keep more than compiled ones.
        steps: of the S, that run through the blocks above the history (`steps_per_update`); None: all.
    """
    copy = fake_copy(student).train()
    some = copy.num_steps if steps is None else steps
    subset = StepSubset(copy) if some < copy.num_steps else None

    def run(batch: int) -> object:
        history, rows = torch.empty(batch, copy.num_steps, *copy.sample_shape), _rows(condition, batch)
        # Any of the steps: above the history each keeps the same.
        return copy(history, rows) if subset is None else subset(history, rows, torch.empty(some, dtype=torch.int64))

    return count_kept(run, copy, copy.trunk.blocks, mixed=mixed, device_type=device_type)


def pass_memory(
    network: Denoiser, condition: Condition, sample_shape: tuple[int, ...], *, dtype: torch.dtype, device_type: str = "cuda"
) -> tuple[float, float]:
    """What a teacher's pass without gradients holds at most beside its weights: (bytes whatever the batch is, bytes a row).

    Args:
        network: on any device.
        condition: of one sample.
        sample_shape: [C, ...].
        dtype: of the weights.
        device_type: see `student_activations`.
    """
    frozen = fake_copy(without_weights(network).to(dtype)).eval().requires_grad_(False)

    def run(batch: int) -> object:
        return frozen(torch.empty(batch, *sample_shape), torch.empty(batch), _rows(condition, batch))

    two, three = (peak_live(functools.partial(run, batch), device_type=device_type) for batch in (2, 3))
    return max(0.0, two - 2 * (three - two)), float(three - two)


def adversarial_memory(
    network: Denoiser,
    condition: Condition,
    blocks: tuple[int, ...],
    *,
    width: int,
    depth: int,
    kernel_size: int,
    mixed: bool = False,
    device_type: str = "cuda",
) -> AdversarialMemory:
    """What a frozen teacher and the discriminators of its blocks need.

    Args:
        network: the teacher's, on any device.
        condition: of one sample.
        blocks: those that are looked at.
        width, depth, kernel_size: of each discriminator, see `pyard.models.discriminator.DiscriminatorHead`.
        mixed, device_type: see `student_activations`.
    """
    trunk, frozen = network.trunk, fake_copy(network).eval().requires_grad_(False)

    def run(batch: int) -> object:
        x = torch.empty(batch, *network.config.sample_shape).requires_grad_()
        return frozen.trunk.features(x, torch.empty(batch), _rows(condition, batch), frozen.head, blocks)

    seen = count_kept(run, frozen, frozen.trunk.blocks, mixed=mixed, device_type=device_type).everything
    hidden, tokens = trunk.hidden_size, trunk.tokens_per_step()
    heads = head_parameters(hidden, trunk.conditioning_size(condition), width=width, depth=depth, kernel_size=kernel_size)
    return AdversarialMemory(
        frozen=(6.0 if mixed else 4.0) * _count(network),
        discriminators=16.0 * len(blocks) * heads,
        per_sample=seen + len(blocks) * head_bytes(tokens, hidden, width=width, depth=depth),
    )


def head_parameters(hidden: int, condition: int, *, width: int, depth: int, kernel_size: int) -> int:
    """Of one discriminator head.

    Args:
        hidden, condition: D, E.
        width, depth, kernel_size: W, residual layers and their kernel.
    """
    layers = hidden * width + depth * width * width * kernel_size + (depth + 1) * 3 * width
    return layers + width * width + width + condition * width + width


def head_bytes(tokens: int, hidden: int, *, width: int, depth: int) -> float:
    """What one discriminator head keeps of a sample: both samples' features in float32, and of each layer its input, output
    and normalised output.

    Args:
        tokens, hidden: T, D.
        width, depth: W, residual layers.
    """
    return 4.0 * tokens * (2 * hidden + width * (5 + 4 * depth))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _trained(module: nn.Module) -> tuple[int, list[nn.Parameter]]:
    """How many numbers are trained, and the parameters that are frozen."""
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return trained, [parameter for parameter in module.parameters() if not parameter.requires_grad]


def _gathered(parameter: nn.Parameter, mixed: bool) -> int:
    """Bytes of a parameter that FSDP has gathered, and of its cast."""
    return parameter.numel() * (parameter.element_size() + (2 if mixed and parameter.dtype == torch.float32 else 0))


def _rows(condition: Condition, batch: int) -> Condition:
    return Condition({name: torch.empty(batch, *t.shape[1:], dtype=t.dtype) for name, t in condition.items()})
