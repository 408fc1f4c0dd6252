"""What is given beside the store of a text-to-image pipeline must agree with it: prompts, sizes, embedded guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import tiny_pipeline

from pyard.errors import InputError
from pyard.teachers import load_teacher
from pyard.training import TrainConfig
from pyard.training.agreement import agree_with_pipeline
from pyard.trajectories import TrajectoryStore, generate_trajectories

PROMPTS = ["a red circle", "two small blue squares", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("flux")
    tiny_pipeline("flux", place / "teacher")
    generate_trajectories(
        place / "teacher", place / "store", 4, num_steps=2, teacher_steps=2, height=32, width=64, prompts=PROMPTS,
        embedded_guidance=2.5, batch_size=4, keep="state", progress=False,
    )  # fmt: skip
    return place


def agreed(folder: Path, **settings: Any) -> TrainConfig:
    store = TrajectoryStore.open(folder / "store")
    config = TrainConfig(teacher=str(folder / "teacher"), out=folder / "run", trajectories="store", **settings)
    return agree_with_pipeline(config, [store], load_teacher(folder / "teacher"), given=True)


def test_what_is_not_given_comes_from_the_store(folder: Path) -> None:
    config = agreed(folder)
    assert (config.height, config.width, config.embedded_guidance) == (32, 64, 2.5)
    assert agreed(folder, height=32, width=64, embedded_guidance=2.5) == config


@pytest.mark.parametrize(("name", "value", "theirs"), [("height", 64, 32), ("width", 32, 64), ("embedded_guidance", 3.0, 2.5)])
def test_what_differs_is_refused_naming_both(folder: Path, name: str, value: Any, theirs: Any) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}, but {theirs} in the trajectories in"):
        agreed(folder, **{name: value})


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([*PROMPTS, "a cat"], r"with 4 prompts.* have 3 others: prompt 3 is 'a cat' in the file and nothing there"),
        (["a red circle", "a dog", "two small blue squares"], r"prompt 1 is 'a dog' in the file and 'two small blue squares'"),
    ],
)
def test_other_prompts_are_refused(folder: Path, tmp_path: Path, lines: list[str], what: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    assert agreed(folder, prompts=str(file)).prompts == str(file)
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match=what):
        agreed(folder, prompts=str(file))
