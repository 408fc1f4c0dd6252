"""Operations and memory of a recipe's updates, counted while its student runs without data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from pyard.conditions import Condition
from pyard.cost.activations import Kept
from pyard.cost.flops import student_flops, subset_flops, update_flops
from pyard.cost.memory import AdversarialMemory, Memory, adversarial_memory, student_activations, update_memory
from pyard.models.backbone import Denoiser
from pyard.models.student import Student
from pyard.teachers.published import TeacherOutline
from pyard.training.adversarial_cost import adversarial_flops, looked_at
from pyard.training.config import TrainConfig


def stage_flops(config: TrainConfig, network: Denoiser, student: Student, condition: Condition | None = None) -> float:
    """Of all updates, with the rollouts that make own histories and checkpointing's second forward pass.

    Args:
        config: the recipe.
        network: the teacher's.
        student: without weights; its parameters say whether they are trained.
        condition: of one sample; None: the first row of the student's table.
    """
    condition = student.require_conditions().take([0]) if condition is None else condition
    update = update_flops(student, config.batch_size, condition, config.steps_per_update)
    rolled_out = 0.0
    if config.rollout_gradient == "detach":
        rolled_out = config.rollout_probability * max(0.0, 1 - config.rollout_start / config.max_steps)
    if rolled_out:
        update += rolled_out * config.batch_size * student_flops(student, condition)
    if config.activation_checkpointing:
        update += config.batch_size * subset_flops(student, condition, config.steps_per_update)
    if config.stage == "adversarial":
        update += config.batch_size * adversarial_flops(network, condition, config.adversarial)
    return config.max_steps * update


@dataclass(frozen=True)
class MemoryOfUpdates:
    """Memory of a recipe's updates, counted once for all micro-batches and layouts.

    Args:
        config: the recipe.
        student: without weights.
        kept: what its forward pass keeps of a sample.
        adversarial: what that stage adds; None: regression.
    """

    config: TrainConfig
    student: Student
    kept: Kept
    adversarial: AdversarialMemory | None

    @classmethod
    def count(
        cls,
        config: TrainConfig,
        teacher: TeacherOutline,
        student: Student,
        condition: Condition,
        device_type: str = "cuda",
    ) -> MemoryOfUpdates:
        """Run student and teacher without data, with the operators that a device has."""
        mixed, added = config.mixed_precision != "no", None
        if config.stage == "adversarial":
            settings, network = config.adversarial, teacher.network
            added = adversarial_memory(
                network,
                condition,
                looked_at(network, settings),
                width=settings.width,
                depth=settings.depth,
                kernel_size=settings.kernel_size,
                mixed=mixed,
                device_type=device_type,
            )
            if teacher.pipeline is not None and config.lora_rank is not None:
                added = dataclasses.replace(added, frozen=0.0)  # its weights are the student's base
        kept = student_activations(student, condition, mixed=mixed, device_type=device_type, steps=config.steps_per_update)
        return cls(config, student, kept, added)

    def of(self, batch: int, gpus: int, sharded: bool, checkpointing: bool) -> Memory:
        """With a micro-batch of `batch` samples on each GPU."""
        return self.each((batch,), gpus, sharded, checkpointing)[batch]

    def each(self, batches: Sequence[int], gpus: int, sharded: bool, checkpointing: bool) -> dict[int, Memory]:
        """By micro-batch on each GPU."""
        one = update_memory(
            self.student,
            self.kept,
            1,
            world=gpus,
            averages=len(self.config.ema_decays),
            mixed=self.config.mixed_precision != "no",
            checkpointing=checkpointing,
            sharded=sharded,
            adversarial=self.adversarial,
        )
        return {batch: dataclasses.replace(one, activations=batch * one.activations) for batch in batches}
