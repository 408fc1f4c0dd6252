"""The processes of a run: who they are, how they agree, and how signals and errors reach all of them.

Accelerate finds and joins them (one process, `torchrun`, `accelerate launch`). Autocast, loss scaling and DDP are torch's own:
an `Accelerator` fixes the precision once for a whole Python process, in which `train` may be called twice.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pyard.errors import InputError

# sysexits.h: EX_TEMPFAIL, "the user is invited to retry".
PREEMPTED_STATUS = 75
# As shells report a process that SIGINT ended.
INTERRUPTED_STATUS = 130
PREEMPTING = (signal.SIGTERM, signal.SIGUSR1)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Preempted(SystemExit):
    """A signal asked a run to end; what it had done is saved, and the process ends with status 75, or 130 after Ctrl-C.

    Args:
        step: of the checkpoint that was written; None: training had not begun.
        status: of the process.
    """

    def __init__(self, step: int | None, status: int = PREEMPTED_STATUS):
        super().__init__(status)
        self.step = step


class Processes:
    """The processes that train together.

    Args:
        mixed_precision: no | bf16 | fp16.
        parallel: `ddp`, or `fsdp` on several processes.
        is_finished: whether nothing is left to train, which one process can read whatever it was trained by.

    Attributes:
        reopens: whether this one process cannot train and is there to read a result.
    """

    def __init__(self, mixed_precision: str = "no", parallel: str = "ddp", *, is_finished: bool = False):
        from accelerate import PartialState

        # Without `cpu`, Accelerate runs processes without a GPU side by side, each as if it were alone.
        state = PartialState(cpu=not torch.accelerator.is_available())
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if state.num_processes != launched:
            raise InputError(
                f"training: WORLD_SIZE says {launched} processes, but Accelerate joined {state.num_processes}; start them with "
                "torchrun or accelerate launch, before anything else in the process uses Accelerate"
            )
        self.rank: int = state.process_index
        self.world: int = state.num_processes
        self.is_main = self.rank == 0
        self.device: torch.device = state.device
        if mixed_precision == "fp16" and self.device.type == "cpu":
            raise InputError("training: mixed_precision 'fp16' needs a GPU; use 'bf16' or 'no'")
        self.reopens = parallel == "fsdp" and self.world == 1 and is_finished
        if parallel == "fsdp" and not self.reopens and (self.world == 1 or mixed_precision == "fp16"):
            raise InputError(
                f"training: parallel 'fsdp' on {_count(self.world)} in {mixed_precision}; expected several processes "
                "(torchrun --nproc-per-node 8 -m pyard train ...; on one GPU, give parallel='ddp'), and 'bf16' or 'no', since "
                "the loss scaling of fp16 does not support shards. `pyard consolidate` converts a checkpoint of an unfinished "
                "run into a student"
            )
        self.sharded = parallel == "fsdp" and not self.reopens
        self._dtype = _DTYPES.get(mixed_precision)
        # Rank 0 may compute trajectories for hours; in training, a wait that long is a hang that has to be noticed.
        self._patient = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if self.world > 1 else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=mixed_precision == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision for a forward pass."""
        return nullcontext() if self._dtype is None else torch.autocast(self.device.type, self._dtype)

    def data_parallel(self, module: torch.nn.Module, unread: Sequence[str] = ()) -> torch.nn.Module:
        """The module, whose gradients are averaged over the processes in its backward pass.

        Args:
            module: the same on all of them.
            unread: names of its parameters that get no gradient, which would be waited for.
        """
        if self.world == 1 or self.sharded:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        if unread:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(unread))
        # The only buffers are constants.
        return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over the processes, on all of them."""
        if self.world == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.world

    def largest(self, *values: float) -> list[float]:
        """The largest of each number over the processes, on all of them."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def wait(self, *, patiently: bool = False) -> None:
        """Wait for all processes; patiently, where they may be hours apart."""
        if self.world > 1:
            dist.barrier(group=self._patient if patiently else None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block alone, then the others do; an error of rank 0 is an error of all.

        Raises:
            InputError: on the others, what rank 0 says.
        """
        if self.world == 1:
            yield
            return
        error: list[str | None] = [None]
        if self.is_main:
            try:
                yield
            except BaseException as raised:
                error = [f"rank 0: {raised}"]
                dist.broadcast_object_list(error, src=0, group=self._patient)
                raise
            dist.broadcast_object_list(error, src=0, group=self._patient)
        else:
            dist.broadcast_object_list(error, src=0, group=self._patient)
            if error[0] is not None:
                raise InputError(error[0])
            yield


def seed_of(*numbers: int) -> int:
    """A seed for torch that is a function of all the numbers: what is drawn then depends on no earlier draw."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "little")


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class Asked:
    """Whether a signal asked the run to end, and with which status.

    Attributes:
        status: 0: nothing was asked.
    """

    status = 0

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; a second Ctrl-C ends the run at once.

        Raises:
            KeyboardInterrupt: it is the second one.
        """
        if number == signal.SIGINT:
            if self.status == INTERRUPTED_STATUS:
                raise KeyboardInterrupt
            print(
                "\ninterrupted: writing a checkpoint after this update; Ctrl-C again ends at once", file=sys.stderr, flush=True
            )
            self.status = INTERRUPTED_STATUS
        elif not self.status:
            self.status = PREEMPTED_STATUS

    def end(self, number: int, frame: FrameType | None) -> None:
        """Note a signal and end at once.

        It is noted because the exception can be lost: Python drops one that is raised in a destructor or a callback, and other
        libraries catch them while they are imported. `preemption` asks again before the first update.
        """
        if number == signal.SIGINT:
            self.status = INTERRUPTED_STATUS
            raise KeyboardInterrupt
        self.status = PREEMPTED_STATUS
        raise Preempted(None)


@contextmanager
def preemption() -> Iterator[Asked]:
    """Notes SIGTERM, SIGUSR1 and SIGINT while the block runs; nothing where Python forbids handlers (threads)."""
    asked = Asked()
    with _handling(asked.hear) as earlier:
        for handler in earlier:
            asked.status = asked.status or getattr(getattr(handler, "__self__", None), "status", 0)
        yield asked


@contextmanager
def ends_at_once() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise `Preempted`, Ctrl-C KeyboardInterrupt: for work whose files survive a kill at any moment.

    Whatever rank they reach ends alone; launchers then end the others, and clusters signal all.
    """
    with _handling(Asked().end):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[list[Any]]:
    """Handle the signals that end a run; yields who handled them before."""
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    earlier = {number: signal.signal(number, handler) for number in (*PREEMPTING, signal.SIGINT)}
    try:
        yield list(earlier.values())
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


@contextmanager
def memory_advice(
    batch: int, num_steps: int, tokens: int, gradient_accumulation: int | None, steps_per_update: int | None = None
) -> Iterator[None]:
    """Turn running out of memory into an InputError that says what to lower.

    Args:
        batch: samples of a micro-batch of this process.
        num_steps: S.
        tokens: T, tokens a step.
        gradient_accumulation: as it is now; None where there is none, in the adversarial stage.
        steps_per_update: as it is now.
    """
    try:
        yield
    except RuntimeError as error:
        # The CPU's allocator raises a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        smaller = (
            "more processes, or a smaller --batch_size"
            if gradient_accumulation is None
            else f"--gradient_accumulation (now {gradient_accumulation}; twice that halves the micro-batch)"
        )
        helping = f"two settings help: {smaller}, and --activation_checkpointing true"
        if gradient_accumulation is not None and num_steps > 1:
            learnt = f"--steps_per_update (now {steps_per_update or num_steps}), whose gradients are noisier"
            helping = f"three settings help: {smaller}, --activation_checkpointing true, and {learnt}"
        raise InputError(
            f"out of memory with a micro-batch of {batch} samples per process, S = {num_steps} steps and T = {tokens} tokens "
            f"per step; {helping}. ({str(error).splitlines()[0]})"
        ) from error


def _count(processes: int) -> str:
    return "one process" if processes == 1 else f"{processes} processes"
