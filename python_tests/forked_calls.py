"""Calls in forked processes of their own, with limits of time and memory, and what became of each of them."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")
_GIB = 2**30


@dataclass(frozen=True)
class Outcome:
    """What a call did.

    Args:
        status: exit status; negative: the signal that ended it.
        errors: what it wrote to stderr.
        cpu_seconds: that it computed.
        wall_seconds: that it took.
        grown_bytes: largest resident memory, less that of the process it was forked from.
    """

    status: int
    errors: str
    cpu_seconds: float
    wall_seconds: float
    grown_bytes: int


def forked(
    tasks: Sequence[_T], call: Callable[[_T], int | None], *, workers: int, seconds: int, gib: float
) -> Iterator[tuple[_T, Outcome]]:
    """Run `call` on each task in a process of its own, several at a time, and yield what became of them as they end.

    Args:
        tasks: what to call it with.
        call: returns an exit status.
        workers: processes at a time.
        seconds: of CPU time that a call may take; it may wait six times as long.
        gib: memory that a call may take, in GiB.
    """
    waiting, running = list(reversed(tasks)), {}
    before = _resident()
    while waiting or running:
        while waiting and len(running) < workers:
            task = waiting.pop()
            read, write = os.pipe()
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                os.close(read)
                _child(call, task, write, seconds, gib)
            os.close(write)
            running[pid] = (task, read, time.monotonic())
        pid, status, usage = _any_child(running, 6 * seconds)
        task, read, begun = running.pop(pid)
        with os.fdopen(read, "rb") as pipe:
            errors = pipe.read().decode(errors="replace")
        cpu, wall = usage.ru_utime + usage.ru_stime, time.monotonic() - begun
        yield task, Outcome(os.waitstatus_to_exitcode(status), errors, cpu, wall, usage.ru_maxrss * 1024 - before)


def _any_child(running: dict[int, Any], seconds: float) -> tuple[int, int, Any]:
    """The next of these processes that ends; those that take too long are killed."""
    while True:
        for pid, (_, _, begun) in running.items():
            found, status, usage = os.wait4(pid, os.WNOHANG)
            if found:
                return found, status, usage
            if time.monotonic() - begun > seconds:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _child(call: Callable[[Any], int | None], task: Any, errors: int, seconds: int, gib: float) -> None:
    """Never returns."""
    status = 70
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        size = int(_statm()[0]) * resource.getpagesize()
        # Threads of their own arenas take addresses and no memory; resident memory is measured beside.
        limit = size + int(2 * gib * _GIB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(errors, 2)
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace", write_through=True)
        try:
            status = call(task) or 0
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 1
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(status)


def _resident() -> int:
    return int(_statm()[1]) * resource.getpagesize()


def _statm() -> list[str]:
    return Path("/proc/self/statm").read_text().split()
