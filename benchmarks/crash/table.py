"""The trial's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.crash.trial import WAYS


def table(
    rows: Sequence[Mapping[str, Any]],
    skipped: Mapping[str, str],
    commits: Sequence[str],
    skips: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """Markdown: a line for each command, a column for each way: recovered of all.

    Args:
        rows: command, way, trials, recovered, lost, wrong.
        skipped: reasons by the way, of ways that this machine does not have.
        commits: that were tried.
        skips: reasons by command and way, of ways that do not apply; they become footnotes.
    """
    skips = skips or {}
    cells = {(row["command"], row["way"]): row for row in rows}
    commands = list(dict.fromkeys([*skips, *(row["command"] for row in rows)]))
    tried = {row["command"] for row in rows}
    commands = [command for command in commands if command in tried]
    notes = list(dict.fromkeys(reason for command in commands for reason in skips.get(command, {}).values()))

    def cell(command: str, way: str) -> str:
        if way in skipped:
            return "–"
        if reason := skips.get(command, {}).get(way):
            return f"– [{notes.index(reason) + 1}]"
        return _counts(cells.get((command, way)))

    lines = [
        f"Recovered of all trials, `make crash`, commit {', '.join(commits)}:",
        "",
        "| command | " + " | ".join(WAYS) + " |",
        "|---" * (len(WAYS) + 1) + "|",
    ]
    lines += [f"| {command} | " + " | ".join(cell(command, way) for way in WAYS) + " |" for command in commands]
    totals = [[row for row in rows if row["way"] == way] for way in WAYS]
    lines.append("| all | " + " | ".join(_counts(_sum(column)) for column in totals) + " |")
    whole = _sum(rows)
    lines += ["", f"{whole['trials']} trials: {whole['recovered']} recovered, {whole['lost']} lost, {whole['wrong']} wrong."]
    lines += [f"Skipped: {way}, since {reason}." for way, reason in skipped.items()]
    lines += [f"[{number}] Does not apply: {reason}." for number, reason in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def _sum(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: sum(row[name] for row in rows) for name in ("trials", "recovered", "lost", "wrong")}


def _counts(row: Mapping[str, Any] | None) -> str:
    return "" if not row or not row["trials"] else f"{row['recovered']} of {row['trials']}"
