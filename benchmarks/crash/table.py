"""The trial's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.crash.trial import WAYS


def table(rows: Sequence[Mapping[str, Any]], skipped: Mapping[str, str], commits: Sequence[str]) -> str:
    """Markdown: a line for each command, a column for each way: recovered of all."""
    cells = {(row["command"], row["way"]): row for row in rows}
    commands = list(dict.fromkeys(row["command"] for row in rows))
    lines = [
        f"Recovered of all trials, `make crash`, commit {', '.join(commits)}:",
        "",
        "| command | " + " | ".join(WAYS) + " |",
        "|---" * (len(WAYS) + 1) + "|",
    ]
    lines += [f"| {c} | " + " | ".join(_cell(cells.get((c, way))) for way in WAYS) + " |" for c in commands]
    totals = [[row for row in rows if row["way"] == way] for way in WAYS]
    lines.append("| all | " + " | ".join(_cell(_sum(column)) for column in totals) + " |")
    whole = _sum(rows)
    lines += ["", f"{whole['trials']} trials: {whole['recovered']} recovered, {whole['lost']} lost, {whole['wrong']} wrong."]
    lines += [f"Skipped: {way}, since {reason}." for way, reason in skipped.items()]
    return "\n".join(lines) + "\n"


def _sum(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: sum(row[name] for row in rows) for name in ("trials", "recovered", "lost", "wrong")}


def _cell(row: Mapping[str, Any] | None) -> str:
    return "" if not row or not row["trials"] else f"{row['recovered']} of {row['trials']}"
