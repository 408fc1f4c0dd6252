"""Text files are UTF-8 whatever the locale: every call that reads or writes text names the encoding."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pyard", "examples", "benchmarks", "build_backend")
NOT_FILES = {"Image", "TrajectoryStore", "tokenize", "archive", "zipfile", "os", "webbrowser"}
RUN = {"run", "Popen", "check_output"}


def calls_without_an_encoding(source: str) -> Iterator[int]:
    """Line numbers of calls that read or write text in the locale's encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = function.value if isinstance(function, ast.Attribute) else None
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in given or None in given:
            continue
        if name in ("read_text", "write_text") and owner is not None:
            # The first argument of read_text is the encoding; pyard.storage.files.write_text has no owner.
            if len(node.args) <= (name == "write_text"):
                yield node.lineno
        elif name == "open" and getattr(owner, "id", "") not in NOT_FILES:
            place = 1 if owner is None else 0
            mode = given.get("mode") or (node.args[place] if len(node.args) > place else ast.Constant("r"))
            text = isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) <= set("rwax+t")
            if text:
                yield node.lineno
        elif name in RUN and getattr(owner, "id", "") == "subprocess":
            flag = given.get("text") or given.get("universal_newlines")
            if isinstance(flag, ast.Constant) and flag.value:
                yield node.lineno


def test_the_search_finds_what_it_is_for():
    source = """
path.read_text()
path.write_text("x")
open("x")
path.open("a")
subprocess.run(["x"], text=True)
path.read_text(encoding="utf-8"); path.write_text("x", encoding="utf-8"); open("x", "rb"); path.open("wb")
TrajectoryStore.open(folder); Image.open(file); write_text(path, text); subprocess.run(["x"]); path.read_text("utf-8")
"""
    assert list(calls_without_an_encoding(source)) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_text_file_is_read_and_written_as_utf8(folder):
    files = sorted((ROOT / folder).rglob("*.py")) + ([ROOT / "setup.py"] if folder == "pyard" else [])
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in calls_without_an_encoding(file.read_text(encoding="utf-8"))
    ]
    assert not found, 'add encoding="utf-8"'


def test_a_run_with_names_beyond_ascii_in_a_locale_of_ascii(tmp_path):
    """Settings, logs and reports are written and read again; what a terminal cannot show is replaced."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"# größer → besser\nteacher: digits\nout: {tmp_path}/run\nnetwork: paket:Größe\nnum_trajectories: 64\n",
        encoding="utf-8",
    )
    code = """
import sys
from pyard.cli.command_line import main
from pyard.training.config import TrainConfig
from pyard.training.identity import begun, resume_or_begin
config = TrainConfig.read(sys.argv[1])
config.out.mkdir(parents=True)
resume_or_begin(config, teacher_fingerprint="x", manifest={"count": 64})
assert TrainConfig.read(config.out / "settings.yaml") == config
assert config.network == "paket:Gr\\xf6\\xdfe"
assert begun(config)["manifest"] == {"count": 64}
sys.exit(main(["estimate", sys.argv[1], "--device", "H100"]))
"""
    # Python would choose UTF-8 by itself where the locale is C.
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    done = subprocess.run(
        [sys.executable, "-W", "error::EncodingWarning", "-c", code, str(recipe)],
        env={**os.environ, **locale},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "trajectories" in done.stdout
