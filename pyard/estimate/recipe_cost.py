"""What a recipe costs before anything is started: bytes on disk, GPU-hours of each stage, memory of each GPU."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyard.conditions import Condition
from pyard.cost.devices import DEVICES, known_device
from pyard.cost.flops import student_flops, teacher_flops, update_flops
from pyard.cost.memory import Memory, update_memory
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.solvers import solver_of
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.models.backbone import Denoiser
from pyard.models.dit.network import dit_trunk
from pyard.models.folder import load_config
from pyard.models.student import Student, StudentConfig
from pyard.ops.backend import AUTO_DEVICES
from pyard.storage.units import format_bytes, format_seconds
from pyard.teachers.published import network_of
from pyard.training.adversarial_cost import adversarial_flops
from pyard.training.config import TrainConfig
from pyard.trajectories.generate import DEFAULT_BATCH_SIZE, default_shard_size
from pyard.trajectories.manifest import SAFETENSORS_DTYPES, TrajectoryManifest
from pyard.trajectories.store import TrajectoryStore, shard_ranges

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LAYOUTS = {
    "DDP": (False, False),
    "DDP, checkpointing": (False, True),
    "FSDP": (True, False),
    "FSDP, checkpointing": (True, True),
}  # sharded, checkpointing


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
        lines.append(f"{'':<15}" + "".join(f"{layout:>21}" for layout in layouts))
        for batch in self.memory[layouts[0]]:
            cells = [self._cell(self.memory[layout][batch].total) for layout in layouts]
            lines.append(f"{batch:<15}" + "".join(f"{cell:>21}" for cell in cells))
        if self.capacity is not None:
            lines.append(f"* more than the {format_bytes(self.capacity)} of the device, 10 % of them kept free")
        return "\n".join(lines)

    def _cell(self, total: float) -> str:
        return format_bytes(total) + ("*" if self.capacity is not None and total > 0.9 * self.capacity else " ")


def estimate(
    recipe: Path,
    *,
    device: str | None = None,
    tflops: float | None = None,
    mfu: float = 0.4,
    gpus: int = 1,
    out: Path | None = None,
    network: str | None = None,
) -> Estimate:
    """Say what a recipe costs, before anything is started and without any weights.

    Disk: the trajectories' shards, exactly, and a checkpoint. Time: the floating-point operations of every stage, counted from
    the matrices' sizes (`pyard describe` counts in the same way), over what a GPU sustains: `tflops` if you have measured it
    (a training's progress bar shows it), else the data sheet's peak of `device` times `mfu`. Well-fed GPUs reach 0.3 to 0.5 of
    their peak on large transformers; small networks reach far less. Memory: weights, averages, AdamW's moments, gradients (with
    DDP twice, for its buckets) and what the backward pass needs of the forward pass, for several micro-batches, with and
    without activation checkpointing, for DDP and FSDP. All weights are taken to be trained (lora_rank is not counted). It is
    right to about a quarter; 0.5 GB of CUDA's own come on top.

    Example: pyard estimate recipes/imagenet256-dit-xl2.yaml --device H100 --gpus 8

    Args:
        recipe: YAML of `pyard train`. Its teacher may be a published name (DiT-XL/2, SiT-XL-2-256) that is not on this disk.
        device: A100 | H100 | H200 | L40S | L4 | A10G | 'RTX 4090' | B200, for the data sheet's TFLOP/s and memory.
        tflops: that one GPU sustains in this training, in TFLOP/s; overrides `device` and `mfu`.
        mfu: share of the data sheet's peak that is taken to be reached.
        gpus: how many share the work; FSDP splits the weights among them.
        out: a JSON file to write as well.
        network: package.module:Class of the backbone of a teacher's folder that is none of pyard's; none: the recipe's.

    Returns:
        The numbers.

    Raises:
        InputError: a recipe that is none, an unknown teacher or device.
    """
    sheet = None if device is None else known_device(device)
    if device is not None and sheet is None:
        raise InputError(f"estimate: device is {device!r}; expected one of {', '.join(DEVICES)}, or give --tflops")
    for name, value in (("tflops", tflops), ("mfu", mfu), ("gpus", gpus)):
        if value is not None and value <= 0:
            raise InputError(f"estimate: {name} is {value}; expected more than 0")
    config = TrainConfig.read(recipe)
    denoiser, schedule = network_of(config.teacher, network or config.network)
    config, student = student_of(config, denoiser, schedule)
    manifest = manifest_of(config, denoiser, schedule, 1 if student.conditions is None else student.conditions.count)
    count, generated, guessed = config.num_trajectories, config.trajectories is None, config.trajectories is not None
    if isinstance(config.trajectories, list):
        raise InputError(f"estimate: trajectories is a list of {len(config.trajectories)} stores; give one of them")
    if config.trajectories is not None and Path(config.trajectories).is_dir():
        store = TrajectoryStore.open(config.trajectories)
        manifest, count, guessed = store.manifest, store.count, False

    def sustained(mixed_precision: str) -> float | None:
        if tflops is not None or sheet is None:
            return tflops
        return mfu * (sheet.float32 if mixed_precision == "no" else sheet.half)

    precision = "bf16" if config.trajectory_precision == "bfloat16" else "no"
    stages = []
    if generated:
        stages.append(
            StageCost(
                "trajectories", trajectory_flops(config, denoiser, student.require_conditions().take([0])), sustained(precision)
            )
        )
    stages.append(StageCost(config.stage, stage_flops(config, denoiser, student), sustained(config.mixed_precision)))
    parameters = sum(p.numel() for p in student.parameters())
    result = Estimate(
        recipe=str(recipe),
        teacher=config.teacher,
        teacher_parameters=sum(p.numel() for p in denoiser.parameters()),
        student=student.config,
        tokens_per_step=student.trunk.tokens_per_step(),
        parameters=parameters,
        trajectories=count,
        sample_bytes=manifest.sample_bytes,
        store_bytes=store_bytes(manifest, count),
        generated=generated,
        guessed=guessed,
        # Weights, averages and AdamW's two moments, in float32.
        checkpoint_bytes=4 * parameters * (1 + len(config.ema_decays) + 2),
        stages=tuple(stages),
        gpus=gpus,
        memory={
            (layout if gpus > 1 else layout.replace("DDP", "one GPU")): {
                batch: memory_of(config, denoiser, student, batch, gpus, *kind) for batch in MICRO_BATCHES
            }
            for layout, kind in LAYOUTS.items()
            if gpus > 1 or not kind[0]
        },
        capacity=None if sheet is None else sheet.memory,
        share=max(1, config.batch_size // gpus // config.gradient_accumulation),
    )
    print(result)
    if out is not None:
        out.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    return result


def student_of(config: TrainConfig, network: Denoiser, schedule: NoiseSchedule) -> tuple[TrainConfig, Student]:
    """The recipe with everything decided, and its student without weights; that of an earlier stage is read if it is there."""
    trunk, head = network.trunk.for_student(network.head)
    if config.student is not None and Path(config.student).is_dir():
        folder = Path(config.student)
        earlier = load_config(folder / "student" if (folder / "student").is_dir() else folder, kind="Student")
        student = StudentConfig.from_json(earlier, type(trunk))
        config = config.like(student)
    else:
        config = config.resolved(trunk.config.depth)
        assert config.history_layers is not None
        assert config.output is not None
        assert config.history_bias != "auto"
        student = StudentConfig(
            network=trunk.config,
            grid=TimeGrid.build(schedule, config.num_steps, config.teacher_steps),
            schedule=schedule,
            history_layers=config.history_layers,
            mask=config.mask,
            window=config.window,
            target=config.target,
            output=config.output,
            heads=config.heads,
            history_bias=config.history_bias,
            family=trunk.family(),
        )
    return config, Student(student, trunk, head).to("meta")


def manifest_of(config: TrainConfig, network: Denoiser, schedule: NoiseSchedule, classes: int) -> TrajectoryManifest:
    """The manifest that the recipe's trajectories will have, but for the teacher's fingerprint."""
    manifest = TrajectoryManifest(
        teacher_fingerprint="0" * 64,
        solver=solver_of(schedule),
        schedule=schedule,
        grid=TimeGrid.build(schedule, config.num_steps, config.teacher_steps),
        cfg_scale=config.cfg_scale,
        cfg_channels=config.cfg_channels,
        cfg_interval=None,
        precision=config.trajectory_precision,
        compiled=False,
        sample_shape=network.config.sample_shape,
        num_classes=classes,
        keep=config.trajectory_keep,
        dtype=config.trajectory_dtype,
        seed=config.seed,
        labels="uniform",
        batch_size=DEFAULT_BATCH_SIZE,
        shard_size=DEFAULT_BATCH_SIZE,
    )
    return dataclasses.replace(manifest, shard_size=default_shard_size(manifest))


def store_bytes(manifest: TrajectoryManifest, count: int) -> int:
    """Bytes of all shards: 8 for the header's length, the header, padded to a multiple of 8, and the tensors."""
    total = 0
    for first, end in shard_ranges(manifest, count):
        layout, offset = manifest.layout(end - first), 0
        about = json.dumps({"first": first, "manifest": manifest.digest}, sort_keys=True)
        header: dict[str, Any] = {"__metadata__": {"pyard": about}}
        # safetensors writes the widest numbers first, then by name.
        for name in sorted(layout, key=lambda name: (-SAFETENSORS_DTYPES[layout[name].dtype][1], name)):
            tensor = layout[name]
            span = [offset, offset + tensor.num_bytes]
            header[name] = {"dtype": SAFETENSORS_DTYPES[tensor.dtype][0], "shape": list(tensor.shape), "data_offsets": span}
            offset = span[1]
        total += 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + offset
    return total


