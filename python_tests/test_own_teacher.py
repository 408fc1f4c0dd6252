"""The code of docs/own-teacher.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomise
from golden import relative_error

from pyard import Student, TimeGrid
from pyard.conditions import Condition
from pyard.errors import InputError
from pyard.models.lora import add_lora
from pyard.teachers.guidance import solve
from pyard.teachers.network_teacher import NetworkTeacher

PAGE = Path(__file__).parents[1] / "docs" / "own-teacher.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    assert len(blocks[1].strip().splitlines()) <= 30  # "about 30 lines"
    folder = tmp_path_factory.mktemp("own")
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        for block in blocks:
            exec(block, names)
    return names | {"folder": folder}


def test_any_network_generates_trajectories(page):
    assert page["store"].count == 16
    torch.manual_seed(1)
    network = page["MyNetwork"]()
    fingerprint = page["MyTeacher"](network).fingerprint
    assert page["MyTeacher"](network).fingerprint == fingerprint
    assert page["store"].manifest.teacher_fingerprint != fingerprint  # other weights


@torch.inference_mode()
def test_a_transformer_of_your_own_is_a_student(page):
    teacher = page["teacher"]
    randomise(teacher.network)
    grid = TimeGrid.build(teacher.schedule, 3, 3)
    jumping = Student.from_teacher(teacher, grid, history_layers=0, target="state", output="jump")
    noise, numbers = torch.randn(2, 1, 8, 4), torch.tensor([3, 0])
    for ours, (theirs, _) in zip(jumping.rollout(noise, numbers), solve(teacher, noise, numbers, 3), strict=True):
        assert relative_error(ours, theirs) < 1e-5
    student = Student.from_teacher(teacher, grid, history_layers=2, mask="anchor", history_bias=-0.5)
    randomise(student, 1, std=0.5)
    rollout = list(student.rollout(noise, numbers))
    seen = torch.stack([noise, *rollout[:-1]], dim=1)
    together = student(seen, numbers)
    assert relative_error(torch.stack(rollout, dim=1), together) < 1e-5
    seen[:, 0] = torch.randn_like(seen[:, 0])  # the history is seen
    assert relative_error(student(seen, numbers)[:, 2], together[:, 2]) > 1e-3
    padded = Condition.cat([page["prompts"].take(numbers), page["prompts"].take([1])]).index([0, 1])
    assert padded["tokens"].shape[1] > page["prompts"].take(numbers)["tokens"].shape[1]
    assert relative_error(student(seen, padded), student(seen, numbers)) < 1e-5  # padding is none of the condition


@torch.inference_mode()
def test_trained_saved_and_read_again_it_draws_the_same(page, tmp_path: Path):
    assert page["images"].shape == (3, 1, 8, 4)
    noise, numbers = torch.randn(2, 1, 8, 4), torch.tensor([3, 0])
    *_, ours = page["student"].rollout(noise, numbers)
    *_, again = page["again"].rollout(noise, numbers)
    assert torch.equal(ours, again)
    with pytest.raises(InputError, match="give network="):
        Student.from_pretrained(page["folder"] / "run")
    page["teacher"].save_pretrained(tmp_path / "teacher")
    read = NetworkTeacher.from_pretrained(tmp_path / "teacher", network=page["MyBackbone"])
    fresh = NetworkTeacher(page["teacher"].network, page["teacher"].schedule, conditions=page["prompts"])
    assert read.fingerprint == fresh.fingerprint


def test_low_rank_training_finds_the_linear_layers_of_blocks(page):
    student = Student.from_pretrained(page["folder"] / "run", network=page["MyBackbone"])
    add_lora(student, 2)
    assert sum("lora_A" in name for name, _ in student.named_parameters()) == 3 * 6
    other = Student.from_pretrained(page["folder"] / "run", network=page["MyBackbone"])
    other.trunk.blocks = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(InputError, match="no linear layers"):
        add_lora(other, 2)
