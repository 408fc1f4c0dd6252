"""Our DiT against diffusers' own, on tiny configurations with every parameter random, in both directions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from factories import randomise, tiny_config, tiny_teacher
from golden import relative_error
from models.autoencoders import qwen_vae

from pyard import Student, TimeGrid, load_teacher, sample
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.codec import LatentCodec
from pyard.models.dit.network import DiT
from pyard.teachers.diffusers_folder import from_diffusers, save_diffusers, to_diffusers
from pyard.teachers.guidance import endpoints
from pyard.teachers.network_teacher import NetworkTeacher

FLOW = NoiseSchedule(kind="flow", prediction="velocity", shift=3.0)


def tiny_transformer(seed: int = 3, **changes: Any) -> DiTTransformer2DModel:
    sizes: dict[str, Any] = dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5,
    )  # fmt: skip
    transformer = DiTTransformer2DModel(**{**sizes, **changes}).eval()
    randomise(transformer, seed, std=0.2)
    share_embedders(transformer)
    return transformer


def share_embedders(transformer: DiTTransformer2DModel) -> None:
    first = transformer.transformer_blocks[0].norm1.emb
    for block in transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())


def tiny_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4, scaling_factor=0.3, shift_factor=0.1,
    )  # fmt: skip
    randomise(vae, 5)
    return vae.eval()


SIZES = [
    {}, dict(patch_size=4, sample_size=16), dict(out_channels=None), dict(num_layers=1, in_channels=3, out_channels=3),
    dict(attention_bias=False), dict(norm_eps=1e-2), dict(num_attention_heads=4, attention_head_dim=12, patch_size=1),
]  # fmt: skip


@pytest.mark.parametrize("changes", SIZES, ids=str)
@pytest.mark.parametrize("schedule", [NoiseSchedule(), FLOW], ids=["ddpm", "flow"])
@torch.inference_mode()
def test_both_networks_compute_the_same_and_convert_back(changes, schedule):
    transformer = tiny_transformer(**changes)
    network = from_diffusers(transformer, schedule)
    x = torch.randn(3, network.config.in_channels, *[network.config.input_size] * 2)
    labels = torch.tensor([0, 4, 5])
    time = 0.37 if schedule.kind == "flow" else 370.0
    expected = transformer(x, timestep=torch.full((3,), 370.0), class_labels=labels).sample
    assert relative_error(network(x, torch.full((3,), time), labels), expected) < 1e-5
    again = to_diffusers(network, schedule)
    assert relative_error(again(x, timestep=torch.full((3,), 370.0), class_labels=labels).sample, expected) < 1e-6
    twice = from_diffusers(again, schedule)
    assert twice.config == network.config
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), network.state_dict().values(), strict=True))


@pytest.mark.parametrize(("changes", "message"), [
    (dict(activation_fn="gelu"), "activation_fn is 'gelu', expected 'gelu-approximate'"),
    (dict(norm_elementwise_affine=True), "norm_elementwise_affine"),
])  # fmt: skip
def test_transformers_that_are_no_dit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        from_diffusers(tiny_transformer(**changes), NoiseSchedule())


def test_unequal_embedders_are_refused():
    transformer = tiny_transformer()
    with torch.no_grad():
        transformer.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias[3] += 1e-3
    with pytest.raises(InputError, match=r"embedder of block 2 differs from that of block 0 \(trunk\.time_embed\.fc1\.bias"):
        from_diffusers(transformer, NoiseSchedule())


@pytest.mark.parametrize(("changes", "message"), [
    (dict(freq_shift=0.0), r"freq_shift is 0\.0, expected 1\.0: diffusers fixes"),
    (dict(frequency_size=32), "frequency_size"),
    (dict(mlp_ratio=2.0), "mlp_ratio"),
    (dict(norm_eps=1e-5, mlp_norm_eps=1e-6), "norm_eps is 1e-05"),
    (dict(has_null_label=False), "row for no class"),
    (dict(time_scale=-1.0, time_offset=1.0), "the scheduler's time"),
])  # fmt: skip
def test_what_diffusers_cannot_hold_is_refused(changes, message):
    network = DiT(tiny_config(**{"frequency_size": 256, "freq_shift": 1.0, **changes}))
    with pytest.raises(InputError, match=message):
        to_diffusers(network, NoiseSchedule())


def test_another_position_embedding_is_refused():
    network = DiT(tiny_config(frequency_size=256, freq_shift=1.0))
    network.trunk.pos_embed += 0.1
    with pytest.raises(InputError, match="position embedding"):
        to_diffusers(network, NoiseSchedule())


def write_pipeline(path: Path, scheduler: Any = None, names: bool = True) -> DiTPipeline:
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    pipeline = DiTPipeline(tiny_transformer(), tiny_vae(), scheduler)
    pipeline.save_pretrained(path)
    if names:
        index = json.loads((path / "model_index.json").read_text())
        index["id2label"] = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "white shark", "3": "cock", "4": "hen"}
        (path / "model_index.json").write_text(json.dumps(index))
    return pipeline


def test_a_pipeline_folder_comes_with_its_scheduler_vae_and_names(tmp_path: Path):
    pipeline = write_pipeline(tmp_path / "pipeline", DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False))
    teacher = load_teacher(tmp_path / "pipeline")
    assert teacher.schedule == NoiseSchedule(beta_schedule="scaled_linear", spacing="leading")
    assert teacher.class_names == ("tench, Tinca tinca", "goldfish", "white shark", "cock", "hen")
    assert load_teacher(tmp_path / "pipeline" / "transformer").fingerprint == teacher.fingerprint
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 5])
    with torch.inference_mode():
        theirs = pipeline.transformer(x, timestep=torch.tensor([7, 7]), class_labels=labels).sample[:, :4]
        assert relative_error(teacher.predict(x, 7.0, labels), theirs) < 1e-5
        images = pipeline.vae.decode(x / 0.3 + 0.1).sample
        assert teacher.codec is not None
        assert relative_error(teacher.codec.decode(x), images) < 1e-6
        latents = (pipeline.vae.encode(images).latent_dist.mode() - 0.1) * 0.3
        assert relative_error(teacher.codec.encode(images), latents) < 1e-6


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_our_ddim_draws_the_pipelines_images(cfg_scale, tmp_path: Path):
    # The pipeline's label for no class is ImageNet's 1000; it guides all channels.
    transformer = tiny_transformer(num_embeds_ada_norm=1000)
    pipeline = DiTPipeline(transformer, tiny_vae(), DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.register_to_config(shift_factor=None)  # which the pipeline ignores
    pipeline.vae.save_pretrained(tmp_path / "pipeline" / "vae")
    theirs = pipeline(
        [1, 4], guidance_scale=cfg_scale, num_inference_steps=10, generator=torch.manual_seed(2), output_type="np"
    )
    teacher = load_teacher(tmp_path / "pipeline")
    noise = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(2))
    latents = endpoints(teacher, noise, torch.tensor([1, 4]), 10, cfg_scale=cfg_scale)
    assert teacher.codec is not None
    images = (teacher.codec.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert relative_error(images, torch.from_numpy(theirs.images)) < 1e-4
    assert images.std() > 0.05


def test_a_student_carries_vae_and_names_along(tmp_path: Path):
    write_pipeline(tmp_path / "pipeline")
    teacher = load_teacher(tmp_path / "pipeline")
    teacher.save_pretrained(tmp_path / "teacher")
    again = load_teacher(tmp_path / "teacher")
    assert (again.fingerprint, again.class_names) == (teacher.fingerprint, teacher.class_names)
    student = Student.from_teacher(again, TimeGrid.build(again.schedule, 2, 10), history_layers=1)
    student.save_pretrained(tmp_path / "run" / "student")
    assert (tmp_path / "run" / "student" / "vae" / "config.json").is_file()
    student = Student.from_pretrained(tmp_path / "run")
    images = sample(student, ["goldfish", "Tinca tinca", 4])
    assert images.shape == (3, 3, 16, 16)
    latents = sample(student, [1, 0, 4], latents=True)
    assert latents.shape == (3, 4, 8, 8)
    assert teacher.codec is not None
    assert relative_error(images, teacher.codec.decode(latents)) < 1e-5
    trajectory = sample(student, [1, 0, 4], return_trajectory=True)
    assert trajectory.shape == (3, 2, 3, 16, 16)
    assert torch.equal(trajectory[:, -1], images)
    with pytest.raises(InputError, match="no class is named 'shark'"):
        sample(student, ["shark"])


def test_a_saved_pipeline_folder_is_diffusers_own(tmp_path: Path):
    write_pipeline(tmp_path / "first", FlowMatchEulerDiscreteScheduler(shift=2.0))
    teacher = load_teacher(tmp_path / "first")
    assert teacher.schedule == NoiseSchedule(kind="flow", prediction="velocity", shift=2.0)
    assert teacher.network.config.time_scale == 1000
    save_diffusers(teacher, tmp_path / "second")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "second")
    assert pipeline.labels["Tinca tinca"] == 0
    again = load_teacher(tmp_path / "second")
    assert (again.fingerprint, again.class_names) == (teacher.fingerprint, teacher.class_names)


def test_a_teacher_without_vae_saves_transformer_and_scheduler(tmp_path: Path):
    teacher = tiny_teacher(NoiseSchedule(spacing="trailing"), frequency_size=256, freq_shift=1.0)
    save_diffusers(teacher, tmp_path / "out")
    again = load_teacher(tmp_path / "out" / "transformer")
    assert again.fingerprint == teacher.fingerprint
    assert again.codec is None
    again.codec = LatentCodec(qwen_vae())
    with pytest.raises(InputError, match="only decodes with an AutoencoderKL; this teacher's VAE is a AutoencoderKLQwenImage"):
        save_diffusers(again, tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_folders_that_say_too_little_are_refused(tmp_path: Path):
    tiny_transformer().save_pretrained(tmp_path / "transformer")
    with pytest.raises(InputError, match=r"has no scheduler .*whole pipeline, or in Python load_teacher\(…, schedule="):
        load_teacher(tmp_path / "transformer")
    assert load_teacher(tmp_path / "transformer", schedule=FLOW).schedule == FLOW
    with pytest.raises(InputError, match="num_heads is for"):
        load_teacher(tmp_path / "transformer", num_heads=2)
    write_pipeline(tmp_path / "other")
    index = json.loads((tmp_path / "other" / "model_index.json").read_text())
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(InputError, match="is a StableDiffusionPipeline, which pyard cannot use as a teacher"):
        load_teacher(tmp_path / "other")


def test_a_folder_with_half_precision_weights_alone_is_read(tmp_path: Path):
    transformer = tiny_transformer()
    share_embedders(transformer)
    transformer.half().save_pretrained(tmp_path / "transformer", variant="fp16")
    assert not (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    teacher = load_teacher(tmp_path / "transformer", schedule=FLOW)
    assert next(teacher.network.parameters()).dtype == torch.float32


@pytest.mark.parametrize("text", ["{oops", "[]"])
def test_a_broken_index_is_one_line(text, tmp_path: Path):
    write_pipeline(tmp_path / "pipe")
    (tmp_path / "pipe" / "model_index.json").write_text(text)
    with pytest.raises(InputError, match=r"model_index\.json") as refusal:
        load_teacher(tmp_path / "pipe")
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_class_names_are_read_in_any_locale(tmp_path: Path):
    write_pipeline(tmp_path / "pipe")
    file = tmp_path / "pipe" / "model_index.json"
    names = {str(i): f"größer {i}" for i in range(5)}
    file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": names}, ensure_ascii=False), encoding="utf-8")
    code = f"import pyard; print(ascii(pyard.load_teacher({str(tmp_path / 'pipe')!r}).class_names))"
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **plain}, capture_output=True, text=True)
    assert ascii("größer 3") in done.stdout, done.stderr[-500:]


def test_students_never_drop_labels():
    # diffusers' DiT does in training mode, at random.
    network = from_diffusers(tiny_transformer(), NoiseSchedule())
    teacher = NetworkTeacher(network, NoiseSchedule())
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 2, 10), history_layers=1)
    history, labels = torch.randn(64, 2, 4, 8, 8), torch.arange(64) % 5
    with torch.no_grad():
        assert torch.equal(student.train()(history, labels), student.eval()(history, labels))
