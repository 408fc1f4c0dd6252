from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomise, tiny_student, tiny_teacher
from golden import relative_error

from pyard import generate_trajectories, train
from pyard.errors import InputError
from pyard.models.lora import add_lora, merge_lora
from pyard.models.student import Student

RUN: dict[str, Any] = dict(
    num_steps=2, history_layers=1, max_steps=6, batch_size=4, save_every=2, log_every=1, learning_rate=1e-2, progress=False
)


def test_fresh_additions_change_nothing_and_merged_ones_stay():
    student = tiny_student(3, history_layers=2, history_bias=-1.0)
    history, labels = torch.randn(2, 3, *student.sample_shape), torch.tensor([1, 4])
    with torch.no_grad():
        before = student(history, labels)
        names = set(student.state_dict())
        add_lora(student, 4)
        # Up to rounding: a linear layer that is no plain one any more adds its bias by itself.
        torch.testing.assert_close(student(history, labels), before, rtol=1e-5, atol=1e-5)
        trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        assert all("lora_" in name or name.startswith("heads.") or name == "history_bias" for name in trained)
        # Two matrices for each of qkv, proj, fc1, fc2, modulation of 3 blocks.
        assert sum("lora_" in name for name in trained) == 2 * 5 * 3
        randomise(torch.nn.ParameterList(p for n, p in student.named_parameters() if "lora_" in n), seed=3)
        changed = student(history, labels)
        assert relative_error(changed, before) > 1e-2
        rollout = list(student.rollout(history[:, 0], labels))
        seen = torch.stack([history[:, 0], *rollout[:-1]], dim=1)
        assert relative_error(torch.stack(rollout, dim=1), student(seen, labels)) < 1e-5
        merge_lora(student)
        assert set(student.state_dict()) == names
        assert relative_error(student(history, labels), changed) < 1e-5
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_training_low_rank_writes_a_plain_student_that_resumes_exactly(tmp_path: Path):
    teacher = tiny_teacher()
    store = generate_trajectories(
        teacher, tmp_path / "store", 16, num_steps=2, teacher_steps=6, batch_size=8, shard_size=16, progress=False
    )
    student = train(teacher, store, out=tmp_path / "run", lora_rank=2, **RUN)
    saved = Student.from_pretrained(tmp_path / "run")
    noise, labels = torch.randn(2, *teacher.sample_shape), torch.tensor([0, 3])
    with torch.inference_mode():
        for ours, theirs in zip(student.rollout(noise, labels), saved.rollout(noise, labels), strict=True):
            assert torch.equal(ours, theirs)
    # Embeddings are the teacher's to the bit; a block moved by a matrix of rank 2.
    network = teacher.network
    assert torch.equal(saved.trunk.label_embed.weight, network.trunk.label_embed.weight)
    moved = (saved.trunk.blocks[1].fc1.weight - network.trunk.blocks[1].fc1.weight).detach()
    values = torch.linalg.svdvals(moved)
    assert values[1] > 1e-4
    assert values[2] < 1e-3 * values[0]
    # Stopped after 4 of 6 updates and resumed.
    newest = tmp_path / "run" / "checkpoints" / "step-0000006"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train(teacher, store, out=tmp_path / "run", lora_rank=2, **RUN)
    again = Student.from_pretrained(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), saved.state_dict().values(), strict=True))


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(InputError, match="lora_rank is 0; expected at least 1"):
        add_lora(tiny_student(2, history_layers=1), 0)
    real = builtins.__import__

    def without_peft(name: str, *rest: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(InputError, match=r"pip install 'peft"):
        add_lora(tiny_student(2, history_layers=1), 2)
