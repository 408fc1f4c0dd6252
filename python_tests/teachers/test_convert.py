from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from factories import tiny_teacher
from golden import relative_error
from models.autoencoders import qwen_vae

from pyard import load_teacher
from pyard.cli.command_line import main
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.teachers.dit_checkpoint import save_checkpoint


def run(*words: str | Path) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_a_checkpoint_becomes_a_folder_and_a_checkpoint_again(kind, tmp_path: Path, capsys):
    schedule = NoiseSchedule() if kind == "dit" else NoiseSchedule(kind="flow", prediction="velocity")
    times = {} if kind == "dit" else dict(time_scale=-1.0, time_offset=1.0)
    teacher = tiny_teacher(schedule, frequency_size=256, out_channels=4, **times)
    teacher.save_pretrained(tmp_path / "first")
    assert run("convert", "--source", tmp_path / "first", "--to", "dit", "--out", tmp_path / "1.pt") == 0
    assert run("convert", "--source", tmp_path / "1.pt", "--out", tmp_path / "second") == 2
    assert "give --family dit or --family sit" in capsys.readouterr().err
    flags = ("--family", kind, "--num_heads", "2")
    assert run("convert", "--source", tmp_path / "1.pt", "--out", tmp_path / "second", *flags) == 0
    assert "3 layers of width 32, 2 heads, 16 tokens, samples of (2, 8, 8), 5 classes" in capsys.readouterr().out
    again = load_teacher(tmp_path / "second")
    assert again.fingerprint == teacher.fingerprint
    x, labels = torch.randn(2, 2, 8, 8), torch.tensor([0, 5])
    with torch.inference_mode():
        assert torch.equal(again.predict(x, 0.5, labels), teacher.predict(x, 0.5, labels))


def test_what_diffusers_cannot_hold_is_one_line(tmp_path: Path, capsys):
    tiny_teacher(frequency_size=256).save_pretrained(tmp_path / "first")
    assert run("convert", "--source", tmp_path / "first", "--to", "diffusers", "--out", tmp_path / "out") == 2
    assert "freq_shift is 0.0, expected 1.0: diffusers fixes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    tiny_teacher(frequency_size=256, freq_shift=1.0).save_pretrained(tmp_path / "second")
    assert run("convert", "--source", tmp_path / "second", "--to", "diffusers", "--out", tmp_path / "out") == 0
    assert load_teacher(tmp_path / "out" / "transformer").fingerprint == load_teacher(tmp_path / "second").fingerprint


def test_a_vae_can_be_given_to_a_checkpoint_that_comes_without(tmp_path: Path, capsys):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    vae.save_pretrained(tmp_path / "vae")
    save_checkpoint(tiny_teacher(frequency_size=256), tmp_path / "DiT.pt")
    words = (
        "convert",
        "--source",
        tmp_path / "DiT.pt",
        "--num_heads",
        "2",
        "--vae",
        tmp_path / "vae",
        "--out",
        tmp_path / "out",
    )
    assert run(*words) == 0
    codec = load_teacher(tmp_path / "out").codec
    assert codec is not None
    latents = torch.randn(1, 2, 8, 8)
    with torch.inference_mode():
        assert relative_error(codec.decode(latents), vae.eval().decode(latents / 0.18215).sample) < 1e-6
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(tmp_path / "vae")
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert "latents of 4 channels; found samples of shape (2, 8, 8)" in error
    assert error.count("\n") == 1
    qwen_vae().save_pretrained(tmp_path / "qwen")
    words = tuple(tmp_path / "qwen" if word == tmp_path / "vae" else word for word in words)
    assert run(*words) == 0
    assert type(load_teacher(tmp_path / "out").codec.vae).__name__ == "AutoencoderKLQwenImage"  # type: ignore[union-attr]


def test_names_and_precision_reach_the_sampler_from_the_command_line(tmp_path: Path, capsys):
    from pyard import Student, TimeGrid
    from pyard.teachers.network_teacher import NetworkTeacher

    teacher = tiny_teacher()
    named = NetworkTeacher(teacher.network, teacher.schedule, class_names=list("abcde"))
    Student.from_teacher(named, TimeGrid.build(teacher.schedule, 2, 6), history_layers=1).save_pretrained(tmp_path / "s")
    words = ("sample", "--student", tmp_path / "s", "--out", tmp_path / "x.npz", "--dtype", "bfloat16")
    assert run(*words, "--labels", '["b", "e", 0]') == 0
    assert "3 samples" in capsys.readouterr().out
    assert run(*words, "--labels", '["z"]') == 2
    assert "no class is named 'z'" in capsys.readouterr().err
    assert run("describe", "--student", tmp_path / "s") == 0
    assert "cost of history" in capsys.readouterr().out


def test_a_checkpoint_that_is_there_is_not_replaced(tmp_path: Path, capsys):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    (tmp_path / "0100000.pt").write_bytes(b"precious")
    for name in ("0100000.pt", "link.safetensors"):
        argv = ["convert", str(tmp_path / "teacher"), "--to", "dit", "--out", str(tmp_path / name)]
        assert main(argv) == 2
        assert "is there and would be replaced" in capsys.readouterr().err
    assert (tmp_path / "0100000.pt").read_bytes() == b"precious"
