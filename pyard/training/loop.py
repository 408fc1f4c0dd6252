"""The training loop that every stage shares: batches, skipped updates, log, checkpoints, signals, progress."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from pyard.cost.devices import peak_tflops
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.storage.checkpoints import Checkpoints
from pyard.storage.freed_memory import keep_freed_memory
from pyard.storage.log import TrainingLog
from pyard.training.config import TrainConfig
from pyard.training.processes import Preempted, Processes, memory_advice, preemption, seed_of
from pyard.training.regression import Measured, Stage
from pyard.trajectories.buckets import BatchReader

# Without a progress bar, a line at least this often.
SILENCE_SECONDS = 60.0

Watch = Callable[[int, Measured], None]


def train_stage(
    stage: Stage,
    student: Student,
    reader: BatchReader,
    config: TrainConfig,
    processes: Processes,
    watch: Watch,
    *,
    checkpoints: Checkpoints,
    begin: int,
    flush: Callable[[], None] = lambda: None,
) -> None:
    """Update until `max_steps` are done, from a checkpoint on.

    Args:
        stage: what an update computes.
        student: who learns; for messages and checkpoints.
        reader: this process's batches.
        config: settings.
        processes: who trains.
        watch: called after each update, on every process.
        checkpoints: the run's.
        begin: the step to go on from, 0 at the start; see `step_to_resume`.
        flush: called before each checkpoint, for files that grow beside it.

    Raises:
        InputError: updates that are not finite, out of memory, a checkpoint that cannot be read or written.
        Preempted: SIGTERM, SIGUSR1 or SIGINT arrived; a checkpoint has been written.
        KeyboardInterrupt: SIGINT arrived twice.
    """
    skipped = in_a_row = 0
    if processes.device.type == "cpu":
        keep_freed_memory()
    if begin:
        state = checkpoints.load(begin, stage.parts)
        reader.load_state_dict(state["reader"])
        skipped, in_a_row = state["skipped"], state["in_a_row"]
    with processes.main_first():
        if processes.is_main:
            checkpoints.require_room(stage.parts, -(-(config.max_steps - begin) // config.save_every))
    log = TrainingLog(config.out / "log.jsonl", begin) if processes.is_main else None
    meter = Meter(config, stage.flops, processes)
    advice = memory_advice(
        reader.batch_size // config.gradient_accumulation,
        student.num_steps,
        max(student.trunk.tokens_per_step(shape) for shape in student.sample_shapes),
        None if config.stage == "adversarial" else config.gradient_accumulation,
        config.steps_per_update,
    )

    def save(step: int) -> None:
        # What a checkpoint's run has written beside it must survive a power cut if the checkpoint does.
        if log is not None:
            log.flush()
        flush()
        counts = {"skipped": skipped, "in_a_row": in_a_row}
        state: dict[str, Any] = {
            **counts,
            "reader": reader.state_dict(),
            "student": student.config.to_json(),
            "lora_rank": None if student.lora is None else student.lora.rank,
            "lora_heads": None if student.lora is None else student.lora.heads,
        }
        if processes.sharded:
            checkpoints.save(step, stage.parts, state)
            return
        with processes.main_first():
            if processes.is_main:
                checkpoints.save(step, stage.parts, state)

    with (
        tqdm(
            total=config.max_steps, initial=begin, desc=f"training {config.out.name}", unit="step",
            disable=not (config.progress and processes.is_main),
        ) as bar,
        preemption() as asked,
        advice,
    ):  # fmt: skip
        if asked.status and begin < config.max_steps:
            raise Preempted(begin or None, asked.status)  # heard before the first update: what is there is all there is to save
        for step in range(begin + 1, config.max_steps + 1):
            # Whatever draws from torch's generators, dropout say, draws the same after a resume.
            torch.manual_seed(seed_of(config.seed, step, processes.rank))
            measured = stage.compute(step, next(reader))
            learning_rate = stage.learning_rate  # of this update: `apply` moves on to the next one's
            if measured.finite():
                stage.apply()
                in_a_row = 0
            else:
                stage.skip()
                skipped, in_a_row = skipped + 1, in_a_row + 1
                if processes.is_main:
                    bar.write(
                        f"step {step}: loss {measured.loss:g}, gradient norm {measured.grad_norm:g}: skipped "
                        f"({in_a_row} in a row, {skipped} in all)",
                        file=sys.stderr,
                    )
            meter.count()
            last = step == config.max_steps
            if (step % config.log_every == 0 or last) and in_a_row == 0:
                speed = meter.speed()
                measured.more["learning_rate"] = torch.tensor(learning_rate, dtype=torch.float64)
                measured.more["samples_per_second"] = torch.tensor(speed.samples)
                if log is not None:
                    log.write(
                        step=step,
                        loss=float(measured.loss),
                        # A step that an update left out has no loss, and JSON no NaN.
                        loss_per_step=[loss if math.isfinite(loss) else None for loss in measured.per_step.tolist()],
                        grad_norm=float(measured.grad_norm),
                        **{name: float(value) for name, value in measured.more.items()},
                        **({"skipped": skipped} if skipped else {}),
                        seconds=round(log.seconds + meter.elapsed(), 3),
                    )
                bar.set_postfix(loss=f"{float(measured.loss):.4f}", **speed.words(), refresh=False)
                if processes.is_main and not config.progress and (last or meter.is_time_to_speak()):
                    words = ", ".join(f"{value} {name}" for name, value in speed.words().items())
                    print(f"step {step} of {config.max_steps}: loss {float(measured.loss):.4f}, {words}", file=sys.stderr)
            watch(step, measured)
            bar.update()
            if in_a_row >= config.max_skipped_in_a_row:
                steps = checkpoints.steps()
                raise InputError(
                    f"{in_a_row} updates in a row, up to step {step}, had a loss or gradient that is not finite; lower "
                    f"--learning_rate (now {config.learning_rate:g}) or --grad_clip, or use bf16 in place of fp16; "
                    + (f"the checkpoint of step {steps[-1]} is intact" if steps else "no checkpoint had been written yet")
                )
            status = int(processes.largest(float(asked.status))[0])
            stop = status > 0
            if step % config.save_every == 0 or last or stop:
                save(step)
            if stop and not last:
                if processes.is_main:
                    bar.write(f"stopping: checkpoint of step {step} written; the same command resumes", file=sys.stderr)
                raise Preempted(step, status)
    if log is not None:
        log.close()


def checkpoints_of(student: Student, config: TrainConfig, processes: Processes) -> Checkpoints:
    """The checkpoints of a run, in shards where its weights are."""
    path = config.out / "checkpoints"
    if not processes.sharded:
        return Checkpoints(path, config.keep_last, config.keep_every)
    from pyard.training.sharded import ShardedCheckpoints

    return ShardedCheckpoints(path, config.keep_last, config.keep_every, student, processes)


def step_to_resume(checkpoints: Checkpoints, processes: Processes) -> int:
    """The step of the newest checkpoint that is whole, 0 if there is none; the same on all processes.

    Raises:
        InputError: all checkpoints are damaged.
    """
    begin = 0
    with processes.main_first():
        if processes.is_main:
            checkpoints.drop_unfinished()
            begin = checkpoints.newest()
    return int(processes.largest(float(begin))[0])


@dataclass(frozen=True)
class Speed:
    """How fast the last updates were.

    Args:
        samples: a second, all processes together.
        tflops: TFLOP/s of a device.
        peak: its data sheet's; None: unknown.
    """

    samples: float
    tflops: float
    peak: float | None

    def words(self) -> dict[str, str]:
        """samples/s, and MFU, or TFLOP/s of a device without a known peak."""
        use = {"MFU": f"{100 * self.tflops / self.peak:.1f}%"} if self.peak else {"TFLOP/s": f"{self.tflops:.3g}"}
        return {"samples/s": f"{self.samples:.{0 if self.samples >= 100 else 2}f}", **use}


class Meter:
    """How fast training is: samples a second, and the share of the device's peak that the model's own FLOPs make up.

    Args:
        config: settings; `peak_tflops` overrides the data sheet.
        flops: of an update, all processes together.
        processes: who shares the work.
    """

    def __init__(self, config: TrainConfig, flops: float, processes: Processes):
        name = torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else "cpu"
        self._peak = config.peak_tflops or peak_tflops(name, config.mixed_precision)
        self._flops = flops / processes.world
        self._batch_size = config.batch_size
        self._since, self._updates = time.perf_counter(), 0
        self._begun, self._spoke = self._since, -math.inf

    def elapsed(self) -> float:
        """Seconds since training began in this process."""
        return time.perf_counter() - self._begun

    def is_time_to_speak(self) -> bool:
        """Whether a run without a progress bar has been silent for a while."""
        now = time.perf_counter()
        if now - self._spoke < SILENCE_SECONDS:
            return False
        self._spoke = now
        return True

    def count(self) -> None:
        """An update is done."""
        self._updates += 1

    def rates(self) -> dict[str, str]:
        """`speed` in words."""
        return self.speed().words()

    def speed(self) -> Speed:
        """The speed since it was last asked for."""
        now = time.perf_counter()
        rate = self._updates / max(now - self._since, 1e-9)
        self._since, self._updates = now, 0
        return Speed(rate * self._batch_size, rate * self._flops / 1e12, self._peak)
