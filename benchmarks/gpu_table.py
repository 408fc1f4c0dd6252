"""Puts the steps of gpu_check.sh together: benchmarks/results/<device>.json and a Markdown table beside it.

Times get floors, from the copy bandwidth and the matmul rate that were measured in the same run: a row that has `x_ms` with
`x_gb` (bytes that must move) or `x_gflop` (work that must be done) gets `x_floor_ms` and `x_of_floor`, floor over time.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

# Dense bf16 rates of the data sheets in TFLOP/s: what "model FLOP/s utilisation" is a share of.
DATA_SHEET = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
LOG_LINES = 15  # of a step that did not end well


def machine() -> dict[str, Any]:
    """Device, driver and torch; on a machine without a GPU its processor."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    if not torch.cuda.is_available():
        return {"device": f"cpu {platform.machine()}", **found}
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        answer = f"unknown ({error})"
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": properties.total_memory / 1e9,
        "driver, highest clock, power limit": answer,
        **found,
    }


def ceilings(tables: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Copy bandwidth in TB/s and matmul rate in TFLOP/s, as measured in this run; None where they were not."""
    rows = {row["name"]: row for table in tables if table["step"] == "ceilings" for row in table["rows"]}
    return rows.get("copy", {}).get("tb_per_s"), rows.get("matmul bf16", {}).get("tflop_per_s")


def with_floors(row: dict[str, Any], copy: float | None, matmul: float | None, peak: float | None) -> dict[str, Any]:
    """The row, and behind each time its floor and how near it comes; with work to do, also its rate."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        out[key] = value
        if key != "ms" and not key.endswith("_ms"):
            continue
        part = key.removesuffix("ms")
        gflop = row.get(f"{part}gflop")
        bounds = [row[f"{part}gb"] / copy] if copy and f"{part}gb" in row else []
        bounds += [gflop / matmul] if matmul and gflop else []
        if bounds:
            out[f"{part}floor_ms"], out[f"{part}of_floor"] = max(bounds), max(bounds) / value
        if gflop:
            out[f"{part}tflop_per_s"] = gflop / value
            if peak:
                out[f"{part}mfu"] = gflop / value / peak
    return out


def as_markdown(results: dict[str, Any]) -> str:
    """One table per step; what a row was not asked for stays empty. Steps that failed show the end of their log."""
    lines = [f"# {results['machine']['device']}", ""]
    lines += [f"- {name}: {_cell(value)}" for name, value in results["machine"].items()]
    lines += ["", "| step | seconds | result |", "|---|---|---|"]
    lines += [f"| {step['step']} | {step['seconds']} | {step['result']} |" for step in results["steps"]]
    for table in results["tables"]:
        columns = list(dict.fromkeys(key for row in table["rows"] for key in row if key != "name"))
        lines += ["", f"## {table['step']}", "", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        lines += [f"| {row['name']} | " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in table["rows"]]
    for step in results["steps"]:
        if "log" in step:
            lines += ["", f"## {step['step']}: {step['result']}", "", "```", *step["log"], "```"]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def read_steps(parts: Path) -> list[dict[str, Any]]:
    """The steps in order, with the end of the log of each that did not end well."""
    log = parts / "steps.tsv"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    steps: list[dict[str, Any]] = [dict(zip(("step", "seconds", "result"), line.split("\t"), strict=True)) for line in lines]
    for step in steps:
        path = parts / f"{step['step']}.log"
        if step["result"] != "ok" and path.exists():
            step["log"] = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return steps


def main() -> None:
    """Reads the parts from a folder and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="folder with the steps' .json, logs and steps.tsv")
    parser.add_argument("out", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.parts.glob("*.json"))]
    found = machine()
    peak = next((rate for name, rate in DATA_SHEET.items() if name in found["device"]), None)
    copy, matmul = ceilings(tables)
    for table in tables:
        table["rows"] = [with_floors(row, copy, matmul, peak) for row in table["rows"]]
    results = {"machine": found, "steps": read_steps(arguments.parts), "tables": tables}
    name = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = as_markdown(results)
    (arguments.out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
