"""Runs programs with time limits, several beside one another, and writes down at once how each ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.sections import POISONED, SECTIONS

START_S = 60.0  # of a worker, before its first section
GRACE_S = 15.0  # after a section's limit, for its last row: starting a worker anew takes about as long
RESERVE_S = 3.0  # before the end of the call, at which the worker is to have ended by itself
LOG_LINES = 15  # of a step that did not end well, in the results


@dataclass
class Call:
    """One command on the machine: its steps, and where everything is.

    Args:
        parts: folder of logs and of what the sections measured.
        end_s: of `time.monotonic`, when the last step must have ended.
        publish: writes the results so far; called whenever there are more.
    """

    parts: Path
    end_s: float
    publish: Callable[[Call], None]
    background: dict[str, tuple[float, Program]] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    ended_seen: int = 0  # lines of `ended.jsonl`, which workers add to

    def left_s(self) -> float:
        """Until the last step must have ended."""
        return self.end_s - time.monotonic()

    def note(self, step: str, seconds: float, result: str, log: Path | None = None) -> None:
        """Writes down how a step ended, with the end of its log if not well."""
        row: dict[str, Any] = {"step": step, "seconds": round(seconds, 1), "result": result}
        if result != "ok" and log is not None and log.exists():
            row["log"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        self.steps.append(row)
        print(f"== {step}: {result}, {seconds:.0f} s", flush=True)
        self.publish(self)

    def log(self, step: str) -> Path:
        """The log of a step."""
        return self.parts / f"{step.replace(' ', '_')}.log"

    def start(self, name: str, limit_s: float, command: list[str]) -> None:
        """Starts a program that `finish` waits for."""
        self.background[name] = limit_s, Program(command, self.log(name))

    def finish(self, name: str) -> bool:
        """Waits for the end of a program, or its limit; whether it ended well."""
        limit_s, program = self.background.pop(name)
        return self._wait({name: (limit_s, program)})[name]

    def run(self, name: str, limit_s: float, command: list[str]) -> bool:
        """Runs one program; whether it ended well."""
        return self.run_together({name: (limit_s, command)})[name]

    def run_together(self, programs: dict[str, tuple[float, list[str]]]) -> dict[str, bool]:
        """Runs programs beside one another, each within its limit; returns which ended well."""
        return self._wait({name: (limit_s, Program(command, self.log(name))) for name, (limit_s, command) in programs.items()})

    def stop(self) -> None:
        """Ends what still runs in the background."""
        for _, program in self.background.values():
            program.end()

    def _wait(self, running: dict[str, tuple[float, Program]]) -> dict[str, bool]:
        ended: dict[str, bool] = {}
        try:
            while running:
                for name, (limit_s, program) in list(running.items()):
                    code = program.poll()
                    if code is None and program.seconds() < limit_s and self.left_s() > 0:
                        continue
                    program.end()
                    result = "ok" if code == 0 else f"failed ({code})" if code is not None else f"no end within {limit_s:.0f} s"
                    ended[name] = code == 0
                    del running[name]
                    self.note(name, program.seconds(), result, program.log)
                time.sleep(0.1)
        finally:
            for _, program in running.values():
                program.end()
        return ended

    def run_sections(self, sections: list[str], device: str, smoke: bool) -> None:
        """Runs sections in a worker, and in another where one is lost on the way."""
        remaining, attempt = list(sections), 0
        while remaining and self.left_s() > RESERVE_S:
            attempt += 1
            stopped, reason = self._run_worker(remaining, device, smoke, attempt)
            if stopped is None:
                return
            index = remaining.index(stopped)
            # The row that broke the device is written down, so its section goes on behind it; a section that hung is given up.
            remaining = remaining[index:] if reason == "poisoned" and attempt < 8 else remaining[index + 1 :]
        for name in remaining:
            self.note(name, 0, "left out: no time")

    def _run_worker(self, sections: list[str], device: str, smoke: bool, attempt: int) -> tuple[str | None, str]:
        """The section at which the worker was lost, and why; None if it ended."""
        current, ended = self.parts / "current.json", self.parts / "ended.jsonl"
        current.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu.worker", *sections, "--parts", str(self.parts), "--device", device]
        command += ["--seconds", str(self.left_s() - RESERVE_S), *(["--smoke"] if smoke else [])]
        program = Program(command, self.log(f"worker_{attempt}"))
        try:
            while True:
                code = program.poll()
                self._note_ended(ended)
                self.publish(self)
                at = json.loads(current.read_text(encoding="utf-8")) if current.exists() else None
                if code == 0:
                    return None, ""
                name = sections[0] if at is None else at["section"]
                seconds = program.seconds() if at is None else time.time() - at["since_s"]
                limit_s = START_S if at is None else SECTIONS[name].limit_s
                if code is not None:
                    reason = "poisoned" if code == POISONED else f"failed ({code})"
                    self.note(
                        name, seconds, "a row broke the device; the rest goes on" if code == POISONED else reason, program.log
                    )
                    return name, reason
                if seconds > limit_s + GRACE_S or self.left_s() <= 0:
                    program.end()
                    self.note(name, seconds, f"no end within {min(limit_s, seconds):.0f} s", program.log)
                    return name, "hung"
                time.sleep(0.2)
        finally:
            program.end()

    def _note_ended(self, ended: Path) -> None:
        lines = ended.read_text(encoding="utf-8").splitlines() if ended.exists() else []
        for line in lines[self.ended_seen :]:
            row = json.loads(line)
            self.note(row["step"], row["seconds"], row["result"])
        self.ended_seen = len(lines)


class Program:
    """A process and all that it starts, its output in a log."""

    def __init__(self, command: list[str], log: Path):
        self.log, self._start_s = log, time.monotonic()
        self._ended_s: float | None = None
        with log.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, process_group=0)

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        code = self._process.poll()
        if code is not None and self._ended_s is None:
            self._ended_s = time.monotonic()
        return code

    def seconds(self) -> float:
        """That it ran so far."""
        return (self._ended_s or time.monotonic()) - self._start_s

    def end(self) -> None:
        """Ends it with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.poll()
