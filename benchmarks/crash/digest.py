"""What a command has left, as hashes by path; the only place that says what may differ between two equal runs."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

# Fields of tables and logs that hold times.
TIMES = {"seconds", "samples_per_second", "seconds_per_stage", "seconds_per_image"}
# torch gives each sharded checkpoint a random name, here, so that the hash of this file and of what holds it differ.
RANDOM = "shards/.metadata"
# Files that only say who is at work, and what a kill may leave of a write; the next write of that name removes it.
PASSING = re.compile(r"(^|/)\.locks/|\.lock$|(^|/)lost\+found|\.tmp$|(^|/)\.[^/]*\.new(/|$)|(^|/)cache/|(^|/)\.[^/]*\.old(/|$)")


def digest(folder: Path) -> dict[str, str]:
    """sha256 of each file below a folder by its path, without the fields that hold times."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not PASSING.search(name) and not name.endswith(RANDOM):
            found[name] = hashlib.sha256(_timeless(file)).hexdigest()
    return found


def difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    """In words; empty if there is none."""
    missing, foreign = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    changed = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    parts = [("missing", missing), ("not expected", foreign), ("other bytes", changed)]
    return "; ".join(f"{what}: {', '.join(names[:4])}" for what, names in parts if names)


def _timeless(file: Path) -> bytes:
    content = file.read_bytes()
    if file.suffix not in (".json", ".jsonl"):
        return content
    try:
        lines = content.decode().splitlines() if file.suffix == ".jsonl" else [content.decode()]
        return json.dumps([_without_times(json.loads(line)) for line in lines], sort_keys=True).encode()
    except ValueError:
        return content


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        if RANDOM in value.get("files", {}):
            value = {
                **value,
                "files": {name: found for name, found in value["files"].items() if name != RANDOM},
                "sha256": None,
            }
        return {key: _without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value
