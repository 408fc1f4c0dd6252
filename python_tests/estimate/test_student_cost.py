from __future__ import annotations

from pathlib import Path

import pytest
from dit_formulas import flops_of_passes
from factories import tiny_student
from own_backbone import own_module, own_teacher

import pyard
from pyard.cli.command_line import main
from pyard.diffusion.time_grid import TimeGrid
from pyard.estimate.student_cost import count
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig
from pyard.teachers.published import network_of


def xl_student(history_layers: int, num_steps: int = 4) -> Student:
    """DiT-XL/2 at 256 pixels, without memory."""
    network, schedule = network_of("DiT-XL/2")
    trunk, head = network.trunk.for_student(network.head)
    grid = TimeGrid.build(schedule, num_steps)
    config = StudentConfig(trunk.config, grid, schedule, history_layers=history_layers, history_bias=None)
    return Student(config, trunk, head).to("meta")


def test_the_history_of_the_paper_costs_1_15_percent():
    description = count(xl_student(6))
    # 6 layers x (0+1+2+3) earlier blocks x two products of [256, 1152] x [1152, 256], over 4 passes of DiT-XL/2.
    extra = 6 * (0 + 1 + 2 + 3) * 2 * 2 * 256 * 256 * 1152
    assert description.flops_per_image - description.flops_without_history == extra
    assert description.history_percent == pytest.approx(1.15, abs=0.005)
    # The DiT paper's 118.64 GFLOPs (multiply-adds) a pass.
    assert description.flops_without_history / 4 / 2 == pytest.approx(118.64e9, rel=2e-3)
    assert description.cache_bytes == 2 * 6 * 4 * 256 * 1152 * 4
    # 675 M of the teacher, less its variance, plus three more heads.
    assert description.parameters == pytest.approx(683e6, rel=3e-3)


def test_torch_counts_what_the_formula_says_of_dit_xl():
    with_history, without = xl_student(6), xl_student(0)
    counted = count(with_history).flops_per_image
    assert counted == flops_of_passes(with_history.config)
    assert 100 * (counted / flops_of_passes(without.config) - 1) == pytest.approx(1.15, abs=0.005)


@pytest.mark.parametrize("settings", [
    dict(history_layers=3), dict(history_layers=2, mask="window", window=2), dict(history_layers=2, mask="anchor"),
    dict(history_layers=1, mask="diagonal"), dict(history_layers=2, heads="shared", history_bias=-1.0),
], ids=str)  # fmt: skip
def test_the_formula_is_what_torch_counts(settings):
    student = tiny_student(5, **settings)
    assert flops_of_passes(student.config) == count(student).flops_per_image


def test_describe_prints_and_returns_the_numbers(capsys, tmp_path: Path):
    student = tiny_student(3, history_layers=2)
    student.save_pretrained(tmp_path)
    assert main(["describe", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    description = pyard.describe(tmp_path)
    assert capsys.readouterr().out == printed
    assert f"+{description.history_percent:.2f} %" in printed
    assert "cache per image    24.6 kB" in printed
    assert description.cache_bytes == 2 * 2 * 3 * 16 * 32 * 4
    assert description == count(student)
    for parameter in student.trunk.parameters():
        parameter.requires_grad_(False)
    assert count(student).trainable_parameters == sum(p.numel() for p in student.heads.parameters())


def test_describe_reads_a_backbone_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    teacher = own_teacher(own_module(tmp_path))
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 3, 3), history_layers=2)
    student.save_pretrained("run/student")
    assert main(["describe", "run"]) == 2
    assert "--network a_users_backbone:MyBackbone" in capsys.readouterr().err
    assert main(["describe", "run", "--network", "a_users_backbone:MyBackbone"]) == 0
    description = count(student)
    assert str(description) in capsys.readouterr().out
    assert description.cache_bytes == 2 * 2 * 3 * 32 * 16 * 4
    # Two layers x (0 + 1 + 2) earlier steps x two products of [32, 16] x [16, 32].
    assert description.flops_per_image - description.flops_without_history == 2 * 3 * 2 * 2 * 32 * 32 * 16
