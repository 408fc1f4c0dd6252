"""A trial: a command is started, disturbed in one way, given again, and its result compared with an undisturbed run."""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.crash.commands import Command
from benchmarks.crash.digest import difference, digest
from benchmarks.crash.failing_disk import FailingDisk
from benchmarks.crash.places import Image, enlarge, small_disk
from benchmarks.crash.process import Running

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
POWER = {"power cut, ext4": "ext4", "power cut, xfs": "xfs"}
LIMIT, SMALL, UNREADABLE = "full disk, file limit", "full disk, small disk", "read error"
TOGETHER, LATER = "two at once", "a second one"
WAYS = (*SIGNALS, *POWER, LIMIT, SMALL, UNREADABLE, TOGETHER, LATER)
DISKS = {**POWER, UNREADABLE: "btrfs"}  # the file systems that are mounted from an image
_PATIENCE = 600.0  # seconds


@dataclass(frozen=True)
class Undisturbed:
    """What a command leaves when nothing happens to it.

    Args:
        digest: hashes by path.
        seconds: it took.
        first: seconds until it had written the first of its files.
        sizes: of the files.
    """

    digest: dict[str, str]
    seconds: float
    first: float
    sizes: tuple[int, ...]


class TrialError(Exception):
    """A trial that was not recovered: (lost or wrong, why)."""


def undisturbed(command: Command, inputs: Path, work: Path) -> Undisturbed:
    """Run a command once and leave it alone.

    Raises:
        RuntimeError: it fails by itself.
    """
    with _folder(work) as place:
        _prepare(command, inputs, place)
        started, clock = time.monotonic(), time.time()
        running = _start(command, inputs, place)
        if not running.wait(_PATIENCE) or running.status:
            running.kill()
            raise RuntimeError(f"{command.name}: ends with status {running.status} undisturbed: {running.said()[-2000:]}")
        seconds = time.monotonic() - started
        running.said()
        files = [file.stat() for file in place.rglob("*") if file.is_file()]
        first = min((file.st_mtime - clock for file in files if file.st_mtime > clock), default=seconds)
        return Undisturbed(digest(place), seconds, first, tuple(sorted({file.st_size for file in files})))


def run_trial(command: Command, way: str, seed: int, wanted: Undisturbed, inputs: Path, work: Path) -> tuple[str, str]:
    """One trial.

    Returns:
        `recovered`, `lost` (the command refuses to go on, or what it had finished is gone) or `wrong` (other bytes, a traceback
        in place of a line, a status that says something else), and why.
    """
    draw = random.Random(seed)
    try:
        if way in SIGNALS:
            _signalled(command, way, draw, wanted, inputs, work)
        elif way in POWER:
            _power_cut(command, POWER[way], draw, wanted, inputs, work)
        elif way in (LIMIT, SMALL):
            _full(command, way, draw, wanted, inputs, work)
        elif way == UNREADABLE:
            _unreadable(command, draw, wanted, inputs, work)
        else:
            _second(command, draw.uniform(0, wanted.seconds) if way == LATER else 0.0, wanted, inputs, work)
    except TrialError as failed:
        outcome, why = failed.args
        return outcome, why
    return "recovered", ""


def _signalled(command: Command, way: str, draw: random.Random, wanted: Undisturbed, inputs: Path, work: Path) -> None:
    with _folder(work) as place:
        _prepare(command, inputs, place)
        running = _start(command, inputs, place)
        _wait_at_random(running, place, draw, wanted)
        one = draw.randrange(command.ranks) if command.ranks > 1 and draw.random() < 0.5 else None
        sent = running.send(SIGNALS[way], one)
        if not running.wait(60):
            running.kill()
            raise TrialError("wrong", f"{way} was ignored: {running.said()[-300:]}")
        said = running.said()
        if way != "SIGKILL" and command.ranks == 1 and "Traceback" in said:
            raise TrialError("wrong", f"a traceback: {said[-300:]}")
        if not running.status:
            _compare(place, wanted, "wrong" if sent else "lost", "it ended with status 0")
        _go_on(command, inputs, place, wanted)


