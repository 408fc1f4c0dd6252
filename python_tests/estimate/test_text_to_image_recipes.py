"""The text-to-image recipes: their commands, their settings, and the costs that their comments state."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from pyard.cli.command_line import main
from pyard.estimate.recipe_cost import estimate
from pyard.teachers.published import outline_of
from pyard.training.config import TrainConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*-1024*.yaml"))
GPUS = 8


def comments(recipe: Path) -> list[str]:
    """The comment lines at its head, continued ones joined."""
    lines = [line.removeprefix("#") for line in recipe.read_text().splitlines() if line.startswith("#")]
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def flags_of(recipe: Path, command: str) -> list[str]:
    """The flags of the one line of its comments that has this command of pyard."""
    (line,) = (line for line in comments(recipe) if re.search(rf"pyard {command} ", line))
    return shlex.split(line.partition(f"pyard {command} ")[2])


def printed(command: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The settings that a command of pyard reads from flags."""
    assert main([command, *flags, "--print_config"]) == 0
    found: dict[str, object] = yaml.safe_load(capsys.readouterr().out)
    return found


def test_there_are_seven():
    assert [recipe.stem for recipe in RECIPES] == [
        "flux1-dev-1024-lora", "flux2-klein-1024-lora", "pixart-sigma-1024", "qwen-image-1024-lora", "sd35-medium-1024-lora",
        "sd35-medium-1024", "z-image-1024-lora",
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_its_commands_do_what_its_settings_say(recipe, capsys):
    config = TrainConfig.read(recipe)
    made = printed("trajectories", flags_of(recipe, "trajectories"), capsys)
    for flag, setting in (
        ("teacher", "teacher"), ("prompts", "prompts"), ("count", "num_trajectories"), ("keep", "trajectory_keep"),
        ("dtype", "trajectory_dtype"), ("precision", "trajectory_precision"),
    ):  # fmt: skip
        assert made[flag] == getattr(config, setting), flag
    trained = printed("train", flags_of(recipe, "train"), capsys)
    assert trained["trajectories"] == made["out"]
    for setting in ("num_steps", "lora_rank", "heads", "batch_size", "history_layers"):
        assert trained[setting] == getattr(config, setting)
    assert flags_of(recipe, "train")[:2] == ["--config", recipe.stem]
    (download,) = (line for line in comments(recipe) if "hf download" in line)
    repository, folder = shlex.split(download)[2], shlex.split(download)[4]
    assert folder == config.teacher
    pipeline = outline_of(repository).pipeline
    assert pipeline.name == outline_of(config.teacher).pipeline.name
    height, width = (8 * side for side in pipeline.shape_of(config.height, config.width)[1:])
    assert (height, width) == (1024, 1024)
    # What `train` decides and checks before it starts.
    resolved = config.resolved(pipeline.network.config.depth)
    assert resolved.output == "jump"
    assert config.batch_size % (GPUS * config.gradient_accumulation) == 0
    assert ("lora" in recipe.stem) == (config.lora_rank is not None) == (resolved.history_layers == 0)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_costs_what_its_comments_say_and_fits_the_gpus_that_they_name(recipe):
    flags = flags_of(recipe, "estimate")
    assert flags == [recipe.stem, "--device", "H100", "--gpus", str(GPUS)]
    found = estimate(Path(recipe.stem), device="H100", gpus=GPUS)
    stated = [line.strip() for line in comments(recipe) if re.match(r" +(disk|GPU-hours|memory) ", line)]
    assert len(stated) == len(found.summary) == 3
    for mine, theirs in zip(found.summary, stated, strict=True):
        numbers = [[float(number) for number in re.findall(r"\d+(?:\.\d+)?", line)] for line in (mine, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.03)  # what torch and PEFT keep differs between their versions
        assert re.sub(r"[\d.]+", "#", mine) == re.sub(r"[\d.]+", "#", theirs)
    assert found.fits(found.own_memory.total)
    batch = int(flags_of(recipe, "trajectories")[flags_of(recipe, "trajectories").index("--batch_size") + 1])
    assert found.fits(found.teacher_memory[batch])
