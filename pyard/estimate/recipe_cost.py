"""What a recipe costs before anything is started: bytes on disk, GPU-hours of each stage, memory of each GPU."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyard.conditions import Condition, load_conditions
from pyard.cost.activations import Kept
from pyard.cost.devices import DEVICES, known_device
from pyard.cost.flops import student_flops, teacher_flops
from pyard.cost.memory import AdversarialMemory, Memory, adversarial_memory, student_activations, update_memory
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.solvers import solver_of
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.estimate.report import Estimate, StageCost
from pyard.models.backbone import Denoiser
from pyard.models.folder import load_config
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig
from pyard.storage.files import write_text
from pyard.storage.typed import checked
from pyard.teachers.published import network_of
from pyard.training.adversarial_cost import adversarial_flops, looked_at
from pyard.training.config import TrainConfig
from pyard.trajectories.generate import DEFAULT_BATCH_SIZE, DEFAULT_CFG_SCALE, DEFAULT_TEACHER_STEPS, default_shard_size
from pyard.trajectories.manifest import SAFETENSORS_DTYPES, TrajectoryManifest
from pyard.trajectories.store import TrajectoryStore, shard_ranges

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LAYOUTS = {
    "DDP": (False, False),
    "DDP, checkpointing": (False, True),
    "FSDP": (True, False),
    "FSDP, checkpointing": (True, True),
}  # sharded, checkpointing


@checked("estimate")
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

    Disk: the trajectories' shards, exactly, and a checkpoint. Time: the floating-point operations of every stage, counted while
    the networks run without data (`pyard describe` counts in the same way), over what a GPU sustains: `tflops` if you have
    measured it (a training's progress bar shows it), else the data sheet's peak of `device` times `mfu`. Well-fed GPUs reach
    0.3 to 0.5 of their peak on large transformers; small networks reach far less. Memory: weights, averages, AdamW's moments,
    gradients (with DDP twice, for its buckets) and what the backward pass needs of the forward pass, counted in the same way,
    for several micro-batches, with and without activation checkpointing, for DDP and FSDP. All weights are taken to be trained
    (lora_rank is not counted). It is right to about a quarter; 0.5 GB of CUDA's own come on top.

    Example: pyard estimate recipes/imagenet256-dit-xl2.yaml --device H100 --gpus 8

    Args:
        recipe: YAML of `pyard train`. Its teacher may be a published name (DiT-XL/2, SiT-XL-2-256) that is not on this disk.
        device: A100 | H100 | H200 | L40S | L4 | A10G | 'RTX 4090' | B200, for the data sheet's TFLOP/s and memory.
        tflops: that one GPU sustains in this training, in TFLOP/s; overrides `device` and `mfu`.
        mfu: share of the data sheet's peak that is taken to be reached.
        gpus: how many share the work; FSDP splits the weights among them.
        out: a JSON file to write as well.
        network: package.module:Class of the backbone of a teacher that is made of none of pyard's; none: the recipe's.

    Returns:
        The numbers.

    Raises:
        InputError: a recipe that is none, an unknown teacher or device, a teacher without a table of conditions.
    """
    sheet = None if device is None else known_device(device)
    if device is not None and sheet is None:
        raise InputError(f"estimate: device is {device!r}; expected one of {', '.join(DEVICES)}, or give --tflops")
    for name, value in (("tflops", tflops), ("mfu", mfu), ("gpus", gpus)):
        if value is not None and value <= 0:
            raise InputError(f"estimate: {name} is {value}; expected more than 0")
    config = TrainConfig.read(recipe)
    teacher, schedule = network_of(config.teacher, network or config.network)
    config, student = student_of(config, teacher, schedule)
    condition = one_condition(config, student)
    manifest = manifest_of(config, teacher, schedule, student.num_conditions)
    count, generated, guessed = config.num_trajectories, config.trajectories is None, config.trajectories is not None
    given = store_of(config)
    if given is not None and given.is_dir():
        store = TrajectoryStore.open(given)
        manifest, count, guessed = store.manifest, store.count, False

    def sustained(mixed_precision: str) -> float | None:
        if tflops is not None or sheet is None:
            return tflops
        return mfu * (sheet.float32 if mixed_precision == "no" else sheet.half)

    precision = "bf16" if config.trajectory_precision == "bfloat16" else "no"
    stages = []
    if generated:
        stages.append(StageCost("trajectories", trajectory_flops(config, teacher, condition), sustained(precision)))
    stages.append(StageCost(config.stage, stage_flops(config, teacher, student), sustained(config.mixed_precision)))
    memory = MemoryOfUpdates.count(config, teacher, student)
    parameters = sum(p.numel() for p in student.parameters())
    result = Estimate(
        recipe=str(recipe),
        teacher=config.teacher,
        teacher_parameters=sum(p.numel() for p in teacher.parameters()),
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
                batch: memory.of(batch, gpus, *kind) for batch in MICRO_BATCHES
            }
            for layout, kind in LAYOUTS.items()
            if gpus > 1 or not kind[0]
        },
        capacity=None if sheet is None else sheet.memory,
        share=max(1, config.batch_size // gpus // config.gradient_accumulation),
    )
    print(result)
    if out is not None:
        write_text(out, json.dumps(result.to_json(), indent=2) + "\n")
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
            grid=TimeGrid.build(schedule, config.num_steps, config.teacher_steps or DEFAULT_TEACHER_STEPS),
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
    made = Student(student, trunk, head).to("meta")
    places = [Path(place) for place in (config.teacher, store_of(config), config.student) if place is not None]
    made.conditions = made.conditions or load_conditions(*places, *(place / "student" for place in places))
    return config, made


