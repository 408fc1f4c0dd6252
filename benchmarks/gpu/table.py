"""Results as JSON and as a Markdown table, floors beside times.

The floors come from the copy bandwidth and the matmul rate that were measured in the same call: a row that has `x_ms` with
`x_gb` (bytes that must move) or `x_gflop` (work that must be done) gets `x_floor_ms` and `x_of_floor`, floor over time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.sections import SECTIONS, part_path

# Dense bf16 rates of the data sheets in TFLOP/s: what "model FLOP/s utilisation" is a share of.
DATA_SHEET = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
METHOD = (
    "Times are medians over groups of calls between events on the device, without a pause between them: `graph`, replays of a "
    "CUDA graph of some calls; `calls`, plain calls, launches included. `spread` is largest less smallest over the median. "
    "`floor` is the larger of bytes over the copy bandwidth and FLOP over the matmul rate, both from `ceilings`. ms, GB, GFLOP."
)


def read_tables(parts: Path) -> list[dict[str, Any]]:
    """What the sections have measured so far, in their order."""
    paths = [part_path(parts, name) for name in SECTIONS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def with_floors(tables: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """The tables, and behind each time its floor and how near it comes; with work to do, also its rate."""
    rows = {row["name"]: row for table in tables if table["section"] == "ceilings" for row in table["rows"]}
    copy, matmul = rows.get("copy", {}).get("tb_per_s"), rows.get("matmul bf16", {}).get("tflop_per_s")
    peak = next((rate for name, rate in DATA_SHEET.items() if name in device), None)
    return [{**table, "rows": [_with_floor(row, copy, matmul, peak) for row in table["rows"]]} for table in tables]


def _with_floor(row: dict[str, Any], copy: float | None, matmul: float | None, peak: float | None) -> dict[str, Any]:
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


def write(results: dict[str, Any], path: Path) -> None:
    """Writes `path`.json and `path`.md, each in one piece."""
    for suffix, text in ((".json", json.dumps(results, indent=1) + "\n"), (".md", as_markdown(results))):
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path.with_name(path.name + suffix))


def as_markdown(results: dict[str, Any]) -> str:
    """One table per section; what a row was not asked for stays empty. Steps that failed show the end of their log."""
    lines = [f"# {results['machine']['device']}", ""]
    lines += [f"- {name}: {_cell(value)}" for name, value in results["machine"].items()]
    lines += ["", METHOD, "", "| step | seconds | result |", "|---|---|---|"]
    lines += [f"| {step['step']} | {step['seconds']} | {_cell(step['result'])} |" for step in results["steps"]]
    for table in results["tables"]:
        columns = list(dict.fromkeys(key for row in table["rows"] for key in row if key != "name"))
        lines += ["", f"## {table['section']}", "", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        lines += [f"| {row['name']} | " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in table["rows"]]
    for step in results["steps"]:
        if "log" in step:
            lines += ["", f"## {step['step']}: {step['result']}", "", "```", *step["log"], "```"]
    return "\n".join(lines) + "\n"


def as_summary(results: dict[str, Any]) -> str:
    """Steps, then a line a row: its times in ms, and the floor's share of each."""
    lines = [f"{step['step']}: {step['result']}" for step in results["steps"]]
    for table in results["tables"]:
        lines.append(f"-- {table['section']}")
        for row in table["rows"]:
            found = [
                f"{key} {row[key]:.4g}"
                + (f" ({row[share]:.0%})" if (share := f"{key.removesuffix('ms')}of_floor") in row else "")
                for key in ("ms", "forward_ms", "both_ms")
                if key in row
            ]
            lines.append(f"{row['name']}: " + (", ".join(found) or row.get("error") or row.get("left_out") or ""))
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
