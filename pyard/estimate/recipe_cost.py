"""What a recipe costs before anything is started: bytes on disk, GPU-hours of each stage, memory of each GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from pyard.conditions import Condition, PromptTable, load_conditions
from pyard.cost.devices import DEVICES, known_device
from pyard.cost.flops import teacher_flops, without_weights
from pyard.cost.memory import pass_memory
from pyard.errors import InputError
from pyard.estimate.disk import checkpoints_kept, grid_of, held_out_bytes, manifest_of, sample_shape_of, store_bytes
from pyard.estimate.report import Estimate, StageCost
from pyard.estimate.text_cost import TextCost, stored_text_cost, text_cost
from pyard.estimate.update_cost import MemoryOfUpdates, stage_flops
from pyard.models.folder import load_config
from pyard.models.lora import add_lora
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig
from pyard.storage.files import write_text
from pyard.storage.typed import checked
from pyard.teachers.published import TeacherOutline, outline_of
from pyard.teachers.text_to_image.encoding import TextShape
from pyard.training.agreement import agree_with_stores, agree_with_student
from pyard.training.config import TrainConfig, known
from pyard.training.inputs import default_lora_heads
from pyard.trajectories.manifest import TrajectoryManifest
from pyard.trajectories.store import TrajectoryStore

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
    text_tokens: int | None = None,
) -> Estimate:
    """Estimate what a recipe costs before you start it, without any weights.

    Disk: the shards of trajectories (exact), embedded prompts, and checkpoints. Time: the floating-point operations of every
    stage, counted while the networks run without data (as `pyard describe` does), divided by the rate that a GPU sustains:
    `tflops` if measured (the progress bar of training shows it), else the peak of `device`'s data sheet times `mfu`.
    Well-fed GPUs reach 0.3 to 0.5 of their peak on large transformers; small networks reach far less. Memory: weights,
    averages, AdamW's moments, gradients (twice with DDP, for its buckets) and the activations kept for the backward pass,
    for several micro-batches, with and without activation checkpointing, for DDP and FSDP. With LoRA, frozen weights count
    once, in the precision of the trajectories; averages, moments and gradients count only for what is trained. Expect the
    estimate to be right within a quarter; CUDA itself takes 0.5 GB more.

    Example: pyard estimate imagenet256-dit-xl2 --device H100 --gpus 8

    Args:
        recipe: YAML of `pyard train`, or the name of one of pyard's. Its teacher may be a published name (DiT-XL/2,
            SiT-XL-2-256, sd3.5-medium, black-forest-labs/FLUX.1-dev) that is not on this disk.
        device: A100 | H100 | H200 | L40S | L4 | A10G | 'RTX 4090' | B200, for the data sheet's TFLOP/s and memory.
        tflops: rate that one GPU sustains in this training, in TFLOP/s; overrides `device` and `mfu`.
        mfu: fraction of the data sheet's peak that is assumed to be reached.
        gpus: number of GPUs that share the work; FSDP splits the weights among them.
        out: a JSON file to write as well.
        network: package.module:Class of the teacher's backbone, if it is not one of pyard's; none: the recipe's.
        text_tokens: tokens of the longest prompt of a text-to-image pipeline; none: as many as its text encoder takes.

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
    given = store_of(config)
    store = TrajectoryStore.open(given) if given is not None and given.is_dir() else None
    if store is not None:
        config = agree_with_stores(config, [store], [store.count])
    teacher = outline_of(config.teacher, network or config.network)
    config, student = student_of(config, teacher)
    text = text_shape(teacher, text_tokens)
    condition = one_condition(config, teacher, student, text)
    count, generated, guessed = known(config.num_trajectories), given is None, given is not None and store is None
    texts = None if text is None or teacher.pipeline is None else text_cost(config, teacher.pipeline, text, count)
    manifest = manifest_of(config, teacher, student.num_conditions if texts is None else texts.prompts)
    if store is not None:
        manifest = store.manifest
        table = load_conditions(store.path)
        if isinstance(table, PromptTable) and text is not None:
            texts = stored_text_cost(table, text)

    def sustained(mixed_precision: str) -> float | None:
        if tflops is not None or sheet is None:
            return tflops
        return mfu * (sheet.float32 if mixed_precision == "no" else sheet.half)

    computed = sustained("bf16" if config.trajectory_precision == "bfloat16" else "no")
    stages = []
    if generated or guessed:
        if texts is not None:
            stages.append(StageCost("text encoding", texts.flops, computed))
        stages.append(StageCost("trajectories", trajectory_flops(manifest, count, teacher, condition), computed))
    stages.append(
        StageCost(config.stage, stage_flops(config, teacher.network, student, condition), sustained(config.mixed_precision))
    )
    memory = MemoryOfUpdates.count(config, teacher, student, condition)
    parameters = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    share = max(1, config.batch_size // gpus // config.gradient_accumulation)
    layouts = LAYOUTS if gpus > 1 else {name.replace("DDP", "one GPU"): kind for name, kind in LAYOUTS.items() if not kind[0]}
    own = (config.parallel == "fsdp" and gpus > 1, config.activation_checkpointing)
    result = Estimate(
        recipe=str(recipe),
        teacher=config.teacher,
        teacher_parameters=sum(p.numel() for p in teacher.network.parameters()),
        student=student.config,
        tokens_per_step=student.trunk.tokens_per_step(student.sample_shape),
        parameters=parameters,
        trained_parameters=trained,
        trajectories=count,
        sample_bytes=manifest.sample_bytes,
        store_bytes=store_bytes(manifest, count),
        generated=generated,
        guessed=guessed,
        texts=texts,
        # Weights, averages and AdamW's two moments, in float32, of what is trained.
        checkpoint_bytes=4 * trained * (1 + len(config.ema_decays) + 2),
        checkpoints=checkpoints_kept(config),
        held_out_bytes=held_out_bytes(config, manifest) + (texts.num_bytes if texts and config.evaluate_every else 0),
        stages=tuple(stages),
        gpus=gpus,
        memory={layout: memory.each(MICRO_BATCHES, gpus, *kind) for layout, kind in layouts.items()},
        own_layout=next(layout for layout, kind in layouts.items() if kind == own),
        own_memory=memory.of(share, gpus, *own),
        teacher_memory=teacher_memory(config, manifest, teacher, texts, condition),
        device=device,
        capacity=None if sheet is None else sheet.memory,
        share=share,
        steps_per_update=config.steps_per_update,
    )
    print(result)
    if out is not None:
        write_text(out, json.dumps(result.to_json(), indent=2) + "\n")
    return result


def student_of(config: TrainConfig, teacher: TeacherOutline) -> tuple[TrainConfig, Student]:
    """The recipe with everything decided, and its student without weights; that of an earlier stage is read if it is there."""
    network = teacher.network
    if config.lora_rank is not None and teacher.pipeline is not None and config.trajectory_precision == "bfloat16":
        network = without_weights(network).to(torch.bfloat16)
    trunk, head = network.trunk.for_student(network.head)
    if config.student is not None and Path(config.student).is_dir():
        folder = Path(config.student)
        earlier = load_config(folder / "student" if (folder / "student").is_dir() else folder, kind="Student")
        student = StudentConfig.from_json(earlier, type(trunk))
        config = agree_with_student(config, student).resolved(trunk.config.depth)
    else:
        config = config.resolved(trunk.config.depth)
        assert config.output is not None
        assert config.history_bias != "auto"
        student = StudentConfig(
            network=trunk.config,
            grid=grid_of(config, teacher),
            schedule=teacher.schedule,
            history_layers=known(config.history_layers),
            mask=known(config.mask),
            window=config.window,
            target=known(config.target),
            output=config.output,
            heads=known(config.heads),
            history_bias=config.history_bias,
            family=trunk.family(),
            sample_shapes=(sample_shape_of(config, teacher),),
        )
    made = Student(student, trunk, head).to("meta").requires_grad_(True)
    if config.lora_rank is not None:
        add_lora(made, config.lora_rank, config.lora_heads or default_lora_heads(student, teacher.pipeline is not None))
    places = [Path(place) for place in (config.teacher, store_of(config), config.student) if place is not None]
    made.conditions = made.conditions or load_conditions(*places, *(place / "student" for place in places))
    return config, made


def store_of(config: TrainConfig) -> Path | None:
    """The folder of the recipe's store; None: it generates one."""
    if isinstance(config.trajectories, list):
        raise InputError(f"estimate: trajectories is a list of {len(config.trajectories)} stores; give one of them")
    return None if config.trajectories is None else Path(config.trajectories)


def text_shape(teacher: TeacherOutline, tokens: int | None) -> TextShape | None:
    """What the teacher's transformer gets of the longest text; None: it draws from no texts.

    Args:
        teacher: without weights.
        tokens: of the longest text; None: the limit of the text encoder.

    Raises:
        InputError: `tokens` for a teacher of no texts, for one that attends to padding, or above the limit.
    """
    pipeline = teacher.pipeline
    if pipeline is None:
        if tokens is not None:
            raise InputError("text_tokens is for text-to-image pipelines; this teacher does not draw from prompts")
        return None
    text = pipeline.text
    if tokens is None:
        return text
    if text.padded and tokens != text.tokens:
        raise InputError(f"text_tokens is {tokens}; the transformer of this {pipeline.family.pipeline} attends to padding, so "
                         f"every text has {text.tokens}")  # fmt: skip
    if not 1 <= tokens <= text.tokens:
        raise InputError(f"text_tokens is {tokens}; expected 1 to {text.tokens}, the limit of {pipeline.family.pipeline}")
    return dataclasses.replace(text, tokens=tokens)


def one_condition(config: TrainConfig, teacher: TeacherOutline, student: Student, text: TextShape | None) -> Condition:
    """The condition of one sample, as long as the longest of a batch."""
    table = student.conditions
    if teacher.pipeline is not None and text is not None:
        return text.condition(teacher.pipeline.constants(config.embedded_guidance))
    if table is None:
        raise InputError(
            f"estimate: teacher {config.teacher!r} has no classes, and no table of conditions was found; expected one in "
            "conditions/ of its folder, where `save_pretrained` writes it"
        )
    return table.take(range(min(table.count, config.batch_size))).index(slice(0, 1))


def trajectory_flops(manifest: TrajectoryManifest, count: int, teacher: TeacherOutline, condition: Condition) -> float:
    """Of the teacher for all trajectories."""
    return count * passes_of(manifest) * teacher_flops(teacher.network, condition, manifest.sample_shape)


def passes_of(manifest: TrajectoryManifest) -> int:
    """Of the teacher's network for one trajectory: one a step, two with Heun's solver, and twice that with guidance."""
    steps = manifest.grid.teacher_steps
    evaluations = 2 * steps - 1 if manifest.solver == "heun" else steps
    return evaluations * (1 if manifest.cfg_scale == 1 else 2)


def teacher_memory(
    config: TrainConfig, manifest: TrajectoryManifest, teacher: TeacherOutline, texts: TextCost | None, condition: Condition
) -> dict[int, float] | None:
    """Bytes that a text-to-image teacher needs on a GPU by batch of trajectories; None: another teacher.

    The text encoders are there while prompts are encoded, beside the transformer, and gone before it runs.
    """
    if teacher.pipeline is None or texts is None:
        return None
    dtype = torch.bfloat16 if config.trajectory_precision == "bfloat16" else torch.float32
    weights = dtype.itemsize * sum(p.numel() for p in teacher.network.parameters())
    fixed, row = pass_memory(teacher.network, condition, manifest.sample_shape, dtype=dtype)
    rows = 1 if manifest.cfg_scale == 1 else 2
    return {batch: weights + max(texts.encoder_bytes, fixed + batch * rows * row) for batch in MICRO_BATCHES}
