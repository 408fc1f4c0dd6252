"""`ARDPipeline` of text-to-image students: its arguments, and the components that it reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_pipeline

import pyard
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.sampling.prompts import texts_of
from pyard.teachers import load_teacher
from pyard.teachers.text_to_image.outline import pipeline_outline

PROMPTS = ["a red circle", "two small blue squares above a cross"]
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(getattr(request, "param", "sd3"), tmp_path_factory.mktemp("pipelines") / "pipeline")


def student_of(pipeline: Path, folder: Path, **read_with: Any) -> Student:
    """An untrained student of a pipeline, saved in a folder."""
    teacher: Any = load_teacher(pipeline, **read_with)
    settings: dict[str, Any] = dict(history_layers=1, sample_shapes=[SHAPE], text=teacher.text_source())
    student = Student.from_teacher(teacher, teacher.grid(2, 4, SHAPE), **settings).float()
    student.save_pretrained(folder)
    return student


def quiet(folder: Path, **options: Any) -> pyard.ARDPipeline:
    pipe = pyard.ARDPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_wrong_arguments_are_one_line(pipeline: Path, tmp_path: Path) -> None:
    student_of(pipeline, tmp_path)
    pipe = quiet(tmp_path)
    one = torch.Generator().manual_seed(0)
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(prompt=[]), "the list is empty"),
        (dict(prompt=3), "prompt is 3; expected a text"),
        (dict(prompt=["a", 3]), "expected a text or a list of texts"),
        (dict(prompt="a", num_images_per_prompt=0), "num_images_per_prompt is 0"),
        (dict(prompt="a", num_images_per_prompt="2"), "num_images_per_prompt is '2'; expected a whole number"),
        (dict(prompt="a", num_inference_steps=20), "num_inference_steps is 20; this student draws in 2 steps"),
        (dict(prompt="a", height=32, width=64), r"trained on \(4, 8, 8\) \(height x width in pixels: 32 x 32\)"),
        (dict(prompt="a", height=32.0), r"height is 32\.0; expected a whole number"),
        (dict(prompt="a", max_sequence_length=12), "max_sequence_length is 12; this student was trained with 256"),
        (dict(prompt="a", generator=[one, one]), "generator is a list of 2; expected one generator, or 1 of them"),
        (dict(prompt="a", output_type="jpeg"), "output_type is 'jpeg'; expected pil, np, pt or latent"),
        (dict(prompt="a", callback_on_step_end_tensor_inputs=["prompt_embeds"]), r"expected \['latents'\]"),
        (dict(prompt_embeds=[torch.ones(3, 2), torch.ones(3, 4)]), r"found a list of \[\[3, 2\], \[3, 4\]\]"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            pipe(**arguments)


@pytest.mark.parametrize("pipeline", ["z_image"], indirect=True)
def test_arguments_of_copied_code_are_understood(pipeline: Path, tmp_path: Path) -> None:
    """What stock pipelines are called with draws the same where it changes nothing, and is warned of where it would."""
    from diffusers import ZImagePipeline

    student = student_of(pipeline, tmp_path)
    pipe = quiet(tmp_path)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = dict(latents=noise, output_type="latent")
    drawn = pipe(PROMPTS, **options).images
    usual: dict[str, Any] = dict(
        true_cfg_scale=1.0, callback_on_step_end_tensor_inputs=["latents"], guidance_scale=0.0,
        max_sequence_length=student.config.text.max_sequence_length,  # type: ignore[union-attr]
    )  # fmt: skip
    assert torch.equal(pipe(PROMPTS, **usual, **options).images, drawn)
    with pytest.warns(UserWarning, match="guidance_scale and true_cfg_scale are ignored"):
        assert torch.equal(pipe(PROMPTS, guidance_scale=3.5, true_cfg_scale=4.0, **options).images, drawn)
    embeddings, _ = ZImagePipeline.from_pretrained(pipeline).encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert isinstance(embeddings, list)
    assert len({len(one) for one in embeddings}) == 2
    torch.testing.assert_close(pipe(prompt_embeds=embeddings, **options).images, drawn, rtol=0, atol=1e-5)
    padded = torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
    mask = torch.stack([torch.arange(padded.shape[1]) < len(one) for one in embeddings])
    found = pipe(prompt_embeds=padded, prompt_attention_mask=mask, **options).images
    torch.testing.assert_close(found, drawn, rtol=0, atol=1e-5)
    assert (pipe(prompt_embeds=padded, **options).images - drawn).abs().max() > 1e-3


def test_a_cut_text_is_warned_of(pipeline: Path, tmp_path: Path) -> None:
    student_of(pipeline, tmp_path)
    long = "a red circle " * 400
    with pytest.warns(UserWarning, match=r"1 of 2 distinct texts are longer .* for example .*a red circle"):
        pyard.sample(tmp_path, prompts=["a dog", long, long], latents=True)
    with pytest.warns(UserWarning, match="1 of 1 distinct texts are longer"):
        quiet(tmp_path)(long, output_type="latent")


def test_texts_that_are_names_of_missing_files(tmp_path: Path) -> None:
    for text in ("", "  "):
        with pytest.raises(InputError, match="the text is empty"):
            texts_of(text)
    with pytest.raises(InputError, match=r"no such file: prompts\.txtt"):
        texts_of("prompts.txtt")
    assert texts_of(["prompts.txtt"]) == ["prompts.txtt"]
    assert texts_of("a dog, 1.5 m high.") == ["a dog, 1.5 m high."]
    (tmp_path / "prompts.txt").write_text("a dog\n", encoding="utf-8")
    assert texts_of(str(tmp_path / "prompts.txt")) == ["a dog"]


def test_components_that_are_given_are_used(pipeline: Path, tmp_path: Path) -> None:
    """In a run's or student's folder as in a saved pipeline's."""
    from diffusers import AutoencoderKL

    student_of(pipeline, tmp_path / "student")
    vae = AutoencoderKL.from_pretrained(pipeline, subfolder="vae")
    quiet(tmp_path / "student").save_pretrained(tmp_path / "pipe")
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    drawn = []
    for folder in (tmp_path / "student", tmp_path / "pipe"):
        pipe = quiet(folder, vae=vae, text_encoder_3=None, tokenizer_3=None)
        assert pipe.vae is vae
        assert pipe.text_encoder_3 is None
        drawn.append(pipe("a dog", latents=noise, output_type="latent").images)
    assert torch.equal(*drawn)
    assert not torch.equal(quiet(tmp_path / "student")("a dog", latents=noise, output_type="latent").images, drawn[0])
    with pytest.raises(InputError, match="for which text_encoder_4 means nothing; expected dtype, or components: vae, token"):
        pyard.ARDPipeline.from_pretrained(tmp_path / "student", text_encoder_4=None)


