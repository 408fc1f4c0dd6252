"""docs/training.md says what the commands take and what a run leaves."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pyard.cli.command_line import COMMANDS, typable_function
from pyard.cli.flags import flags_of, read_flags
from pyard.storage.log import read_log
from pyard.training.config import TrainConfig

PAGE = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
SHELL = [
    line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
PYTHON = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.parametrize("line", [line for line in SHELL if "pyard " in line])
def test_commands_have_these_flags(line):
    words = shlex.split(line)
    words = words[words.index("pyard") + 1 :]
    command = COMMANDS[words[0]]
    module = __import__(command.module, fromlist=["_"])
    function = typable_function(getattr(module, command.function))
    read_flags(
        words[1:], flags_of(getattr(module, command.config) if command.config else function), positional=command.positional
    )


def test_flags_and_settings_named_in_the_text_exist():
    known = set(flags_of(TrainConfig)) | {"device", "gpus", "nproc_per_node", "count", "logdir", "config", "help"}
    known |= set(flags_of(__import__("pyard").generate_trajectories))
    named = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][\w.-]*[a-z])", PAGE)}
    assert len(named) > 15
    assert named <= known


def test_the_python_block_runs_and_leaves_what_the_table_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(PYTHON, names)
    assert names["samples"].shape == (3, 1, 8, 8)
    run = tmp_path / "runs/small"
    assert {"student", "settings.yaml", "log.jsonl", "checkpoints"} <= {entry.name for entry in run.iterdir()}
    assert {"loss", "loss_per_step", "grad_norm", "learning_rate", "samples_per_second", "seconds"} <= set(
        read_log(run / "log.jsonl")[-1]
    )
