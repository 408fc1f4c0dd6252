"""DiT's and SiT's own checkpoints against golden vectors, plain formulas and files as their training scripts write them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
from factories import randomise, tiny_config, tiny_teacher
from golden import TOLERANCE, golden, golden_file, relative_error
from safetensors.torch import load_file, save_file

from pyard import load_teacher
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import DiT
from pyard.models.dit.tensor_names import KNOWN_HEADS, join_checkpoint, read_config
from pyard.teachers.dit_checkpoint import load_checkpoint, save_checkpoint
from pyard.teachers.guidance import solve
from pyard.teachers.network_teacher import NetworkTeacher

SIT = NoiseSchedule(kind="flow", prediction="velocity")


@torch.inference_mode()
def test_a_dit_checkpoint_computes_the_golden_output():
    teacher = load_checkpoint(golden_file("teacher_weights"), family="dit", num_heads=4)
    io = golden("teacher_io")
    out = teacher.network(io["noise"], io["single_t"], io["label"])
    assert relative_error(out, io["single_out"]) < TOLERANCE
    assert teacher.network.config == DiTConfig(
        input_size=16, in_channels=4, out_channels=8, patch_size=2, hidden_size=96, depth=4, num_heads=4, num_classes=10
    )


def test_guided_ddim_trajectory_is_the_golden_one():
    teacher = load_checkpoint(golden_file("teacher_weights"), family="dit", num_heads=4)
    io = golden("teacher_io")
    visited = list(solve(teacher, io["noise"], io["label"], 25, cfg_scale=1.5, cfg_channels=3))
    for k in (20, 15, 10, 5, 0):  # counted down: k steps are left
        state, denoised = visited[24 - k]
        assert relative_error(state, io[f"state_{k}"]) < TOLERANCE, k
        assert relative_error(denoised, io[f"denoised_{k}"]) < TOLERANCE, k
    # Guiding all four channels is another trajectory.
    everything = list(solve(teacher, io["noise"], io["label"], 25, cfg_scale=1.5))
    assert relative_error(everything[24][0], io["state_0"]) > 50 * TOLERANCE


def test_an_imported_teacher_exports_the_same_file(tmp_path: Path):
    source = golden_file("teacher_weights")
    save_checkpoint(load_checkpoint(source, family="dit", num_heads=4), tmp_path / "again.safetensors")
    ours, theirs = load_file(tmp_path / "again.safetensors"), load_file(source)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def dit_tensors(**changes: object) -> dict[str, torch.Tensor]:
    network = DiT(tiny_config(out_channels=4, frequency_size=256, **changes))
    randomise(network)
    return join_checkpoint(network.trunk.state_dict(), [network.head.state_dict()], network.config)


def test_a_sit_checkpoint_is_a_flow_that_runs_the_other_way(tmp_path: Path):
    save_file(dit_tensors(), tmp_path / "SiT-T-2.safetensors")
    teacher = load_checkpoint(tmp_path / "SiT-T-2.safetensors", num_heads=2)
    assert teacher.schedule == SIT
    plain = load_checkpoint(tmp_path / "SiT-T-2.safetensors", num_heads=2, family="dit").network
    noise, labels = torch.randn(2, 2, 8, 8), torch.tensor([1, 4])
    # SiT's own Euler: from t = 0, noise, to t = 1, x <- x + v(x, t) dt.
    x, steps = noise, 8
    with torch.inference_mode():
        for k in range(steps):
            x = x + plain(x, torch.full((2,), k / steps), labels)[:, :2] / steps
    *_, (ours, _) = solve(teacher, noise, labels, steps)
    assert relative_error(ours, x) < 1e-5
    save_checkpoint(teacher, tmp_path / "again.safetensors")
    again, first = load_file(tmp_path / "again.safetensors"), dit_tensors()
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_training_checkpoints_are_read_with_their_arguments(tmp_path: Path):
    ema, model = dit_tensors(), {f"module.{k}": v + 1 for k, v in dit_tensors().items()}
    content = {"model": model, "ema": ema, "opt": {"state": {}}, "args": argparse.Namespace(model="SiT-S/2", lr=1e-4)}
    torch.save(content, tmp_path / "0100000.pt")
    teacher = load_teacher(tmp_path / "0100000.pt", num_heads=2)
    assert teacher.schedule == SIT
    assert torch.equal(teacher.network.trunk.label_embed.weight, ema["y_embedder.embedding_table.weight"])
    raw = load_checkpoint(tmp_path / "0100000.pt", num_heads=2, weights="model")
    assert torch.equal(raw.network.trunk.label_embed.weight, ema["y_embedder.embedding_table.weight"] + 1)


class Trainer:
    """Something of a training script that was pickled by accident."""


def test_pickled_objects_are_refused_with_a_way_out(tmp_path: Path):
    path = tmp_path / "DiT.pt"
    torch.save({"ema": dit_tensors(), "trainer": Trainer()}, path)
    with pytest.raises(InputError, match=r"only reads pickles with weights_only=True") as refusal:
        load_teacher(path, num_heads=2)
    assert "Trainer" in str(refusal.value)
    # The command in the message does what it says.
    command = str(refusal.value).split('python -c "')[1].split('"')[0]
    exec(command, {})
    assert load_teacher(path.with_suffix(".safetensors"), num_heads=2).num_classes == 5


@pytest.mark.parametrize(("width", "heads"), KNOWN_HEADS.items())
@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("input_size", [32, 64])
def test_sizes_of_published_models_are_read_off_their_tensors(width, heads, patch_size, input_size):
    depth = {384: 12, 768: 12, 1024: 24, 1152: 28}[width]
    with torch.device("meta"):
        network = DiT(DiTConfig(input_size, 4, patch_size, width, depth, heads, 1000, out_channels=8))
    tensors = {
        "x_embedder.proj.weight": network.trunk.patch_embed.weight.unflatten(1, (4, patch_size, patch_size)),
        "pos_embed": network.trunk.pos_embed[None],
        "final_layer.linear.weight": network.head.linear.weight,
        "y_embedder.embedding_table.weight": network.trunk.label_embed.weight,
        "t_embedder.mlp.0.weight": network.trunk.time_embed.fc1.weight,
        **{f"blocks.{i}.mlp.fc1.weight": block.fc1.weight for i, block in enumerate(network.trunk.blocks)},
    }
    assert read_config(tensors) == network.config


def test_an_mlp_of_any_width_is_read(tmp_path: Path):
    network = DiT(tiny_config(hidden_size=60, num_heads=2, mlp_ratio=123 / 60))  # 60 * (123 / 60) is below 123 in floats
    randomise(network)
    tensors = join_checkpoint(network.trunk.state_dict(), [network.head.state_dict()], network.config)
    assert tensors["blocks.0.mlp.fc1.weight"].shape == (123, 60)
    save_file(tensors, tmp_path / "dit.safetensors")
    again = load_checkpoint(tmp_path / "dit.safetensors", num_heads=2).network
    assert torch.equal(again.trunk.blocks[2].fc1.weight, network.trunk.blocks[2].fc1.weight)


def test_what_tensors_cannot_say_must_be_given(tmp_path: Path):
    save_file(dit_tensors(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="give family='dit' or family='sit'"):
        load_teacher(tmp_path / "model.safetensors", num_heads=2)
    with pytest.raises(InputError, match="give num_heads"):
        load_teacher(tmp_path / "model.safetensors", family="dit")
    without_null = load_teacher(tmp_path / "model.safetensors", family="dit", num_heads=2, num_classes=6)
    assert not without_null.network.config.has_null_label
    with pytest.raises(InputError, match="6 rows; expected num_classes"):
        load_teacher(tmp_path / "model.safetensors", family="dit", num_heads=2, num_classes=7)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda t: t.pop("blocks.1.attn.proj.bias"), "1 tensors are missing"),
    (lambda t: t.update(extra=torch.zeros(1)), "1 are unknown"),
    (lambda t: t.pop("pos_embed"), "there is no tensor 'pos_embed'"),
    (lambda t: t.update({k.replace("l_layer", "l_layer2"): v for k, v in dit_tensors().items() if "final" in k}),
     "load_ard_student"),
])  # fmt: skip
def test_files_that_are_no_dit_are_refused(tmp_path: Path, spoil, message):
    tensors = dit_tensors()
    spoil(tensors)
    save_file(tensors, tmp_path / "dit.safetensors")
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "dit.safetensors", num_heads=2)


def test_missing_and_damaged_files_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(tmp_path / "dit.pt")
    save_file(dit_tensors(), tmp_path / "dit.safetensors")
    whole = (tmp_path / "dit.safetensors").read_bytes()
    (tmp_path / "dit.safetensors").write_bytes(whole[:500])
    with pytest.raises(InputError, match="cut off"):
        load_checkpoint(tmp_path / "dit.safetensors")
    torch.save(dit_tensors(), tmp_path / "dit.pt")
    (tmp_path / "dit.pt").write_bytes((tmp_path / "dit.pt").read_bytes()[:500])
    with pytest.raises(InputError, match="cut off at 500 bytes"):
        load_checkpoint(tmp_path / "dit.pt")


def test_a_teacher_without_variance_is_written_with_zeros_there(tmp_path: Path):
    teacher = tiny_teacher(frequency_size=256)
    save_checkpoint(teacher, tmp_path / "dit.pt")
    again = load_checkpoint(tmp_path / "dit.pt", num_heads=2)
    assert again.network.config.out_channels == 4
    x, labels = torch.randn(2, 2, 8, 8), torch.tensor([0, 5])
    with torch.inference_mode():
        assert relative_error(again.predict(x, 500.0, labels), teacher.predict(x, 500.0, labels)) < 1e-6
        assert again.network(x, torch.tensor([500.0, 3.0]), labels)[:, 2:].abs().max() == 0


def test_settings_that_dit_fixes_otherwise_are_not_exported(tmp_path: Path):
    shifted = DiT(dataclasses.replace(tiny_config(frequency_size=256), freq_shift=1.0))
    with pytest.raises(InputError, match=r"freq_shift is 1\.0 instead of 0\.0"):
        save_checkpoint(NetworkTeacher(shifted, NoiseSchedule()), tmp_path / "dit.pt")
    assert not list(tmp_path.iterdir())
