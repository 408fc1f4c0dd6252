"""Training runs in processes of their own, which tests kill: forked from a server that has imported torch already."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_teacher
from safetensors.torch import load_file, save_file

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.storage.checkpoints import Checkpoints
from pyard.storage.log import read_log
from pyard.training import train
from pyard.trajectories import generate_trajectories

SETTINGS: dict[str, Any] = dict(
    num_steps=3, history_layers=2, max_steps=12, batch_size=8, learning_rate=3e-3, save_every=4, log_every=1, progress=False
)
CONTEXT = multiprocessing.get_context("forkserver")
# pyard itself is imported by each process: the server may find another copy.
CONTEXT.set_forkserver_preload(["torch.distributed", "diffusers.optimization", "accelerate", "safetensors.torch"])


def teacher_and_store(folder: Path, count: int = 40) -> None:
    """`teacher/` and `store/`, tiny; a flow, for the trajectories of a random eps-prediction explode."""
    teacher = tiny_teacher(NoiseSchedule(kind="flow", prediction="velocity"))
    teacher.save_pretrained(folder / "teacher")
    generate_trajectories(
        teacher, folder / "store", count, num_steps=3, teacher_steps=6, batch_size=20, shard_size=20, progress=False
    )


def student_and_real_data(folder: Path) -> dict[str, Any]:
    """`first/`, a student of a short regression stage, and `real.safetensors`; returns settings of an adversarial stage.

    They have several of everything that a checkpoint has to remember.
    """
    images = torch.randn(30, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    save_file({"images": images, "labels": torch.arange(30) % 5}, folder / "real.safetensors")
    train_in(folder, "first", max_steps=2, history_bias=-1.0)
    adversarial = dict(
        real=str(folder / "real.safetensors"),
        virtual_batch=4,
        width=8,
        warmup_steps=4,
        flips=True,
        r1=0.1,
        feature_matching=0.5,
    )
    return dict(stage="adversarial", student=str(folder / "first"), adversarial=adversarial, ema_decay=[0.9, 0.99])


def train_in(folder: Path, name: str, **changes: Any) -> Path:
    """A run `folder`/`name` in this process."""
    train(folder / "teacher", changes.pop("store", folder / "store"), out=folder / name, **{**SETTINGS, **changes})
    return folder / name


def child(rank: int, world: int, port: int, prepare: Callable[[], None] | None, folder: Path, name: str, changes: Any) -> None:
    """What a process of `start` does; an error is left in `folder`/`name`.error-`rank`."""
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR")
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    if prepare is not None:
        prepare()
    try:
        train_in(folder, name, **changes)
    except Exception as error:
        (folder / f"{name}.error-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise
    if world > 1:
        torch.distributed.destroy_process_group()


def start(
    folder: Path, name: str, world: int = 1, prepare: Callable[[], None] | None = None, **changes: Any
) -> list[ForkServerProcess]:
    """Start the run `folder`/`name` in `world` gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=child, args=(rank, world, port, prepare, folder, name, changes)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[ForkServerProcess], seconds: float = 300) -> list[int | None]:
    """Their exit codes."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        assert process.exitcode is not None, f"still running after {seconds} s"
    return [process.exitcode for process in processes]


def file_of(log: Path) -> int | None:
    """Which file a log is: a run that resumes begins another one of the same name."""
    return log.stat().st_ino if log.exists() else None


def signal_at(
    processes: list[ForkServerProcess],
    log: Path,
    step: int,
    number: int = signal.SIGKILL,
    *,
    before: int | None = None,
    pause: float = 0.0,
) -> int:
    """Send all of them a signal some time after they have logged a step.

    Args:
        processes: of a run.
        log: of the run.
        step: in the lines that these processes write.
        number: of the signal.
        before: `file_of` the log before they were started; its lines are of earlier processes.
        pause: seconds from the step to the signal.

    Returns:
        The last step logged before the signal, or -1 if the run had ended.
    """
    deadline = time.monotonic() + 300
    while all(process.is_alive() for process in processes):
        lines = read_log(log) if file_of(log) != before else []
        if lines and lines[-1]["step"] >= step:
            time.sleep(pause)
            for process in processes:
                assert process.pid is not None
                os.kill(process.pid, number)
            return read_log(log)[-1]["step"]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return -1


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir(parents=True)
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def kill_and_resume(folder: Path, world: int, kills: int, seed: int, settings: dict[str, Any]) -> list[dict[str, int]]:
    """Kill the run `killed` at random moments until it has been killed so often; then let it end.

    A moment is some time after a step that this life of the run has done, up to as long as an update and a checkpoint take: in
    an update, while a checkpoint is written, or while an old one is removed.
    """
    choose, done = random.Random(seed), []
    steps = settings["max_steps"]
    log = folder / "killed" / "log.jsonl"
    while len(done) < kills:
        before = max(Checkpoints(folder / "killed" / "checkpoints").steps(), default=0)
        assert before < steps - settings["save_every"], f"{len(done)} kills, nearly at the end: raise max_steps"
        last = file_of(log)
        processes = start(folder, "killed", world, **settings)
        at = choose.randint(before + 1, min(before + 2 * settings["save_every"], steps - 1))
        killed = signal_at(processes, log, at, before=last, pause=choose.random() * 0.05)
        codes = wait(processes)
        if set(codes) == {-signal.SIGKILL}:
            assert killed >= at > before
            done.append({"resumed_from": before, "killed_after_step": killed, "asked_step": at})
        else:
            assert set(codes) <= {0, -signal.SIGKILL}, codes  # it was faster
    assert set(wait(start(folder, "killed", world, **settings))) == {0}
    return done


def log_kills(title: str, seed: int, settings: dict[str, Any], kills: list[dict[str, int]]) -> None:
    """Append what was done, and survived, to the file that PYARD_KILL_LOG names."""
    if file := os.environ.get("PYARD_KILL_LOG"):
        lines = [f"{title}, seed {seed}, {settings['max_steps']} updates, a checkpoint every {settings['save_every']}"]
        lines += [f"kill {i}: {kill}" for i, kill in enumerate(kills, start=1)]
        lines += ["log, result and everything in the last checkpoint are bitwise those of a run that was not killed", ""]
        with open(file, "a") as out:
            out.write("\n".join(lines))


def numbers(log: Path) -> list[dict[str, Any]]:
    """The lines of a log without what the clock says."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "samples_per_second")} for line in read_log(log)]


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without the hashes of shards, whose list names processes' memory."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    state["files"] = {name: found for name, found in state["files"].items() if not name.startswith("shards/")}
    state.pop("sha256")
    return state


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: log, result, and everything in the last checkpoints; neither left anything unfinished behind."""
    assert numbers(a / "log.jsonl") == numbers(b / "log.jsonl")
    assert not [entry.name for run in (a, b) for entry in (run / "checkpoints").iterdir() if not entry.name.startswith("step-")]
    newest = [max((run / "checkpoints").glob("step-*")) for run in (a, b)]
    assert newest[0].name == newest[1].name
    assert state_of(newest[0]) == state_of(newest[1])
    names = sorted(path.name for path in newest[0].iterdir())
    assert names == sorted(path.name for path in newest[1].iterdir())
    files = [f"checkpoints/{newest[0].name}/{name}" for name in names if name.endswith(".safetensors")]
    for file in [*files, "student/model.safetensors"]:
        ours, theirs = (load_file(run / file) for run in (a, b))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), file
    for name in (name for name in names if name.endswith(".pt")):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in newest)
        for x, y in zip(torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name
