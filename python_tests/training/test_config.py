from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from factories import tiny_teacher

from pyard.cli.command_line import main
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.training import TrainConfig, train
from pyard.training.adversarial_config import DIGITS_DISCRIMINATORS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def parsed(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """What the command line hands to training."""
    seen: list[TrainConfig] = []
    monkeypatch.setattr("pyard.training.train_command", lambda config: seen.append(config))
    assert main(["train", *argv]) == 0
    return seen[0]


def test_there_are_recipes():
    assert sorted(recipe.stem for recipe in RECIPES) == [
        "digits", "digits-adversarial", "flux1-dev-1024-lora", "flux2-klein-1024-lora", "imagenet256-dit-xl2",
        "imagenet256-dit-xl2-adversarial", "imagenet256-sit-xl2", "imagenet512-dit-xl2", "pixart-sigma-1024",
        "qwen-image-1024-lora", "sd35-medium-1024", "sd35-medium-1024-lora", "z-image-1024-lora",
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_and_flags_override_them(recipe, tmp_path, monkeypatch):
    config = parsed(["--config", str(recipe), "--out", str(tmp_path), "--max-steps", "7"], monkeypatch)
    assert (config.max_steps, config.out) == (7, tmp_path)
    assert config.num_steps == yaml.safe_load(recipe.read_text(encoding="utf-8")).get("num_steps")
    if "imagenet" in recipe.stem:
        assert (config.history_layers, config.learning_rate, config.ema_decays) == (6, 1e-4, (0.9999,))
        assert config.batch_size == (48 if config.stage == "adversarial" else 64)
    if config.stage == "adversarial":
        # Each of 8 processes has whole virtual batches, or one has.
        share = config.batch_size // (8 if "imagenet" in recipe.stem else 1)
        assert share % config.adversarial.virtual_batch == 0
    assert dataclasses.replace(TrainConfig.read(recipe), out=tmp_path, max_steps=7) == config


def test_yaml_flags_and_python_say_the_same(tmp_path, monkeypatch):
    config = TrainConfig(
        teacher="t", out=tmp_path, ema_decay=(0.9, 0.99), num_steps=3, step_weights=(1.0, 2.0, 3.0), huber_c=0.1, compile=True
    )
    file = tmp_path / "settings.yaml"
    file.write_text(config.to_yaml())
    assert parsed(["--config", str(file)], monkeypatch) == config
    flags = ["--ema-decay", "[0.9, 0.99]", "--num-steps=3", "--step-weights", "[1, 2, 3]", "--huber-c", "0.1", "--compile"]
    assert parsed(["--teacher", "t", "--out", str(tmp_path), *flags], monkeypatch) == config


def test_settings_are_stored_resolved_and_make_the_same_run(tmp_path, monkeypatch):
    teacher = tiny_teacher(NoiseSchedule(kind="flow", prediction="velocity"))
    teacher.save_pretrained(tmp_path / "teacher")
    small = dict(num_steps=2, num_trajectories=16, teacher_steps=4, max_steps=2, batch_size=4, progress=False)
    train(tmp_path / "teacher", out=tmp_path / "run", **small)
    stored = parsed(["--config", str(tmp_path / "run" / "settings.yaml")], monkeypatch)
    assert stored.history_layers == 1  # resolved from the teacher's depth
    changed = tmp_path / "run" / "student" / "model.safetensors"
    before = changed.read_bytes()
    train(dataclasses.replace(stored, progress=False))  # the run folder accepts them as its own
    assert changed.read_bytes() == before


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_commands_of_a_recipe_give_its_name_and_converted_teachers(recipe):
    """As the pages do, so that they run anywhere."""
    head = recipe.read_text(encoding="utf-8").replace("\\\n#", "")
    (command,) = re.findall(r"^# .*pyard train (.*)", head, re.MULTILINE)
    words = command.split()
    assert words[words.index("--config") + 1] == recipe.stem
    if "imagenet" in recipe.stem:
        teacher = words[words.index("--teacher") + 1]
        assert teacher.startswith("teachers/")
        made = head if "adversarial" not in recipe.stem else (recipe.parent / "imagenet256-dit-xl2.yaml").read_text("utf-8")
        assert f"--out {teacher}\n" in made


@pytest.mark.parametrize(("settings", "message"), [
    (dict(ema_decy=0.9), "no setting 'ema_decy'; did you mean 'ema_decay'"),
    (dict(step_weights=[1.0, 2.0]), "expected 4 numbers"),
    (dict(step_weights=[0.0, 0.0, 0.0, 0.0]), "expected 4 numbers"),
    (dict(ema_decay=[0.9, 0.9]), "decays that differ"),
    (dict(rollout_probability=1.5), "rollout_probability is 1.5"),
    (dict(trajectory_keep="denoised"), "keep that, or both"),
    (dict(history_bias="never"), "history_bias is .never.; expected a number"),
    (dict(loss="l1"), "loss is 'l1'; expected one of mse, pseudo_huber"),
    (dict(keep_every=0), "keep_every is 0"),
    (dict(warmup_steps=5, lr_schedule="constant"), "has no warm-up"),
    (dict(gradient_accumulation=0), "gradient_accumulation is 0"),
])  # fmt: skip
def test_wrong_settings_are_named(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train("digits", out=tmp_path / "run", **settings)


def test_a_config_comes_alone(tmp_path):
    with pytest.raises(InputError, match="must be the only argument"):
        train(TrainConfig(teacher="digits", out=tmp_path), max_steps=3)
    with pytest.raises(InputError, match="out is missing"):
        train("digits")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), ("state", "jump", 1, -4.0)),
        (dict(history_layers=0), ("state", "jump", 0, None)),
        (dict(history_bias=None), ("state", "jump", 1, None)),
        (dict(history_bias=-1.5, output="direct"), ("state", "direct", 1, -1.5)),
        (dict(num_steps=2), ("state", "direct", 1, None)),
        (dict(target="denoised", history_layers=3), ("denoised", "direct", 3, None)),
    ],
    ids=str,
)
def test_what_is_left_open_is_decided(settings, expected):
    resolved = TrainConfig(teacher="digits", out=Path(), **settings).resolved(teacher_depth=4)
    assert (resolved.target, resolved.output, resolved.history_layers, resolved.history_bias) == expected
    assert resolved.resolved(teacher_depth=4) == resolved


