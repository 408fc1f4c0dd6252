"""Regression: the student learns the S outputs of stored trajectories, teacher-forced, in one parallel pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from tqdm import tqdm

from pyard.errors import InputError
from pyard.models.lora import add_lora, merge_lora
from pyard.models.student import Heads, Output, Student, default_output
from pyard.ops.masks import Mask
from pyard.teachers import load_teacher
from pyard.time_grid import Target
from pyard.training.config import TrainConfig
from pyard.training.state import Checkpoints, TrainingLog, ema_of
from pyard.trajectories import TrajectoryReader, TrajectoryStore, generate_trajectories

if TYPE_CHECKING:
    from pyard.teachers.dit import DiTTeacher


def train(
    teacher: str | Path | DiTTeacher,
    trajectories: str | Path | TrajectoryStore | None = None,
    *,
    out: str | Path,
    num_steps: int = 4,
    history_layers: int | None = None,
    mask: Mask = "causal",
    window: int | None = None,
    target: Target = "denoised",
    output: Output | None = None,
    heads: Heads = "per_step",
    history_bias: float | None = None,
    lora_rank: int | None = None,
    num_trajectories: int = 8192,
    max_steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 5e-4,
    lr_schedule: Literal["constant", "cosine"] = "cosine",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    grad_clip: float = 1.0,
    ema_decay: float = 0.999,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    seed: int = 0,
    save_every: int = 500,
    log_every: int = 10,
    progress: bool = True,
) -> Student:
    """Distil a teacher into a student of a few steps.

    Missing trajectories are generated first. A run that was stopped resumes from its last checkpoint and ends with the same
    weights as one that was not. The folder `out` holds `student/` (EMA weights), `train.json`, `log.jsonl` and `checkpoints/`.

    Example: pyard train --teacher digits --out runs/digits

    The defaults suit the built-in digits. The paper's ImageNet-256 recipe: batch 64, constant learning rate 1e-4, 300k steps,
    EMA 0.9999, N = 6 of 28.

    Args:
        teacher: `digits`, or a teacher's folder.
        trajectories: a store that `generate_trajectories` wrote with this teacher; none: generated in `out`/trajectories.
        out: the run folder.
        num_steps: S, network passes of the student; the grid of a given store must have as many.
        history_layers: N, how many of the lowest attentions see earlier steps; 0 is step distillation; none: a quarter of
            the teacher's layers, rounded up.
        mask: which earlier steps they see: diagonal | window | anchor | causal.
        window: steps seen with the `window` mask, own one included.
        target: what a step predicts: the teacher's `denoised` prediction (as published) or the ODE `state`.
        output: `direct` as published, or `jump` (needs `state` targets): start as the teacher's own DDIM/Euler sampler; none:
            `jump` for `state` targets, else `direct`.
        heads: an output head `per_step`, or one `shared`.
        history_bias: start value of a learned bias on the attention to earlier steps; none: no bias.
        lora_rank: train low-rank additions to the blocks (PEFT) and the heads, not all weights; the result has them added in.
            None: train everything.
        num_trajectories: how many to generate if there is no store.
        max_steps: updates.
        batch_size: trajectories an update, over all processes.
        learning_rate: of AdamW.
        lr_schedule: `constant`, or `cosine` to zero at max_steps.
        warmup_steps: updates over which the learning rate rises from zero.
        weight_decay: of AdamW.
        grad_clip: largest gradient norm.
        ema_decay: of the average of the weights that is the result; it warms up as (1 + n) / (10 + n).
        mixed_precision: no | bf16 | fp16.
        seed: of the order of the trajectories.
        save_every: updates between checkpoints.
        log_every: updates between lines of the log.
        progress: show a progress bar.

    Returns:
        The student with its EMA weights, in evaluation mode.

    Raises:
        InputError: settings that do not fit each other, the store or the run in `out`.
    """
    # Accelerate takes a second to import, which `pyard train --help` need not wait for.
    from accelerate import Accelerator

    out = Path(out)
    if isinstance(teacher, str | Path):
        teacher = load_teacher(teacher)
    if history_layers is None:
        history_layers = math.ceil(teacher.network.config.depth / 4)
    output = output or default_output(target)
    store = _open_store(teacher, trajectories, out, num_steps, num_trajectories, seed, progress)
    config = TrainConfig(
        history_layers=history_layers,
        mask=mask,
        window=window,
        target=target,
        output=output,
        heads=heads,
        history_bias=history_bias,
        lora_rank=lora_rank,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        lr_schedule=lr_schedule,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        grad_clip=grad_clip,
        ema_decay=ema_decay,
        mixed_precision=mixed_precision,
        seed=seed,
        teacher_fingerprint=teacher.fingerprint,
        trajectories={**store.manifest.to_json(), "count": store.count},
    )
    student = Student.from_teacher(
        teacher,
        store.manifest.grid,
        history_layers=history_layers,
        mask=mask,
        window=window,
        target=target,
        output=output,
        heads=heads,
        history_bias=history_bias,
    )
    if lora_rank is not None:
        add_lora(student, lora_rank)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    world, rank = accelerator.num_processes, accelerator.process_index
    if batch_size % world:
        raise InputError(f"batch_size {batch_size} is no multiple of the {world} processes")
    reader = TrajectoryReader(store, batch_size // world, target=target, seed=seed, rank=rank, world_size=world)
    if accelerator.is_main_process:
        config.resume_or_begin(out)

    student.to(accelerator.device)
    ema = ema_of(student, ema_decay)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=accelerator.device.type == "cuda"
    )
    model, optimizer = accelerator.prepare(student.train(), optimizer)
    checkpoints = Checkpoints(out / "checkpoints")
    begin = max(checkpoints.steps(), default=0)
    if begin:
        state = checkpoints.load(begin, student, ema, optimizer)
        reader.load_state_dict(state["reader"])
    log = TrainingLog(out / "log.jsonl", begin) if accelerator.is_main_process else None

    batches = iter(reader)
    bar = tqdm(
        total=max_steps, initial=begin, desc=f"training {out.name}", unit="step",
        disable=not (progress and accelerator.is_main_process),
    )  # fmt: skip
    for step in range(begin + 1, max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _lr_factor(step, max_steps, warmup_steps, lr_schedule)
        batch = next(batches)
        history, goal, labels = (t.to(accelerator.device) for t in (batch.history, batch.target, batch.condition))
        with accelerator.autocast():
            prediction = model(history, labels)
        loss_per_step = (prediction.float() - goal.float()).square().mean(dim=(0, 2, 3, 4))  # [S]
        loss = loss_per_step.mean()
        accelerator.backward(loss)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(student)
        if step % log_every == 0 or step == max_steps:
            reduced = accelerator.reduce(loss_per_step.detach(), "mean").tolist()
            mean = sum(reduced) / len(reduced)
            if not math.isfinite(mean):
                raise InputError(
                    f"the loss is {mean} at step {step}; lower --learning_rate (now {learning_rate:g}); "
                    f"the last checkpoint in {checkpoints.path} is intact"
                )
            if log is not None:
                log.write(step=step, loss=mean, loss_per_step=reduced, grad_norm=float(grad_norm))
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if accelerator.is_main_process and (step % save_every == 0 or step == max_steps):
            checkpoints.save(step, student, ema, optimizer, {"reader": reader.state_dict()})
        bar.update()
    bar.close()
    if log is not None:
        log.close()
    result = ema.module.eval()
    assert isinstance(result, Student)
    merge_lora(result)
    if accelerator.is_main_process:
        result.save_pretrained(out / "student")
    accelerator.wait_for_everyone()
    return result


def _open_store(
    teacher: DiTTeacher,
    trajectories: str | Path | TrajectoryStore | None,
    out: Path,
    num_steps: int,
    num_trajectories: int,
    seed: int,
    progress: bool,
) -> TrajectoryStore:
    """The store to train on: the given one, checked against teacher and S, or a new one in the run folder."""
    if trajectories is None:
        return generate_trajectories(
            teacher, out / "trajectories", num_trajectories, num_steps=num_steps, seed=seed, progress=progress
        )
    store = trajectories if isinstance(trajectories, TrajectoryStore) else TrajectoryStore.open(trajectories)
    theirs = store.manifest
    if theirs.teacher_fingerprint != teacher.fingerprint:
        raise InputError(
            f"the trajectories were made by teacher {theirs.teacher_fingerprint[:12]}, but this is teacher "
            f"{teacher.fingerprint[:12]}; generate trajectories with this teacher"
        )
    if theirs.grid.num_steps != num_steps:
        raise InputError(f"the trajectories have {theirs.grid.num_steps} steps, but num_steps is {num_steps}")
    return store


def _lr_factor(step: int, max_steps: int, warmup_steps: int, schedule: str) -> float:
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return warmup * (0.5 * (1 + math.cos(math.pi * (step - 1) / max_steps)) if schedule == "cosine" else 1.0)
