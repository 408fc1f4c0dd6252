"""The site's own pages: their commands exist, their code runs, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pyard.cli.command_line import COMMANDS, typable_function
from pyard.cli.flags import flags_of, read_flags

ROOT = Path(__file__).parents[1]
PAGES = (
    "dit-to-fid.md",
    "clusters.md",
    "lora-four-steps.md",
    "ship-it.md",
    "out-of-memory.md",
    "resume.md",
    "recipes.md",
    "export.md",
)


def code_of(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands_of(page: str) -> list[str]:
    lines = "\n".join(code_of(page, "bash")).splitlines()
    return [line.split(" #")[0].split(" > ")[0].strip() for line in lines if "pyard " in line]


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands_of(page)])
def test_commands_have_these_flags(line: str) -> None:
    words = shlex.split(line)
    words = words[words.index("pyard") + 1 :]
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    command = COMMANDS[name]
    words = words[len(name.split()) :]
    module = __import__(command.module, fromlist=["_"])
    function = typable_function(getattr(module, command.function))
    flags = flags_of(getattr(module, command.config) if command.config else function)
    if command.config:  # flags of the command itself beside those of its settings
        flags |= flags_of(function) if name != "train" else {}
    shown = [word for word in words if word != "--print_config"]
    read_flags(shown, flags, positional=command.positional, complete=shown == words)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["first-student.md", "index.md"])
def test_the_code_runs(page: str, tmp_path: Path) -> None:
    script = "\n".join(code_of(page, "python"))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "student" / "config.json").exists()


def test_every_page_is_short() -> None:
    longest = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "docs").glob("*.md")}
    assert {name: lines for name, lines in longest.items() if lines > 250} == {}
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.parametrize("name", ["deployment", "load"])
def test_tables_are_those_that_were_measured(name: str) -> None:
    page = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    rows = [
        line for line in (ROOT / f"benchmarks/results/{name}.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"
    ]
    assert len(rows) > 5
    assert "\n".join(rows) in page


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    page = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "generate_trajectories" in page
    assert "--history_layers" in (tmp_path / "site" / "commands.html").read_text(encoding="utf-8")
    assert (tmp_path / "site" / "search" / "search_index.json").exists()
