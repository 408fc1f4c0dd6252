"""Logs of a run: one JSON object a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pyard.errors import InputError
from pyard.storage.files import write_text
from pyard.storage.numbers import number, whole_number
from pyard.storage.reading import as_object, parse_json, read_bytes


class TrainingLog:
    """`log.jsonl` of a run: one JSON object a logged step.

    Args:
        path: the file.
        resume_step: lines of later steps, written after the checkpoint that the run resumes from, are dropped.

    Attributes:
        seconds: of training that the lines kept say.
    """

    def __init__(self, path: Path, resume_step: int):
        kept = [line for line in read_log(path) if line["step"] <= resume_step]
        self.seconds = float(number(f"{path}: seconds", kept[-1].get("seconds", 0.0))) if kept else 0.0
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", buffering=1, encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append a line."""
        self._file.write(json.dumps(values) + "\n")

    def flush(self) -> None:
        """Make the lines so far durable: a checkpoint that survives a power cut must not have lost its log."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, its lines durable."""
        self.flush()
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`; a last line that was cut off by a kill is left out."""
    lines = []
    # A loss that is no number any more is written as NaN.
    content = read_bytes(path, None).split(b"\n") if path.exists() else []
    for place, line in enumerate(content, start=1):
        where = f"{path}, line {place}"
        try:
            value = parse_json(line, where, finite=False)
        except InputError:
            break
        lines.append(as_object(value, where, "an object with a step and its logged values"))
        whole_number(f"{where}: step", lines[-1].get("step"), 0, 2**53)
    return lines
