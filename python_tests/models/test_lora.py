from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomise, tiny_student, tiny_teacher
from golden import relative_error
from safetensors.torch import load_file

from pyard import generate_trajectories, train
from pyard.errors import InputError
from pyard.models.lora import add_lora, merge_lora, merged
from pyard.models.student import Student
from pyard.training.config import TrainConfig
from pyard.training.sharded import consolidate

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


@pytest.mark.parametrize("heads", ["lora", "frozen"])
def test_output_layers_get_additions_or_nothing(heads: Any):
    student = tiny_student(3, history_layers=2, history_bias=-1.0)
    history, labels = torch.randn(2, 3, *student.sample_shape), torch.tensor([1, 4])
    with torch.no_grad():
        before = student(history, labels)
        add_lora(student, 2, heads)
        assert relative_error(student(history, labels), before) < 1e-5
        trained = [name for name, p in student.named_parameters() if p.requires_grad and name.startswith("heads.")]
        assert len(trained) == (2 * 2 * 3 if heads == "lora" else 0)  # two matrices of two layers of three heads
        assert all("lora_" in name for name in trained)
        last = student.trunk.last_linear(student.heads[-1])
        assert last.out_features == student.trunk.config.patch_size**2 * student.sample_shape[0]
        randomise(torch.nn.ParameterList(p for n, p in student.named_parameters() if "lora_" in n), seed=3)
        changed = student(history, labels)
        base = {name: p.clone() for name, p in student.named_parameters() if not p.requires_grad}
        whole = merged(student)
        assert relative_error(whole(history, labels), changed) < 1e-5
        assert relative_error(changed, before) > 1e-2
        assert torch.equal(student(history, labels), changed), "merging a copy changes nothing of what it shares"
        assert all(torch.equal(student.get_parameter(name), tensor) for name, tensor in base.items())


def test_a_shared_teacher_is_not_changed_by_training(tmp_path: Path):
    teacher = tiny_teacher()
    before = {name: p.clone() for name, p in teacher.network.named_parameters()}
    store = generate_trajectories(
        teacher, tmp_path / "store", 16, num_steps=2, teacher_steps=6, batch_size=8, shard_size=16, progress=False
    )
    student = train(teacher, store, out=tmp_path / "run", lora_rank=2, ema_decay=(0.9, 0.99), **RUN)
    assert all(torch.equal(p, before[name]) for name, p in teacher.network.named_parameters())
    assert not torch.equal(student.trunk.blocks[1].fc1.weight, teacher.network.trunk.blocks[1].fc1.weight)
    frozen = load_file(tmp_path / "run" / "checkpoints" / "step-0000006" / "ema-0.99.safetensors")
    assert all("lora_" in name or name.startswith("heads.") or name == "history_bias" for name in frozen)
    # A checkpoint's additions are added to the weights of the teacher that the settings name.
    with pytest.raises(InputError, match="names no teacher to add it to"):
        consolidate(tmp_path / "run", tmp_path / "whole")
    teacher.save_pretrained(tmp_path / "teacher")
    settings = tmp_path / "run" / "settings.yaml"
    settings.write_text(settings.read_text().replace("teacher: ''", f"teacher: {tmp_path / 'teacher'}"))
    whole = consolidate(tmp_path / "run", tmp_path / "whole")
    result = Student.from_pretrained(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), result.state_dict().values(), strict=True))
    other = tiny_teacher(seed=5)
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="is not the one that it was trained with"):
        consolidate(tmp_path / "run", tmp_path / "whole")


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(InputError, match="lora_rank is 0; expected at least 1"):
        add_lora(tiny_student(2, history_layers=1), 0)
    with pytest.raises(InputError, match="lora_heads is 'all'; expected one of whole, lora, frozen"):
        add_lora(tiny_student(2, history_layers=1), 2, "all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lora_heads is 'lora', but lora_rank is none"):
        TrainConfig(teacher="", out=Path(), lora_heads="lora")
    real = builtins.__import__

    def without_peft(name: str, *rest: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(InputError, match=r"pip install 'peft"):
        add_lora(tiny_student(2, history_layers=1), 2)
