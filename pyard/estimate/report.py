"""What a recipe costs, as numbers and as a table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pyard.cost.memory import Memory
from pyard.models.student_config import StudentConfig
from pyard.storage.units import format_bytes, format_seconds


@dataclass(frozen=True)
class StageCost:
    """Work of a stage.

    Args:
        name: trajectories | regression | adversarial.
        flops: in all, what activation checkpointing computes twice included.
        tflops: that one GPU is taken to sustain, in TFLOP/s; None: no device was given.
    """

    name: str
    flops: float
    tflops: float | None

    @property
    def gpu_hours(self) -> float | None:
        """Hours on one GPU."""
        return None if self.tflops is None else self.flops / (self.tflops * 1e12) / 3600


@dataclass(frozen=True)
class Estimate:
    """What a recipe costs.

    Args:
        recipe: the file.
        teacher: its name.
        teacher_parameters: of its network.
        student: its sizes.
        tokens_per_step: T.
        parameters: of the student.
        trajectories: how many.
        sample_bytes: of one.
        store_bytes: of all shards, headers included; sidecars (about 500 bytes a shard) are not.
        generated: whether the recipe has them generated; False if it names a store.
        guessed: the store that it names is not there, so that the sizes are those of the recipe's own defaults.
        checkpoint_bytes: of one checkpoint, without discriminators.
        stages: in order.
        gpus: that share the work.
        memory: bytes on each GPU by layout and micro-batch.
        capacity: of one GPU in bytes; None: no device was given.
        share: samples of an update on each GPU, a micro-batch of the recipe.
    """

    recipe: str
    teacher: str
    teacher_parameters: int
    student: StudentConfig
    tokens_per_step: int
    parameters: int
    trajectories: int
    sample_bytes: int
    store_bytes: int
    generated: bool
    guessed: bool
    checkpoint_bytes: int
    stages: tuple[StageCost, ...]
    gpus: int
    memory: dict[str, dict[int, Memory]]
    capacity: float | None
    share: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        flat = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        stages = [{**dataclasses.asdict(stage), "gpu_hours": stage.gpu_hours} for stage in self.stages]
        memory = {
            layout: {str(batch): {**dataclasses.asdict(m), "total": m.total} for batch, m in row.items()}
            for layout, row in self.memory.items()
        }
        return {**flat, "student": self.student.to_json(), "stages": stages, "memory": memory}

    def __str__(self) -> str:
        student = self.student
        depth, tokens = student.network.depth, self.tokens_per_step
        made = "to generate" if self.generated else "not there yet: sizes by default" if self.guessed else "there already"
        sizes = f"S = {student.grid.num_steps} steps, N = {student.history_layers} of {depth} layers, "
        sizes += f"T = {tokens} tokens"
        store = f"{self.trajectories} of {format_bytes(self.sample_bytes)}: {format_bytes(self.store_bytes)}, {made}"
        lines = [
            f"recipe         {self.recipe}",
            f"teacher        {self.teacher}: {self.teacher_parameters / 1e6:.4g} M parameters",
            f"student        {self.parameters / 1e6:.4g} M parameters; {sizes}",
            f"trajectories   {store}",
            f"checkpoint     {format_bytes(self.checkpoint_bytes)} each",
            "",
            f"{'stage':<15}{'FLOPs':>10}{'TFLOP/s':>10}{'GPU-hours':>12}{f'on {self.gpus} GPU':>14}",
        ]
        for stage in self.stages:
            hours = stage.gpu_hours
            lines.append(
                f"{stage.name:<15}{stage.flops:>10.3g}"
                + (f"{stage.tflops:>10.4g}{hours:>12.3g}" if hours is not None else f"{'-':>10}{'-':>12}")
                + (f"{format_seconds(hours * 3600 / self.gpus):>14}" if hours is not None else f"{'-':>14}")
            )
        lines += ["", f"memory of each GPU by micro-batch (the recipe: {self.share})"]
        layouts = list(self.memory)
        width = max(20, *map(len, layouts)) + 2
        lines.append(f"{'':<15}" + "".join(f"{layout:>{width}}" for layout in layouts))
        for batch in self.memory[layouts[0]]:
            cells = [self._cell(self.memory[layout][batch].total) for layout in layouts]
            lines.append(f"{batch:<15}" + "".join(f"{cell:>{width}}" for cell in cells))
        if self.capacity is not None:
            lines.append(f"* more than the {format_bytes(self.capacity)} of the device, 10 % of them kept free")
        return "\n".join(lines)

    def _cell(self, total: float) -> str:
        return format_bytes(total) + ("*" if self.capacity is not None and total > 0.9 * self.capacity else " ")