def test_the_recipe_of_the_adversarial_stage_has_the_digits_discriminators():
    recipe = yaml.safe_load((ROOT / "recipes" / "digits-adversarial.yaml").read_text())
    assert recipe["adversarial"] == DIGITS_DISCRIMINATORS


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", np.int64(8), 8), ("learning_rate", np.float32(0.5), 0.5), ("learning_rate", 1, 1.0),
        ("mixed_precision", "bfloat16", "bf16"), ("mixed_precision", "float16", "fp16"), ("mixed_precision", False, "no"),
        ("window", "none", None), ("trackers", None, "none"), ("adam_betas", [0.5, 0.9], (0.5, 0.9)),
        ("ema_decay", np.array([0.9, 0.99]), (0.9, 0.99)), ("progress", np.True_, True),
    ],
    ids=str,
)  # fmt: skip
def test_settings_have_the_types_of_their_fields(name, value, expected):
    found = getattr(TrainConfig(teacher="", out=Path(), **{name: value}), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", "2"), ("batch_size", True), ("batch_size", 2.5), ("batch_size", 10_000), ("learning_rate", "5e-4"),
        ("learning_rate", float("nan")), ("mixed_precision", "fp8"), ("mixed_precision", True), ("output", "eps"),
        ("mixed_precision", "bf16-mixed"), ("heads", "each"), ("trackers", "wandbb"), ("adam_betas", (0.9,)),
        ("adam_betas", (0.9, 1.0)), ("step_weights", "snr"), ("progress", "yes"), ("weight_decay", -1.0), ("lora_rank", 0),
        ("history_layers", -1), ("mask", "full"), ("window", 3),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_in_one_line(name, value):
    with pytest.raises(InputError, match=name) as refused:
        TrainConfig(teacher="", out=Path(), **{name: value})
    assert "\n" not in str(refused.value)


def test_a_bare_no_in_a_recipe_is_what_its_reader_means(tmp_path):
    (tmp_path / "recipe.yaml").write_text("teacher: digits\nmixed_precision: no\n")
    assert TrainConfig.read(tmp_path / "recipe.yaml").mixed_precision == "no"
