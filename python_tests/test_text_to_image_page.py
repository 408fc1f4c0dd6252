"""The commands and the code of docs/text-to-image.md do what the page says, on a tiny pipeline of the same format."""

from __future__ import annotations

import dataclasses
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import tiny_pipeline

from pyard.cli.command_line import main
from pyard.training import TrainConfig

ROOT = Path(__file__).parents[1]
WHOLE = (ROOT / "docs" / "text-to-image.md").read_text(encoding="utf-8")
# What takes minutes is run by a test of its own.
BEFORE, REST = WHOLE.split("## Export and serve\n")
EXPORT, AFTER = REST.split("\n## ", 1)
PAGE = f"{BEFORE}## {AFTER}"
# The page's sizes, and those of the tiny pipeline.
SMALLER = {"100000": "4", "50_000": "4", "(1024, 1024)": "(32, 32)", "832": "24", "1216": "48"}
TINY: dict[str, Any] = dict(batch_size=2, max_steps=2, gradient_accumulation=1, lora_rank=2)


def small(text: str) -> str:
    for large, tiny in SMALLER.items():
        text = text.replace(large, tiny)
    return text


def blocks(language: str, page: str = PAGE) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page")
    tiny_pipeline("sd3", place / "stable-diffusion-3.5-medium")
    (place / "prompts.txt").write_text("a red circle\na green square\n", encoding="utf-8")
    return place


def run_commands(until: Path | None = None) -> None:
    """Run the page's commands in the working folder; with `until`, only until that path exists."""
    # What a small machine leaves out: eight processes, batches of 64, and thousands of updates.
    training = "--parallel ddp --num_trajectories none --batch_size 2 --max_steps 2 --gradient_accumulation 1"
    more = {"trajectories": "--batch_size 2", "train": training}
    text = small("".join(blocks(""))).replace("\\\n", " ").replace("torchrun --nproc-per-node 8 -m ", "")
    for command in text.replace(" --num_trajectories none", "").strip().splitlines():
        if until is not None and until.exists():
            break
        name, *words = shlex.split(command)
        assert name == "pyard"
        flags = more.get(words[0], "") + (" --lora_rank 2" if "sd35-medium-1024-lora" in words else "")
        assert main([*words, *flags.split()]) == 0, command


def test_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyard

    monkeypatch.chdir(folder)
    run_commands()
    assert (folder / "circle.png").is_file()
    assert (folder / "sd35-stock" / "README.md").is_file()
    train, generate = pyard.train, pyard.generate_trajectories

    def train_a_little(config: TrainConfig) -> Any:
        return train(dataclasses.replace(config, **TINY, progress=False))

    def generate_a_little(*args: Any, **settings: Any) -> Any:
        return generate(*args, **settings, batch_size=2, progress=False)

    monkeypatch.setattr(pyard, "train", train_a_little)
    monkeypatch.setattr(pyard, "generate_trajectories", generate_a_little)
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(small(block), names)
    assert len(names["images"]) == 4
    assert names["image"].size == (48, 24)
    saved = pyard.ARDPipeline.from_pretrained("sd35-ard")
    assert saved.text_encoder_3 is not None


@pytest.mark.slow
def test_the_section_on_export_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.chdir(folder)
    run_commands(until=folder / "runs" / "sd35" / "student")
    (commands,) = blocks("", EXPORT)
    name, *words = shlex.split(commands)
    assert name == "pyard"
    assert main(words) == 0
    names: dict[str, Any] = {}
    (block,) = blocks("python", EXPORT)
    exec(block, names)
    assert names["pictures"].shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(names["again"], names["pictures"][:1])
    assert np.abs(names["previews"][-1].astype(int) - names["again"]).max() <= 1
    table = {line.split("`")[1] for line in EXPORT.splitlines() if line.startswith("| `")}
    written = {path.relative_to("sd35-onnx").as_posix() for path in Path("sd35-onnx").rglob("*.*")}
    assert {re.sub(r"\*", "", name) for name in table} <= written


def test_the_table_of_families_is_that_of_the_tests() -> None:
    """Its rows and columns, and no cell that failed; `python docs/figures/families.py` writes it."""
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "families.py"))
    found = PAGE.split(script["BEGIN"])[1].split(script["END"])[0].strip()
    assert found.splitlines()[0] == script["table"]({}).splitlines()[0]
    assert [line.split("|")[1].strip() for line in found.splitlines()[2:]] == list(script["FAMILIES"])
    assert "fails" not in found
    assert "not run" not in found
