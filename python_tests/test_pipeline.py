from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from factories import randomise, tiny_student, tiny_teacher
from golden import relative_error
from models.autoencoders import plain_vae, qwen_vae

import pyard
from pyard import ARDPipeline, Student, TimeGrid
from pyard.errors import InputError
from pyard.models.codec import LatentCodec
from pyard.pipeline import StudentModel
from pyard.teachers.network_teacher import NetworkTeacher


def tiny_vae() -> AutoencoderKL:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, scaling_factor=0.5)
    randomise(vae, 5)
    return vae.eval()


@pytest.fixture(scope="module")
def student() -> Student:
    teacher = tiny_teacher()
    named = NetworkTeacher(teacher.network, teacher.schedule, codec=LatentCodec(tiny_vae()), class_names=list("abcde"))
    student = Student.from_teacher(named, TimeGrid.build(teacher.schedule, 3, 9), history_layers=2)
    randomise(student, 2)
    return student.eval()


def test_a_saved_pipeline_draws_the_same(student, tmp_path: Path):
    pipe = ARDPipeline(student)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=["a", 4], generator=torch.manual_seed(3), output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert images.std() > 0.02
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["student"] == ["pyard.pipeline", "StudentModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert not (tmp_path / "pipe" / "student" / "vae").exists()
    again = ARDPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again(class_labels=["a", 4], generator=torch.manual_seed(3), output_type="np").images, images)
    assert isinstance(again.student, StudentModel)
    # The pipeline's folder is a student's folder too, VAE included.
    from_folder = Student.from_pretrained(tmp_path / "pipe")
    assert from_folder.config == student.config
    assert from_folder.codec is not None


def test_what_saves_memory_draws_the_same(student):
    def draw(pipe: ARDPipeline) -> np.ndarray:
        pipe.set_progress_bar_config(disable=True)
        return np.asarray(pipe(class_labels=[1, 4], generator=torch.manual_seed(3), output_type="np").images)

    images = draw(ARDPipeline(student, tiny_vae()))
    pipe = ARDPipeline(student, tiny_vae())
    pipe.enable_model_cpu_offload(device="cpu")
    moved: list[str] = []
    for name in ("student", "vae"):
        hook = getattr(pipe, name)._hf_hook
        usual = hook.pre_forward
        hook.pre_forward = lambda *inputs, name=name, usual=usual: moved.append(name) or usual(*inputs)
    assert np.array_equal(draw(pipe), images)
    assert moved == ["student", "vae"]
    with pytest.raises(InputError, match="use enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload(device="cpu")

    pipe = ARDPipeline(student, tiny_vae())
    pipe.vae.enable_slicing()
    decoded: list[int] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, inputs: decoded.append(len(inputs[0])))
    assert np.abs(draw(pipe) - images).max() < 1e-5
    assert decoded == [1, 1]
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size = pipe.vae.tile_sample_min_size = 4
    decoded.clear()
    assert draw(pipe).shape == images.shape
    assert len(decoded) > 2


def test_a_class_that_would_run_the_code_of_a_folder_is_refused(student, tmp_path: Path):
    ARDPipeline(student).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    os.mkfifo(tmp_path / "vae" / "a.json")
    with pytest.raises(InputError, match=r"a\.json"):
        ARDPipeline.from_pretrained(tmp_path)
    (tmp_path / "vae" / "a.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "AutoModel"]}))
    with pytest.raises(InputError, match=r"text_encoder is .*AutoModel.*expected the name of a transformers class"):
        ARDPipeline.from_pretrained(tmp_path)


def test_what_train_writes_is_read_as_a_pipeline(student, tmp_path: Path):
    student.save_pretrained(tmp_path / "run" / "student")
    pipe = ARDPipeline.from_pretrained(tmp_path / "run")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 2, 8, 8)
    latents = pipe(class_labels=[1, 2], latents=noise, output_type="latent", return_dict=False)[0]
    with torch.inference_mode():
        *_, expected = student.rollout(noise, torch.tensor([1, 2]))
    assert torch.equal(latents, expected)
    images = pipe(class_labels=[1, 2], latents=noise, output_type="pt").images
    assert student.codec is not None
    assert relative_error(images, (student.codec.decode(expected) / 2 + 0.5).clamp(0, 1)) < 1e-6
    pictures = pipe(class_labels=[1, 2], latents=noise).images
    assert [picture.size for picture in pictures] == [(8, 8), (8, 8)]


def test_a_pipeline_decodes_with_a_vae_of_videos(tmp_path: Path, caplog):
    student = tiny_student(2, history_layers=1)
    student.codec = LatentCodec(qwen_vae())
    ARDPipeline(student).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKLQwenImage"]
    pipe = ARDPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 2, 8, 8)
    images = pipe(class_labels=[1, 2], latents=noise, output_type="pt").images
    with torch.inference_mode():
        *_, latents = student.rollout(noise, torch.tensor([1, 2]))
    expected = (student.codec.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.01
    assert relative_error(images, expected) < 1e-6
    assert not [record for record in caplog.records if "type" in record.message], "diffusers warns about the VAE's class"


def test_packed_tokens_keep_their_grid_in_a_pipeline(tmp_path: Path):
    """The grid is in the VAE's configuration, which diffusers carries along."""
    student = tiny_student(2, history_layers=1)
    student.codec = LatentCodec(plain_vae(), grid=(2, 3))
    ARDPipeline(student).save_pretrained(tmp_path)
    pipe = ARDPipeline.from_pretrained(tmp_path)
    assert pipe._images(torch.randn(1, 6, 8), "pt").shape == (1, 3, 8, 12)


def test_every_image_can_have_a_generator_of_its_own(student):
    pipe = ARDPipeline(student)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    together = pipe(class_labels=[0, 1], generator=generators, output_type="np").images
    alone = pipe(class_labels=[1], generator=torch.Generator().manual_seed(5), output_type="np").images
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_half_precision_is_asked_for_as_in_diffusers(student, tmp_path: Path):
    ARDPipeline(student).save_pretrained(tmp_path)
    pipe = ARDPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert next(pipe.student.parameters()).dtype == torch.bfloat16
    assert pipe.student.student.embed_times.dtype == torch.float32
    noise = torch.randn(2, 2, 8, 8)
    rough = pipe(class_labels=[0, 1], latents=noise, output_type="latent").images
    exact = ARDPipeline(student)(class_labels=[0, 1], latents=noise, output_type="latent").images
    assert relative_error(rough, exact) < 3e-2
    assert pipe.vae.dtype == torch.bfloat16
    images = pipe(class_labels=[0, 1], latents=noise, output_type="pt").images
    assert relative_error(images, ARDPipeline(student)(class_labels=[0, 1], latents=noise, output_type="pt").images) < 3e-2


def test_latents_without_a_vae_are_no_images(tmp_path: Path):
    pipe = ARDPipeline(tiny_student(2, history_layers=1))
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    pipe = ARDPipeline.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no VAE"):
        pipe(class_labels=[0])
    assert pipe(class_labels=[0], output_type="latent").images.shape == (1, 2, 8, 8)
    with pytest.raises(InputError, match="expected 0 to 4"):
        pipe(class_labels=[5])


def test_importing_pyard_imports_no_diffusers():
    import subprocess

    code = "import sys, pyard; assert 'ARDPipeline' in dir(pyard); print('diffusers' in sys.modules, 'torch' in sys.modules)"
    folder = Path(pyard.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
