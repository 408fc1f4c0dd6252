"""Model cards: what the hub reads, lines that run, scores of these weights alone, and no README of a user's replaced."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import randomise, tiny_student, tiny_teacher
from models.autoencoders import plain_vae
from own_teachers import TEXT, student_of, text_teacher
from tiny_pipelines import tiny_pipeline

import pyard
from pyard.diffusion.time_grid import TimeGrid
from pyard.models.card import CARD_NAME, SCORES_NAME, hub_name, student_card
from pyard.models.codec import LatentCodec
from pyard.models.student import Student
from pyard.teachers import load_teacher


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """What the hub reads, and the whole card."""
    text = (folder / CARD_NAME).read_text(encoding="utf-8")
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1]), text


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the card's lines leave, run in the card's folder."""
    code = re.search(r"```python\n(.*?)```", card_of(folder)[1], re.DOTALL)
    assert code is not None
    assert len(code[1].strip().splitlines()) <= 5
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code[1], names)
    return names


def text_student(folder: Path) -> Student:
    teacher = load_teacher(tiny_pipeline("pixart_sigma", folder))
    student = Student.from_teacher(
        teacher, TimeGrid.build(teacher.schedule, 2, 4), history_layers=1, output="jump", heads="shared",
        text=teacher.text_source(),
    )  # fmt: skip
    randomise(student, 3)
    return student.eval()


def test_the_lines_draw_what_the_student_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student(4, history_layers=2)
    student.save_pretrained(tmp_path / "student")
    front, text = card_of(tmp_path / "student")
    assert front["library_name"] == "pyard"
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert "pyard" in front["tags"]
    assert "base_model" not in front
    assert "| steps | 4 |" in text
    assert f"`{student.config.teacher_fingerprint}`" in text
    drawn = run_card(tmp_path / "student", monkeypatch)["samples"]
    assert torch.equal(drawn, pyard.sample(student, labels=[0, 1, 2, 3], seed=0))
    assert drawn.std() > 0.01


@pytest.mark.parametrize("has_vae", [False, True])
def test_the_lines_of_a_pipeline_draw(has_vae: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student(2, history_layers=1)
    if has_vae:
        student.codec = LatentCodec(plain_vae())
    pyard.ARDPipeline(student).save_pretrained(tmp_path)
    assert not (tmp_path / "student" / CARD_NAME).exists(), "one card is enough"
    assert len(run_card(tmp_path, monkeypatch)["images"]) == 4


def test_the_lines_of_a_text_to_image_student_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = text_student(tmp_path / "models--owner--tiny" / "snapshots" / "0123")
    student.save_pretrained(tmp_path / "student")
    front, text = card_of(tmp_path / "student")
    assert front["pipeline_tag"] == "text-to-image"
    assert front["base_model"] == "owner/tiny"
    assert "PixArt" in text
    image = run_card(tmp_path / "student", monkeypatch)["image"]
    pyard.ARDPipeline.from_pretrained(tmp_path / "student").save_pretrained(tmp_path / "pipeline")
    again = run_card(tmp_path / "pipeline", monkeypatch)["image"]
    assert image.size == again.size
    on_hub = student_card(student, "someone/student")
    assert '"someone/student", pipeline="path/to/0123"' in on_hub, "the teacher's folder is on the disk it was trained on"


def test_a_network_of_one_s_own_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student_of(text_teacher(), num_steps=2).save_pretrained(tmp_path)
    assert f'network="{TEXT}"' in card_of(tmp_path)[1]
    assert run_card(tmp_path, monkeypatch)["samples"].shape[0] == 4


def test_a_readme_of_one_s_own_stays(tmp_path: Path) -> None:
    student = tiny_student(4, history_layers=2)
    for save in (student.save_pretrained, pyard.ARDPipeline(student).save_pretrained):
        folder = tmp_path / str(save.__qualname__)
        save(folder)
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
        (folder / CARD_NAME).write_text("old card", encoding="utf-8")
        save(folder)
        assert (folder / CARD_NAME).read_text(encoding="utf-8") == "old card"
        (folder / CARD_NAME).write_text(card.replace("4 |", "5 |"), encoding="utf-8")
        save(folder)
        assert (folder / CARD_NAME).read_text(encoding="utf-8") == card


def test_scores_follow_the_weights_that_were_measured(tmp_path: Path) -> None:
    teacher = tiny_teacher(in_channels=1, num_classes=10)
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 4, 6), history_layers=2)
    randomise(student, seed=3)
    student.eval().save_pretrained(tmp_path / "run" / "student")
    (tmp_path / "mine").mkdir()
    student.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / CARD_NAME).write_text("mine", encoding="utf-8")
    found = pyard.evaluate([str(tmp_path / "run"), str(tmp_path / "mine")], teacher, count=20, teacher_steps=3, progress=False)
    error = f"{found.rows[1].endpoint_mse:.4f}"
    assert f"| {error} |" in card_of(tmp_path / "run" / "student")[1]
    assert "20 samples a row" in card_of(tmp_path / "run" / "student")[1]
    assert (tmp_path / "mine" / CARD_NAME).read_text(encoding="utf-8") == "mine"

    loaded = Student.from_pretrained(tmp_path / "run")
    pyard.ARDPipeline(loaded).save_pretrained(tmp_path / "pipe")
    assert f"| {error} |" in card_of(tmp_path / "pipe")[1]
    loaded.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / SCORES_NAME).read_text())["evaluation"]["rows"][1]["name"] == "student"
    with torch.no_grad():
        next(loaded.parameters()).add_(0.1)
    loaded.save_pretrained(tmp_path / "copy")
    assert "Scores" not in card_of(tmp_path / "copy")[1]
    assert not (tmp_path / "copy" / SCORES_NAME).exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"table": 3}', '{"table": [["", 1]], "weights": "a", "about": "b"}'])
def test_damaged_scores_are_none(content: str, tmp_path: Path) -> None:
    tiny_student(4, history_layers=2).save_pretrained(tmp_path)
    (tmp_path / SCORES_NAME).write_text(content, encoding="utf-8")
    assert Student.from_pretrained(tmp_path).scores is None


def test_a_base_is_named_by_the_hub_s_cache_alone() -> None:
    assert hub_name("/home/me/.cache/huggingface/hub/models--black-forest-labs--FLUX.1-dev/snapshots/0abc") == (
        "black-forest-labs/FLUX.1-dev"
    )
    assert hub_name("/data/models--mine") is None
