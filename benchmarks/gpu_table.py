"""Puts the steps of gpu_check.sh together: benchmarks/results/<device>.json and a Markdown table beside it."""

from __future__ import annotations

import argparse
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch


def device_name() -> str:
    """The GPU's name, or the processor's where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}"


def as_markdown(results: dict[str, Any]) -> str:
    """One table per step; what a row was not asked for stays empty."""
    lines = [f"# {results['device']}", "", f"torch {results['torch']}, CUDA {results['cuda']}", ""]
    lines += ["| step | seconds | result |", "|---|---|---|"]
    lines += [f"| {step['step']} | {step['seconds']} | {step['result']} |" for step in results["steps"]]
    for table in results["tables"]:
        columns = list(dict.fromkeys(key for row in table["rows"] for key in row if key != "name"))
        lines += ["", f"## {table['step']}", "", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        lines += [f"| {row['name']} | " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in table["rows"]]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Reads the parts from a folder and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", type=Path, help="folder with the steps' .json and steps.tsv")
    parser.add_argument("out", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    log = (arguments.parts / "steps.tsv").read_text(encoding="utf-8").splitlines()
    steps = [dict(zip(("step", "seconds", "result"), line.split("\t"), strict=True)) for line in log]
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.parts.glob("*.json"))]
    results = {
        "device": device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "steps": steps,
        "tables": tables,
    }
    name = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (arguments.out / f"{name}.md").write_text(as_markdown(results), encoding="utf-8")
    print(as_markdown(results))


if __name__ == "__main__":
    main()
