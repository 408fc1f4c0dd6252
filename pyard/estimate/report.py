"""What a recipe costs, as numbers and as a table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pyard.cost.memory import Memory
from pyard.estimate.text_cost import TextCost
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
        trained_parameters: of those, what training changes.
        trajectories: how many.
        sample_bytes: of one.
        store_bytes: of all shards, headers included; sidecars (about 500 bytes a shard) are not.
        generated: whether the recipe has them generated; False if it names a store.
        guessed: the store that it names is not there, so that the sizes are those of the recipe's own defaults.
        texts: of a text-to-image pipeline, its prompts.
        checkpoint_bytes: of one checkpoint, without discriminators.
        checkpoints: that there are at the end.
        held_out_bytes: of the trajectories that training is measured on, and their copy of the prompts.
        stages: in order.
        gpus: that share the work.
        memory: bytes on each GPU by layout and micro-batch.
        own_layout, own_memory: of the recipe itself.
        teacher_memory: bytes on each GPU while trajectories are generated, by batch; None: no text-to-image pipeline.
        device: its name as it was given.
        capacity: of one GPU in bytes; None: no device was given.
        share: samples of an update on each GPU, a micro-batch of the recipe.
        steps_per_update: steps that an update learns; None: all S.
    """

    recipe: str
    teacher: str
    teacher_parameters: int
    student: StudentConfig
    tokens_per_step: int
    parameters: int
    trained_parameters: int
    trajectories: int
    sample_bytes: int
    store_bytes: int
    generated: bool
    guessed: bool
    texts: TextCost | None
    checkpoint_bytes: int
    checkpoints: int
    held_out_bytes: int
    stages: tuple[StageCost, ...]
    gpus: int
    memory: dict[str, dict[int, Memory]]
    own_layout: str
    own_memory: Memory
    teacher_memory: dict[int, float] | None
    device: str | None
    capacity: float | None
    share: int
    steps_per_update: int | None = None

    @property
    def disk_bytes(self) -> int:
        """Of trajectories, embedded prompts and the checkpoints that stay; the student is as large as a part of one."""
        texts = 0 if self.texts is None else self.texts.num_bytes
        return self.store_bytes + texts + self.held_out_bytes + self.checkpoints * self.checkpoint_bytes

    @property
    def gpu_hours(self) -> float | None:
        """Of all stages, on one GPU; None: no device was given."""
        hours = [stage.gpu_hours for stage in self.stages]
        return None if None in hours else sum(hour for hour in hours if hour is not None)

    def fits(self, num_bytes: float) -> bool:
        """Whether so many bytes fit the device, a tenth of which is kept free; True where none was given."""
        return self.capacity is None or num_bytes <= 0.9 * self.capacity

    @property
    def summary(self) -> list[str]:
        """Disk, hours and memory of the recipe as it stands, a line each."""
        parts = [f"trajectories {format_bytes(self.store_bytes)}"]
        if self.texts is not None:
            most = "" if self.texts.shape.padded or self.texts.encoded else "at most "
            parts.append(f"prompts {most}{format_bytes(self.texts.num_bytes)}")
        if self.held_out_bytes:
            parts.append(f"held out {format_bytes(self.held_out_bytes)}")
        parts.append(f"checkpoints {format_bytes(self.checkpoints * self.checkpoint_bytes)}")
        lines = [f"disk           {format_bytes(self.disk_bytes)}: {', '.join(parts)}"]
        if self.gpu_hours is not None:
            hours = ", ".join(f"{stage.name} {stage.gpu_hours:.3g}" for stage in self.stages)
            lines.append(f"GPU-hours      {self.gpu_hours:.3g}: {hours}")
        total = self.own_memory.total
        room = ""
        if self.capacity is not None:
            verdict = "fits" if self.fits(total) else "does not fit"
            room = f" of {format_bytes(self.capacity)}: {verdict} {self.gpus} x {self.device}"
        lines.append(f"memory         {format_bytes(total)}{room} ({self.own_layout}, micro-batch {self.share})")
        return lines

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        flat = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        stages = [{**dataclasses.asdict(stage), "gpu_hours": stage.gpu_hours} for stage in self.stages]
        memory = {
            layout: {str(batch): _with_total(found) for batch, found in row.items()} for layout, row in self.memory.items()
        }
        return {
            **flat,
            "student": self.student.to_json(),
            "texts": None if self.texts is None else dataclasses.asdict(self.texts),
            "stages": stages,
            "memory": memory,
            "own_memory": _with_total(self.own_memory),
            "disk_bytes": self.disk_bytes,
            "gpu_hours": self.gpu_hours,
        }

    def __str__(self) -> str:
        student = self.student
        depth, tokens = student.network.depth, self.tokens_per_step
        made = "does not exist yet: default sizes" if self.guessed else "to generate" if self.generated else "already exists"
        learnt = "" if self.steps_per_update is None else f" ({self.steps_per_update} an update)"
        sizes = f"S = {student.grid.num_steps} steps{learnt}, N = {student.history_layers} of {depth} layers, "
        sizes += f"T = {tokens} tokens"
        trained = self.trained_parameters
        low_rank = "" if trained == self.parameters else f", {_count(trained)} of them trained"
        store = f"{self.trajectories} of {format_bytes(self.sample_bytes)}: {format_bytes(self.store_bytes)}, {made}"
        lines = [
            f"recipe         {self.recipe}",
            f"teacher        {self.teacher}: {_count(self.teacher_parameters)} parameters",
            f"student        {_count(self.parameters)} parameters{low_rank}; {sizes}",
            f"trajectories   {store}",
            *([] if self.texts is None else [f"prompts        {self.texts}"]),
            f"checkpoint     {format_bytes(self.checkpoint_bytes)} each",
            *self.summary,
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
        columns = {layout: {batch: found.total for batch, found in row.items()} for layout, row in self.memory.items()}
        if self.teacher_memory is not None:
            columns["trajectories"] = self.teacher_memory
        width = max(20, *map(len, columns)) + 2
        lines.append(f"{'':<15}" + "".join(f"{name:>{width}}" for name in columns))
        for batch in next(iter(columns.values())):
            lines.append(f"{batch:<15}" + "".join(f"{self._cell(column[batch]):>{width}}" for column in columns.values()))
        if self.capacity is not None:
            lines.append(f"* more than the {format_bytes(self.capacity)} of the device, 10 % of them kept free")
        return "\n".join(lines)

    def _cell(self, total: float) -> str:
        return format_bytes(total) + (" " if self.fits(total) else "*")


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.4g} B" if parameters >= 1e9 else f"{parameters / 1e6:.4g} M"


def _with_total(memory: Memory) -> dict[str, float]:
    return {**dataclasses.asdict(memory), "total": memory.total}
