"""Commands as processes, forked from this one, which has imported torch already."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


class Running:
    """The processes of a command that runs in a folder.

    Args:
        lines: the words of each process.
        place: the folder it works in.
        ranks: whether they are the gloo processes of one run.
        largest_file: bytes that each may write into a file; None: any number.
        over: (folder, path): the processes find this folder at this path.
    """

    def __init__(
        self,
        lines: list[list[str]],
        place: Path,
        *,
        ranks: bool,
        largest_file: int | None = None,
        over: tuple[Path, Path] | None = None,
    ):
        # A pipe, since a limit on files would be one on what is said, too.
        self._said, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 2**20)
        os.set_blocking(self._said, False)
        self.ranks = ranks
        self.codes: dict[int, int] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = len(lines) if ranks else 1
        self.pids = []
        for rank, words in enumerate(lines):
            pid = os.fork()
            if not pid:
                _command(words, place, write, rank if ranks else 0, world, port, largest_file, over)
            self.pids.append(pid)
        os.close(write)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for all of them, or so long, or until something holds; whether all have ended."""
        deadline = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < deadline and not until():
            time.sleep(0.005)
            if self.ranks and self.status:  # as torchrun does: the others are told to end, and then made to
                self.wait_for_others()
        return self.ended()

    def wait_for_others(self) -> None:
        """End the ranks that one has left alone."""
        deadline = time.monotonic() + 2
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(0.005)
        self.send(signal.SIGKILL)

    def ended(self) -> bool:
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def send(self, number: int, rank: int | None = None) -> bool:
        """Send a signal to those that still run, or to one of them; whether there were any."""
        self.ended()
        left = [pid for i, pid in enumerate(self.pids) if pid not in self.codes and rank in (None, i)]
        for pid in left:
            os.kill(pid, number)
        return bool(left)

    def kill(self) -> None:
        """End all that is left and collect it."""
        self.send(signal.SIGKILL)
        self.wait(60)

    @property
    def status(self) -> int:
        """0 if all ended well, else the first other one."""
        return next((code for code in self.codes.values() if code), 0)

    def said(self) -> str:
        """What they wrote to their outputs."""
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._said, 2**16):
                parts.append(part)
        os.close(self._said)
        return b"".join(parts).decode(errors="replace")


def _command(
    words: list[str],
    place: Path,
    out: int,
    rank: int,
    world: int,
    port: int,
    largest_file: int | None,
    over: tuple[Path, Path] | None,
) -> None:
    """What a process does; it does not return."""
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2))
        faulthandler.disable()  # a test runner's
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if over is not None:
            _mount_over(*over)
        os.chdir(place)
        os.environ["PYARD_CACHE"] = str(place / "cache")
        if world > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
            )  # fmt: skip
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        from pyard.cli.command_line import main

        code = main(words)
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else 0 if asked.code is None else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os._exit(code)


def _mount_over(folder: Path, path: Path) -> None:
    """Let this process alone find `folder` at `path`: mount(2), unshare(2)."""
    new_namespace, bind, recursive, private = 0x20000, 4096, 16384, 1 << 18
    libc = ctypes.CDLL(None, use_errno=True)
    calls = (
        lambda: libc.unshare(new_namespace),
        lambda: libc.mount(b"none", b"/", None, recursive | private, None),
        lambda: libc.mount(os.fsencode(folder), os.fsencode(path), None, bind, None),
    )
    for call in calls:
        if call():
            raise OSError(ctypes.get_errno(), f"{folder} cannot be mounted over {path}")