def store_of(config: TrainConfig) -> Path | None:
    """The folder of the recipe's store; None: it generates one."""
    if isinstance(config.trajectories, list):
        raise InputError(f"estimate: trajectories is a list of {len(config.trajectories)} stores; give one of them")
    return None if config.trajectories is None else Path(config.trajectories)


def one_condition(config: TrainConfig, student: Student) -> Condition:
    """The condition of one sample, as long as it is in a batch of the first conditions of the table."""
    table = student.conditions
    if table is None:
        raise InputError(
            f"estimate: teacher {config.teacher!r} knows no classes, and no table of conditions was found; expected one in "
            "conditions/ of its folder, where `save_pretrained` writes it"
        )
    return table.take(range(min(table.count, config.batch_size))).index(slice(0, 1))


def manifest_of(config: TrainConfig, network: Denoiser, schedule: NoiseSchedule, classes: int) -> TrajectoryManifest:
    """The manifest that the recipe's trajectories will have, but for the teacher's fingerprint."""
    manifest = TrajectoryManifest(
        teacher_fingerprint="0" * 64,
        solver=solver_of(schedule),
        schedule=schedule,
        grid=TimeGrid.build(schedule, config.num_steps, config.teacher_steps or DEFAULT_TEACHER_STEPS),
        cfg_scale=DEFAULT_CFG_SCALE if config.cfg_scale is None else config.cfg_scale,
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
    passes = (config.teacher_steps or DEFAULT_TEACHER_STEPS) * (1 if config.cfg_scale == 1 else 2)
    return config.num_trajectories * passes * teacher_flops(network, condition)


def stage_flops(config: TrainConfig, network: Denoiser, student: Student) -> float:
    """Of all updates, with the rollouts that make own histories and checkpointing's second forward pass."""
    condition = one_condition(config, student)
    forward = config.batch_size * student_flops(student, condition)
    update = 3 * forward
    if config.activation_checkpointing:
        update += forward
    if config.rollout_gradient == "detach":
        share = max(0.0, 1 - config.rollout_start / config.max_steps)
        update += config.rollout_probability * share * forward
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
    def count(cls, config: TrainConfig, network: Denoiser, student: Student, device_type: str = "cuda") -> MemoryOfUpdates:
        """Run student and teacher without data, with the operators that a device has."""
        condition, settings = one_condition(config, student), config.adversarial
        mixed, added = config.mixed_precision != "no", None
        if config.stage == "adversarial":
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
        return cls(config, student, student_activations(student, condition, mixed=mixed, device_type=device_type), added)

    def of(self, batch: int, gpus: int, sharded: bool, checkpointing: bool) -> Memory:
        """With a micro-batch of `batch` samples on each GPU."""
        return update_memory(
            self.student,
            self.kept,
            batch,
            world=gpus,
            averages=len(self.config.ema_decays),
            mixed=self.config.mixed_precision != "no",
            checkpointing=checkpointing,
            sharded=sharded,
            adversarial=self.adversarial,
        )