def _power_cut(command: Command, kind: str, draw: random.Random, wanted: Undisturbed, inputs: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    image = Image(kind, work)
    try:
        place = image.place / "place"
        place.mkdir()
        _prepare(command, inputs, place)
        _flush(image.place)
        running = _start(command, inputs, place)
        ended = _wait_at_random(running, place, draw, wanted)
        running.send(signal.SIGSTOP)
        time.sleep(0.05)  # a system call that has begun ends first
        after = image.cut_power() / "place"
        running.kill()
        running.said()
        if ended and not running.status:
            _compare(after, wanted, "lost", "it had ended with status 0")
        _go_on(command, inputs, after, wanted)
    finally:
        image.close()
        shutil.rmtree(work, ignore_errors=True)


def _full(command: Command, way: str, draw: random.Random, wanted: Undisturbed, inputs: Path, work: Path) -> None:
    with contextlib.ExitStack() as stack:
        if way == SMALL:
            shutil.rmtree(work, ignore_errors=True)
            place = work / "place"
            before = _bytes_before(command, inputs, work / "before")
            size = before + int(draw.uniform(0.05, 1.0) * max(sum(wanted.sizes) - before, 2**14)) + 2**14
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            stack.enter_context(small_disk(place, size))
            limit = None
        else:
            place = stack.enter_context(_folder(work))
            limit = draw.choice(wanted.sizes) - 1
        _prepare(command, inputs, place)
        running = _start(command, inputs, place, largest_file=None if limit is None else max(limit, 0))
        if not running.wait(_PATIENCE):
            running.kill()
            raise TrialError("wrong", f"it does not end: {running.said()[-300:]}")
        said = running.said()
        if way == SMALL:
            enlarge(place)
        if not running.status:
            _compare(place, wanted, "wrong", "it ended with status 0")
        else:
            _require_a_line(running, said)
        _go_on(command, inputs, place, wanted)


def _unreadable(command: Command, draw: random.Random, wanted: Undisturbed, inputs: Path, work: Path) -> None:
    with _failing_disk(command, inputs, work) as disk:
        disk.spoil(draw.choice(_files_read(command, inputs, work.with_name(f"{work.name}-read"))), draw.randrange(2**20))
        running = _start(command, inputs, disk.work, over=(disk.inputs, inputs))
        if not running.wait(_PATIENCE):
            running.kill()
            raise TrialError("wrong", f"it does not end: {running.said()[-300:]}")
        said = running.said()
        disk.mend()  # what was moved without being read, too
        if not running.status:
            _compare(disk.work, wanted, "wrong", "it ended with status 0")
        else:
            _require_a_line(running, said)
        _go_on(command, inputs, disk.work, wanted)


@functools.cache
def _files_read(command: Command, inputs: Path, work: Path) -> list[str]:
    """The files that a command reads, as paths on a `FailingDisk`."""
    with _failing_disk(command, inputs, work) as disk:
        before = disk.files()
        running = _start(command, inputs, disk.work, over=(disk.inputs, inputs))
        if not running.wait(_PATIENCE) or running.status:
            running.kill()
            raise RuntimeError(f"{command.name}: ends with status {running.status} on btrfs: {running.said()[-2000:]}")
        running.said()
        after = disk.files()
        return [name for name, read in before.items() if after.get(name) != read]


@contextlib.contextmanager
def _failing_disk(command: Command, inputs: Path, work: Path) -> Iterator[FailingDisk]:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    disk = FailingDisk(inputs, work)
    try:
        _prepare(command, inputs, disk.work)
        yield disk
    finally:
        disk.close()
        shutil.rmtree(work, ignore_errors=True)


def _second(command: Command, later: float, wanted: Undisturbed, inputs: Path, work: Path) -> None:
    with _folder(work) as place:
        _prepare(command, inputs, place)
        both = [_start(command, inputs, place)]
        both[0].wait(later)
        both.append(_start(command, inputs, place))
        try:
            for running in both:
                if not running.wait(_PATIENCE):
                    raise TrialError("wrong", f"it does not end: {running.said()[-300:]}")
        finally:
            for running in both:
                running.kill()
        for running in both:
            said = running.said()
            if running.status:
                _require_a_line(running, said)
        # Of several writers, the first may get one part and the second another.
        if not all(any(not running.codes[running.pids[i]] for running in both) for i in range(len(both[0].pids))):
            raise TrialError("wrong", "both were refused")
        _compare(place, wanted, "wrong", "one ended with status 0")


def _go_on(command: Command, inputs: Path, place: Path, wanted: Undisturbed) -> None:
    """Give the command again and compare."""
    running = _start(command, inputs, place)
    ended = running.wait(_PATIENCE)
    running.kill()
    said = running.said()
    if not ended or running.status:
        raise TrialError("lost", f"it does not go on (status {running.status}): {said[-400:]}")
    _compare(place, wanted, "wrong", "given again")


def _require_a_line(running: Running, said: str) -> None:
    if "Traceback" in said or "error: " not in said:
        raise TrialError("wrong", f"no line of error, status {running.status}: {said[-400:]}")


def _wait_at_random(running: Running, place: Path, draw: random.Random, wanted: Undisturbed) -> bool:
    """Wait for a random moment; whether the command has ended. Half of all moments follow its first write, since some commands
    compute for long before it."""
    if draw.random() < 0.5:
        return running.wait(draw.uniform(0, 1.1 * wanted.seconds))
    before = set(place.rglob("*"))
    running.wait(2 * wanted.seconds, until=lambda: set(place.rglob("*")) != before)
    return running.wait(draw.uniform(0, 1.1 * max(wanted.seconds - wanted.first, 0.05)))


def _compare(place: Path, wanted: Undisturbed, outcome: str, when: str) -> None:
    found = difference(digest(place), wanted.digest)
    if found:
        raise TrialError(outcome, f"{when}: {found}")


def _start(
    command: Command, inputs: Path, place: Path, *, largest_file: int | None = None, over: tuple[Path, Path] | None = None
) -> Running:
    lines = command.arguments(inputs)
    return Running(lines, place, ranks=command.ranks > 1, largest_file=largest_file, over=over)


def _prepare(command: Command, inputs: Path, place: Path) -> None:
    if command.before is not None:
        command.before(inputs, place)


def _bytes_before(command: Command, inputs: Path, folder: Path) -> int:
    folder.mkdir(parents=True)
    _prepare(command, inputs, folder)
    return sum(-(-file.stat().st_size // 4096) * 4096 + 4096 for file in folder.rglob("*"))


def _flush(folder: Path) -> None:
    subprocess.run(["sync", "-f", folder], check=True)


@contextlib.contextmanager
def _folder(work: Path) -> Iterator[Path]:
    shutil.rmtree(work, ignore_errors=True)
    place = work / "place"
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(work, ignore_errors=True)
