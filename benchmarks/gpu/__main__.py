"""The minutes on a GPU machine: `python3 -m benchmarks.gpu A --out FOLDER`, then B; benchmarks/GPU.md has the whole.

A checks and measures the operators, B measures the models, C repeats the sections and checks that it is told. `merge` puts the
results of several calls together as benchmarks/results/gpu-DEVICE.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import checks
from benchmarks.gpu.sections import CALL_LIMITS, CALLS, SECTIONS
from benchmarks.gpu.steps import Call
from benchmarks.gpu.table import as_summary, read_tables, with_floors, write

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "build" / "gpu-carry"
END_S = 5.0  # kept for the last step's end and the results
LOG_BYTES = 200_000  # of each program, from its end


class Publisher:
    """Writes a call's results to a folder, again whenever there are more.

    Args:
        letter: of the call.
        out: the folder.
    """

    def __init__(self, letter: str, out: Path):
        self.path, self._seen = out / letter.lower(), ""

    def __call__(self, call: Call) -> None:
        tables = read_tables(call.parts)
        seen = json.dumps([call.steps, tables])
        if seen == self._seen:
            return
        self._seen = seen
        known = call.parts / "machine.json"
        machine = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {"device": "unknown"}
        write({"machine": machine, "steps": call.steps, "tables": with_floors(tables, machine["device"])}, self.path)

    def logs(self, call: Call) -> None:
        """All logs in one file."""
        with self.path.with_name(self.path.name + "-log.txt").open("wb") as file:
            for log in sorted(call.parts.glob("*.log")):
                file.write(f"\n==== {log.stem}\n".encode() + log.read_bytes()[-LOG_BYTES:])


def main() -> int:
    """Exits with 1 if a step did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=[*CALL_LIMITS, "merge"])
    parser.add_argument("names", nargs="*", help="C: sections and checks; merge: JSON files")
    parser.add_argument("--out", type=Path, help="folder for the results, three files per call")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny sizes without a GPU, to check that every line runs")
    arguments = parser.parse_args()
    if arguments.call == "merge":
        return merge([Path(name) for name in arguments.names], arguments.out or ROOT / "benchmarks" / "results")
    wanted = arguments.names if arguments.call == "C" else CALLS[arguments.call]
    unknown = [name for name in wanted if name not in SECTIONS and name not in checks.CHECKS]
    if arguments.out is None or unknown or not wanted:
        known = ", ".join([*SECTIONS, *checks.CHECKS])
        parser.error(f"{arguments.call} needs --out and names of: {known}" + (f"; not {', '.join(unknown)}" if unknown else ""))
    return run(arguments.call, list(wanted), arguments.out, arguments.cpu_smoke)


def run(letter: str, wanted: list[str], out: Path, smoke: bool) -> int:
    """One call."""
    started_s = time.monotonic()
    os.chdir(ROOT)
    _set_environment(smoke)
    parts = ROOT / "build" / f"gpu-run-{letter.lower()}"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    publisher = Publisher(letter, out.absolute())
    call = Call(parts, started_s + CALL_LIMITS[letter] - END_S, publisher)
    device = "cpu" if smoke else "cuda"
    # What stops this command early is to end its programs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        check = [sys.executable, "-m", "benchmarks.gpu.check", "--device", device, "--machine", str(parts / "machine.json")]
        if not call.run("library", 60, check):
            print(call.log("library").read_text(encoding="utf-8"))
            return 1
        print(call.log("library").read_text(encoding="utf-8"), end="", flush=True)
        checks.place_reader(CARRIED)
        if letter == "A":
            call.start("fresh build", 150, checks.build_command(smoke))
        first = {
            name: checks.CHECKS[name](smoke, CARRIED)
            for name in (checks.FIRST if letter == "A" else wanted)
            if name in checks.CHECKS
        }
        call.run_together({name: program for name, program in first.items() if program is not None})
        for name in (name for name, program in first.items() if program is None):
            call.note(name, 0, checks.NOT_HERE)
        call.run_sections([name for name in wanted if name in SECTIONS], device, smoke)
        if letter == "A":
            _end_of_a(call, smoke, check[:-2])
    finally:
        call.stop()
        publisher(call)
        publisher.logs(call)
    print(as_summary(json.loads(publisher.path.with_name(publisher.path.name + ".json").read_text(encoding="utf-8"))))
    return int(any(step["result"] not in ("ok", checks.NOT_HERE) for step in call.steps))


def _end_of_a(call: Call, smoke: bool, check: list[str]) -> None:
    if call.finish("fresh build") and not smoke and call.left_s() > 10:
        os.environ["PYARD_PREBUILT"] = str(checks.fresh_library())
        call.run("fresh library", 30, check)
    for name, program in checks.profilers(smoke).items():
        if call.left_s() < 12:
            call.note(name, 0, "left out: no time")
        elif call.run(name, *program):
            break


def _set_environment(smoke: bool) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    os.environ["PYTHONUNBUFFERED"] = "1"
    if not smoke:
        os.environ["PYARD_REQUIRE_CUDA"] = "1"
    if "PYARD_PREBUILT" not in os.environ and (CARRIED / "libpyard_ops.so").exists():
        os.environ["PYARD_PREBUILT"] = str(CARRIED / "libpyard_ops.so")


def merge(files: list[Path], out: Path) -> int:
    """One JSON file and one table of several calls; of a section or step that several have, the last one's.

    All must be of one kind of device.
    """
    results: list[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    devices = {result["machine"]["device"] for result in results}
    if len(devices) != 1:
        print(f"merge: expected results of one device, found {', '.join(sorted(devices)) or 'none'}", file=sys.stderr)
        return 2
    tables = {table["section"]: table for result in results for table in result["tables"]}
    steps = {step["step"]: step for result in results for step in result["steps"]}
    name = re.sub(r"[^a-z0-9]+", "-", devices.pop().lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    ordered = [tables[section] for section in SECTIONS if section in tables]
    write({"machine": results[-1]["machine"], "steps": list(steps.values()), "tables": ordered}, out / f"gpu-{name}")
    print(out / f"gpu-{name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