def trajectory_flops(config: TrainConfig, network: Denoiser, condition: Condition) -> float:
    """Of the teacher for all trajectories: DDIM and Euler evaluate it once a step, twice with guidance."""
    passes = config.teacher_steps * (1 if config.cfg_scale == 1 else 2)
    return config.num_trajectories * passes * teacher_flops(network, condition)


def stage_flops(config: TrainConfig, network: Denoiser, student: Student) -> float:
    """Of all updates, with the rollouts that make own histories and checkpointing's second forward pass."""
    forward = config.batch_size * student_flops(student)
    update = update_flops(student, config.batch_size)
    if config.activation_checkpointing:
        update += forward
    if config.rollout_gradient == "detach":
        share = max(0.0, 1 - config.rollout_start / config.max_steps)
        update += config.rollout_probability * share * forward
    if config.stage == "adversarial":
        update += config.batch_size * adversarial_flops(network, student.require_conditions().take([0]), config.adversarial)
    return config.max_steps * update


def memory_of(
    config: TrainConfig,
    network: Denoiser,
    student: Student,
    batch: int,
    gpus: int,
    sharded: bool,
    checkpointing: bool,
    *,
    device_type: str = "cuda",
) -> Memory:
    """Memory of an update of the recipe with a micro-batch of `batch` samples."""
    return update_memory(
        student.config,
        sum(p.numel() for p in student.parameters()),
        batch,
        world=gpus,
        averages=len(config.ema_decays),
        mixed=config.mixed_precision != "no",
        checkpointing=checkpointing,
        sharded=sharded,
        plain=device_type not in AUTO_DEVICES,
        adversarial=config.adversarial if config.stage == "adversarial" else None,
        teacher=(dit_trunk(network, "estimate").config, sum(p.numel() for p in network.parameters())),
    )
