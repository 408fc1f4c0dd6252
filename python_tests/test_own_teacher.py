"""The code of docs/own-teacher.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import relative_error

from pyard import Student, TimeGrid
from pyard.diffusion.solvers import solve
from pyard.errors import InputError
from pyard.models.lora import add_lora
from pyard.teachers.dit import DiTTeacher

PAGE = Path(__file__).parents[1] / "docs" / "own-teacher.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
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
    grid = TimeGrid.build(teacher.schedule, 3, 3)
    jumping = Student.from_teacher(teacher, grid, history_layers=0, target="state", output="jump")
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 9])
    for ours, (theirs, _) in zip(jumping.rollout(noise, labels), solve(teacher, noise, labels, 3), strict=True):
        assert relative_error(ours, theirs) < 1e-5
    student = Student.from_teacher(teacher, grid, history_layers=2, mask="anchor")
    rollout = list(student.rollout(noise, labels))
    seen = torch.stack([noise, *rollout[:-1]], dim=1)
    together = student(seen, labels)
    assert relative_error(torch.stack(rollout, dim=1), together) < 1e-5
    seen[:, 0] += 1  # the history is seen
    assert relative_error(student(seen, labels)[:, 2], together[:, 2]) > 1e-3


@torch.inference_mode()
def test_trained_saved_and_read_again_it_draws_the_same(page, tmp_path: Path):
    assert page["images"].shape == (3, 1, 8, 8)
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 9])
    *_, ours = page["student"].rollout(noise, labels)
    *_, again = page["again"].rollout(noise, labels)
    assert torch.equal(ours, again)
    with pytest.raises(InputError, match="do not fit"):
        Student.from_pretrained(page["folder"] / "run")
    page["teacher"].save_pretrained(tmp_path / "teacher")
    read = DiTTeacher.from_pretrained(tmp_path / "teacher", network=page["MyTransformer"])
    assert read.fingerprint == page["teacher"].fingerprint


def test_low_rank_training_finds_layers_by_their_names(page):
    student = Student.from_pretrained(page["folder"] / "run", network=page["MyTransformer"])
    add_lora(student, 2)
    assert sum("lora_A" in name for name, _ in student.named_parameters()) == 3  # the qkv of each block
    other = Student.from_pretrained(page["folder"] / "run", network=page["MyTransformer"])
    other.trunk.blocks = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(InputError, match="no layers named qkv"):
        add_lora(other, 2)
