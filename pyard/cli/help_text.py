"""Types in `--help` as a shell's user thinks of them: `a | b | none` for `Optional[Literal['a', 'b']]`."""

from __future__ import annotations

import re

# From the inside out: what is left has no comma but between the members of a union.
_STEPS = [
    (r"<class '([\w.]+)'>", r"\1"),
    (r"Unvalidated<null>", "null"),
    (r"type\[\w+\], ", ""),
    (r"tuple\[(\w+), \.\.\.\]", r"list of \1"),
    (r"tuple\[float, float\]", "two floats"),
    (r"list\[([^\]]+)\]", r"list of \1"),
]


def plain_help(text: str) -> str:
    """A flag's help whose last parentheses, `(type: …, default: …)`, are in plain words."""
    text = re.sub(r"\bNone\b", "none", text)  # what a flag takes in its place
    return re.sub(r"\((required, )?type: (.*?)(?:, default: ([^()]*))?\)$", _plain, text, flags=re.DOTALL)


def _plain(found: re.Match[str]) -> str:
    parts = [(found[1] or "") + plain_type(found[2])]
    if found[3] is not None:
        parts.append(f"default: {'none' if found[3] == 'null' else found[3]}")
    return f"({'; '.join(parts)})"


def plain_type(text: str) -> str:
    """`a | b | none` for `Optional[Literal['a', 'b']]`."""
    for pattern, replacement in _STEPS:
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), text)
    text = re.sub(r"Optional\[(.*)\]$", r"\1 | null", text)
    text = re.sub(r"Union\[(.*)\]$", lambda m: m[1].replace(", ", " | "), text)
    text = re.sub(r"\bPath\b", "path", re.sub(r"\bnull\b", "none", text))
    return " | ".join(dict.fromkeys(text.split(" | ")))  # each once
