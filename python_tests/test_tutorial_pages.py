"""The tutorials on LoRA and on shipping: their commands and code run, on tiny stand-ins of the same format."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from factories import digits_student
from tiny_pipelines import tiny_pipeline

from pyard.cli.command_line import main

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(line: str, *more: str) -> None:
    name, *words = shlex.split(line)
    assert name == "pyard"
    assert main([*words, *more]) == 0, line


@pytest.mark.slow
def test_the_page_on_lora_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_pipeline("sd3", tmp_path / "stable-diffusion-3.5-medium")
    Path("prompts.txt").write_text("a red circle\na green square\n", encoding="utf-8")
    more = {
        "trajectories": ["--batch_size", "2"],
        "train": ["--batch_size", "2", "--max_steps", "2"],
        "evaluate": ["--count", "2"],
    }
    for line in "".join(blocks("lora-four-steps.md", "bash")).splitlines():
        command = shlex.split(line)[1]
        # The scale of the recipe, and CLIP, are not on this machine.
        line = (
            line.replace("20000", "4").replace("--lora_rank 32", "--lora_rank 2").replace("--clip clip-vit-large-patch14 ", "")
        )
        run(line, *more.get(command, []))
        if command == "train":
            names: dict[str, Any] = {}
            exec("".join(blocks("lora-four-steps.md", "python")), names)
            assert names["image"].size == (32, 32)
    assert list(Path("sd35-4-steps").glob("*lora*.safetensors"))
    assert "load_lora_weights" in Path("sd35-4-steps/README.md").read_text(encoding="utf-8")
    card = Path("runs/sd35-lora/student/README.md").read_text(encoding="utf-8")
    assert "## Scores" in card
    assert "rank 2" in card


@pytest.mark.slow
def test_the_page_on_shipping_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digits_student().save_pretrained("run/student")
    for line in "".join(blocks("ship-it.md", "bash")).splitlines():
        # An untrained student may round worse than the bound for trained ones.
        run(line, *(["--parity-bound", "2"] if "int8" in line else []))
    names: dict[str, Any] = {}
    exec("".join(blocks("ship-it.md", "python")), names)
    assert names["images"].shape == (3, 1, 8, 8)
    assert {file.name for file in tmp_path.glob("*.onnx")} == {
        "digits.onnx",
        "step.onnx",
        "digits-fp16.onnx",
        "digits-int8.onnx",
    }
