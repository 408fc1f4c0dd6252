"""The ARD authors' checkpoints against golden vectors of their model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from factories import randomise
from golden import TOLERANCE, golden, golden_file, relative_error

from pyard.errors import InputError
from pyard.models.dit.ard_checkpoint import load_ard_student, save_ard_student
from pyard.models.history import ConcatenatingCache
from pyard.models.student import Student


@pytest.fixture(scope="module")
def student() -> Student:
    return load_ard_student(golden_file("student_weights"), history_layers=2, num_heads=4)


@torch.inference_mode()
def test_parallel_pass_is_the_golden_one(student):
    io = golden("student_io")
    history = torch.stack([io["noise"], io["history_1"], io["history_2"], io["history_3"]], dim=1)
    out = student(history, io["label"])
    for s in range(4):
        assert relative_error(out[:, s], io[f"forward_out_{s}"][:, :4]) < TOLERANCE, s


@torch.inference_mode()
def test_cached_rollout_is_the_golden_one(student):
    io = golden("student_io")
    for cache in (None, ConcatenatingCache()):
        for s, prediction in enumerate(student.rollout(io["noise"], io["label"], cache)):
            assert relative_error(prediction, io[f"rollout_{s}"]) < TOLERANCE, s


@torch.inference_mode()
def test_an_exported_student_is_the_same_student(student, tmp_path: Path):
    io = golden("student_io")
    expected = list(student.rollout(io["noise"], io["label"]))
    save_ard_student(student, tmp_path / "student.pt")
    content = torch.load(tmp_path / "student.pt", weights_only=True)
    assert set(content) == {"model", "ema", "opt"}
    names = set(golden("student_weights"))
    assert set(content["ema"]) == names
    # Their optimizer takes "opt" back.
    parameters = [torch.nn.Parameter(tensor) for tensor in content["model"].values()]
    torch.optim.AdamW(parameters).load_state_dict(content["opt"])
    original = golden("student_weights")
    for name in names - {n for n in names if ".linear." in n}:
        assert torch.equal(content["ema"][name], original[name]), name
    again = load_ard_student(tmp_path / "student.pt", history_layers=2, num_heads=4)
    assert all(torch.equal(a, b) for a, b in zip(again.rollout(io["noise"], io["label"]), expected, strict=True))
    randomise(again)
    assert not torch.equal(list(again.rollout(io["noise"], io["label"]))[-1], expected[-1])


def test_a_shared_head_is_written_once_for_each_step(student, tmp_path: Path):
    shared = Student(dataclasses.replace(student.config, heads="shared"))
    randomise(shared)
    save_ard_student(shared, tmp_path / "student.safetensors")
    again = load_ard_student(tmp_path / "student.safetensors", history_layers=2, num_heads=4)
    noise, labels = torch.randn(2, 4, 32, 32), torch.tensor([0, 9])
    with torch.inference_mode():
        for ours, theirs in zip(shared.rollout(noise, labels), again.rollout(noise, labels), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(mask="anchor"), "mask is anchor instead of causal"),
    (dict(history_bias=-1.0), "history_bias is -1.0 instead of None"),
    (dict(target="state", output="jump"), "target is state instead of denoised; output is jump instead of direct"),
])  # fmt: skip
def test_what_their_code_would_not_do_is_refused(student, tmp_path: Path, changes, message):
    with pytest.raises(InputError, match=message):
        save_ard_student(Student(dataclasses.replace(student.config, **changes)), tmp_path / "student.pt")
