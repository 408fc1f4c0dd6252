"""What the site has beside the pages in docs/: the command line's help, the changelog, and measured results."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made here."""
    pages = {
        "commands.md": commands(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        **contributing(),
        "results.md": results(),
        "gpu.md": (ROOT / "benchmarks/GPU.md").read_text(encoding="utf-8"),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to what lies beside docs/ in the repository become links in the site."""
    markdown = markdown.replace("](../benchmarks/results/", "](results/").replace("](../benchmarks/GPU.md)", "](gpu.md)")
    return markdown.replace("](../CHANGELOG.md)", "](changelog.md)").replace("](../CONTRIBUTING.md)", "](contributing.md)")


def commands() -> str:
    """Every command's `--help`."""
    from pyard.cli.command_line import COMMANDS, main

    parts = ["# Commands", "Flags can come from a YAML file (`--config`); those on the command line win."]
    for name in COMMANDS:
        printed = io.StringIO()
        os.environ["COLUMNS"] = "100"
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*name.split(), "--help"])
        parts += [f"## pyard {name}", f"```text\n{plain(printed.getvalue())}\n```"]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Without the escape sequences of terminals."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f]", "", text).rstrip()


def contributing() -> dict[str, str]:
    """CONTRIBUTING.md, and its recipe for an operator as a page of its own."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    before, operator = text.split("## Adding an operator\n")
    return {
        "contributing.md": f"{before}## Adding an operator\n\nThe recipe has [a page of its own](add-operator.md).\n",
        "add-operator.md": f"# Add an operator\n{operator}",
    }


def results() -> str:
    """A list of what was measured."""
    lines = ["# Measured results", "", "Each file says with which command and on which machine it was made.", ""]
    for path in sorted(RESULTS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        title = re.search(r"^# (.+)", text, re.MULTILINE)
        lines.append(f"- [{title[1] if title else path.stem}](results/{path.name})")
    return "\n".join(lines) + "\n"
