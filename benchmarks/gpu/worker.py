"""Runs sections one after another in one process, which imports torch and opens the device once.

It says in `current.json`, in the folder of the parts, which section it is at. Its parent ends one that does not end by itself
and starts another worker for the rest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.gpu.measure import Results, Setting
from benchmarks.gpu.sections import SECTIONS, part_path


def main() -> None:
    """Runs the sections that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="+", choices=list(SECTIONS))
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seconds", type=float, required=True, help="time by which the last section must have ended")
    arguments = parser.parse_args()
    end_s = time.monotonic() + arguments.seconds
    setting = Setting(arguments.device, arguments.smoke)
    if setting.device == "cuda":
        torch.empty(1, device="cuda")
    for name in arguments.sections:
        section = SECTIONS[name]
        _write(arguments.parts / "current.json", {"section": name, "since_s": time.time()})
        start_s = time.monotonic()
        results = Results(part_path(arguments.parts, name), name, min(end_s, start_s + section.limit_s), setting.smoke)
        torch.manual_seed(0)
        try:
            getattr(importlib.import_module(section.module), section.function)(results, setting)
            result = results.summary()
        except Exception as error:
            traceback.print_exc()
            result = f"failed: {type(error).__name__}: {error}".splitlines()[0]
        ended = {"step": name, "seconds": round(time.monotonic() - start_s, 1), "result": result}
        with (arguments.parts / "ended.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(ended) + "\n")
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def _write(path: Path, content: dict[str, object]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    # Taking a CUDA context and a gigabyte of libraries apart takes seconds, which the next step can use.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
