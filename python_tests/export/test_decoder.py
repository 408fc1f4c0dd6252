"""An exported student draws the pictures of its own VAE, or of another, or latents, as asked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import tiny_student, tiny_teacher
from models.autoencoders import MEAN, STD, of_channels, plain_vae, qwen_vae, wan_vae

import pyard
from pyard import export
from pyard.cli.command_line import main
from pyard.export.decoder import Decoder
from pyard.models.codec import LatentCodec
from pyard.models.student import Student
from pyard.runtime import OnnxStudent


@torch.no_grad()
def expected_pictures(vae: Any, latents: torch.Tensor) -> np.ndarray:
    """uint8 [n, H, W, 3], by the formulas of diffusers' pipelines, without pyard's codec."""
    config = vae.config
    if config.get("latents_mean") is None:
        images = vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0), return_dict=False)[0]
    elif "scaling_factor" in config:  # pipeline_stable_diffusion_xl
        mean, std = (torch.tensor(config[name]).view(1, 2, 1, 1) for name in ("latents_mean", "latents_std"))
        images = vae.decode(latents * std / config.scaling_factor + mean, return_dict=False)[0]
    else:  # pipeline_qwenimage, pipeline_wan
        mean, std = (of_channels(config[name]) for name in ("latents_mean", "latents_std"))
        images = vae.decode(latents[:, :, None] / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()


VAES = {
    "shifted": lambda: plain_vae(shift_factor=0.2),
    "statistics": lambda: plain_vae(latents_mean=MEAN, latents_std=STD),
    "qwen": qwen_vae,
    "wan": wan_vae,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form"), [("statistics", "step"), ("shifted", "sampler"), ("qwen", "sampler"), ("wan", "step")]
)
def test_a_student_is_exported_with_its_own_vae(kind: str, form: Any, tmp_path: Path) -> None:
    vae, student = VAES[kind](), tiny_student(2, history_layers=1)
    student.codec = LatentCodec(vae)
    expected = expected_pictures(vae, pyard.sample(student, [0, 3], seed=4, latents=True))
    assert expected.std() > 5
    parity = export.export_onnx(student, tmp_path / "student.onnx", form=form)
    assert all(error <= 1.01 / 255 for error in parity.values())
    exported = OnnxStudent(tmp_path / "student.onnx")
    assert exported.info.pictures
    assert exported.info.output_shape == (16, 16, 3)
    pictures = exported.sample([0, 3], seed=4, batch_size=1)
    assert pictures.dtype == np.uint8
    # One level where a value lies between two; a wrong scaling is many, and everywhere.
    assert np.abs(pictures.astype(int) - expected).max() <= 1
    assert (pictures == expected).mean() > 0.99
    if form == "step":
        first, last = exported.stream([0, 3], seed=4)
        assert first.shape == last.shape == (2, 16, 16, 3)
        np.testing.assert_array_equal(last, exported.sample([0, 3], seed=4))


@pytest.mark.slow
def test_a_packed_student_is_exported_with_its_vae(tmp_path: Path) -> None:
    """Its samples [8, 8, 8] hold latents [2, 16, 16]."""
    vae, teacher = plain_vae(), tiny_teacher(in_channels=8)
    student = Student.from_teacher(teacher, pyard.TimeGrid.build(teacher.schedule, 1), history_layers=0)
    student.codec = LatentCodec(vae)
    latents = pyard.sample(student, [3], seed=4, latents=True)
    expected = expected_pictures(vae, torch.nn.functional.pixel_shuffle(latents, 2))
    export.export_onnx(student, tmp_path / "student.onnx")
    pictures = OnnxStudent(tmp_path / "student.onnx").sample([3], seed=4)
    assert pictures.shape == (1, 32, 32, 3)
    assert np.abs(pictures.astype(int) - expected).max() <= 1


def test_the_decoder_is_compared_with_the_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that scales otherwise than `LatentCodec.decode` is not written."""
    student = tiny_student(1, history_layers=0)
    student.codec = LatentCodec(plain_vae())
    traced = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, latent: traced(self, 0.9 * latent))
    with pytest.raises(RuntimeError, match="differs from PyTorch"):
        export.export_onnx(student, tmp_path / "student.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_command_line_chooses_the_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, other = plain_vae(), plain_vae(scaling_factor=0.6)
    student = tiny_student(1, history_layers=0)
    student.codec = LatentCodec(own)
    student.save_pretrained(tmp_path / "student")
    other.save_pretrained(tmp_path / "other")
    latents = pyard.sample(student, [3], seed=2, latents=True)
    wrong = plain_vae(latent_channels=3)
    wrong.save_pretrained(tmp_path / "wrong")

    def exported(*words: str) -> OnnxStudent:
        file = tmp_path / "out" / "student.onnx"
        assert main(["export", "--onnx", str(file), "--student", str(tmp_path / "student"), *words]) == 0
        return OnnxStudent(file)

    for words, vae in (((), own), (("--vae", str(tmp_path / "other")), other)):
        pictures = exported(*words).sample([3], seed=2)
        assert np.abs(pictures.astype(int) - expected_pictures(vae, latents)).max() <= 1
    without = exported("--vae", "none")
    assert not without.info.pictures
    np.testing.assert_allclose(without.sample([3], seed=2), latents.numpy(), atol=1e-4 * float(latents.abs().max()))
    capsys.readouterr()
    for name, message in (("wrong", "latents of 3 channels"), ("nowhere", "there is no config.json")):
        words = ["--student", str(tmp_path / "student"), "--vae", str(tmp_path / name)]
        assert main(["export", "--onnx", str(tmp_path / "out" / "student.onnx"), *words]) == 2
        error = capsys.readouterr().err
        assert "--vae" in error
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.slow
def test_a_vae_in_half_precision_is_left_as_it_is(tmp_path: Path) -> None:
    student = tiny_student(1, history_layers=0)
    vae = plain_vae().to(torch.bfloat16)
    export.export_onnx(student, tmp_path / "student.onnx", vae=vae)
    assert vae.dtype == torch.bfloat16
    assert OnnxStudent(tmp_path / "student.onnx").info.pictures