@pytest.mark.parametrize("saved", [False, True])
def test_text_encoders_are_read_as_for_the_trajectories(pipeline: Path, saved: bool, tmp_path: Path) -> None:
    student_of(pipeline, tmp_path / "student", dtype="bfloat16")
    if saved:
        quiet(tmp_path / "student").save_pretrained(tmp_path / "pipe")
    folder = tmp_path / ("pipe" if saved else "student")
    pipe = quiet(folder)
    assert {one.dtype for one in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)} == {torch.bfloat16}
    assert {parameter.dtype for parameter in pipe.student.parameters()} == {torch.float32}
    (expected,) = load_teacher(pipeline, dtype="bfloat16").text_encoder.encode(PROMPTS[:1])  # type: ignore[attr-defined]
    (found,) = pipe._text_encoder().encode(PROMPTS[:1])
    assert torch.equal(found.tensors["tokens"], expected.tensors["tokens"])
    assert pipe(PROMPTS[0]).images[0].size == (32, 32)
    whole = quiet(folder, torch_dtype=torch.float32)
    assert whole.text_encoder.dtype == torch.float32


def test_a_variant_of_the_text_encoders_is_the_students(pipeline: Path, tmp_path: Path) -> None:
    """Where the folder has other weights, too."""
    from diffusers import StableDiffusion3Pipeline

    both = tmp_path / "both"
    shutil.copytree(pipeline, both)
    StableDiffusion3Pipeline.from_pretrained(pipeline, torch_dtype=torch.float16).save_pretrained(both, variant="fp16")
    file = both / "text_encoder" / "model.fp16.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    student_of(both, tmp_path / "student", variant="fp16")
    encoder = quiet(tmp_path / "student").text_encoder.state_dict()
    rounded, plain = (quiet_encoder(both, variant).state_dict() for variant in ("fp16", None))
    assert all(torch.equal(encoder[name], rounded[name].float()) for name in encoder)
    assert any(not torch.equal(encoder[name], plain[name]) for name in encoder)


def quiet_encoder(folder: Path, variant: str | None) -> Any:
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", variant=variant)


def test_a_pipeline_that_has_only_a_variant_draws_pictures(pipeline: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    half = tmp_path / "half"
    StableDiffusion3Pipeline.from_pretrained(pipeline, torch_dtype=torch.float16).save_pretrained(half, variant="fp16")
    assert [file.name for file in (half / "vae").glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    teacher: Any = load_teacher(half)
    student = Student.from_teacher(teacher, teacher.grid(2, 4, SHAPE), history_layers=1, text=teacher.text_source())
    student.save_pretrained(tmp_path / "student")
    assert pyard.sample(tmp_path / "student", prompts=["a dog"]).shape == (1, 3, 32, 32)
    pipe = pyard.ARDPipeline.from_pretrained(tmp_path / "student")
    assert pipe("a dog").images[0].size == (32, 32)


@pytest.mark.parametrize("pipeline", ["qwen_image"], indirect=True)
def test_an_embedded_guidance_without_a_default_can_be_given(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline, folder)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "guidance_embeds": True}), encoding="utf-8")
    outline = pipeline_outline(folder)
    assert outline is not None
    with pytest.raises(InputError, match="has no default here; give embedded_guidance"):
        outline.constants(None)
    assert outline.constants(2.5) == {"guidance": 2.5}
