"""Pipelines as teachers: trajectories end where the stock pipeline's images begin."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_pipeline
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

import pyard
from pyard.conditions import PromptTable
from pyard.conditions.prompt_file import read_prompts
from pyard.diffusion.noise import standard_normal, uniform_labels
from pyard.errors import InputError
from pyard.pipeline import TEXT_COMPONENTS
from pyard.sampling.prompts import condition_of_prompts, encode_prompts
from pyard.teachers import load_teacher
from pyard.teachers.text_to_image.teacher import PipelineTeacher

NAMES = ("pixart_alpha", "pixart_sigma", "sd3", "aura_flow", "flux", "flux2_klein", "qwen_image", "z_image")
PROMPTS = ["a red circle", "two small blue squares above a cross"]
NEGATIVE = "blurry, a green triangle"
PACKED = ("flux", "qwen_image")


@pytest.fixture(scope="module")
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(request.param, tmp_path_factory.mktemp("pipelines") / request.param)


def prompts_of(teacher: PipelineTeacher, folder: Path, negative: str | None = None, **options: Any) -> PromptTable:
    """A table in float32, so that rounding of embeddings hides no difference."""
    lines = [line._replace(negative_prompt=negative) for line in read_prompts(PROMPTS)]
    constants, default = teacher.constants(None), teacher.family.negative_prompt
    return PromptTable.build(
        teacher.text_encoder, lines, folder, constants=constants, default_negative=default, dtype="float32", progress=False,
        **options,
    )  # fmt: skip


def stock_images(
    folder: Path, family: str, noise: torch.Tensor, guided: bool, negative: str | None, steps: int
) -> torch.Tensor:
    """What the stock pipeline draws from the same latents."""
    import diffusers

    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipe = getattr(diffusers, kind).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    height, width = (side * 4 for side in noise.shape[-2:])
    call: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent", "height": height, "width": width}
    latents = pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2) if family in PACKED else noise
    if family == "flux2_klein":  # whose negative prompt is "" unless its embedding is given
        latents = pixel_unshuffle(noise, 2)
        call["negative_prompt_embeds"] = pipe.encode_prompt([negative or ""] * len(PROMPTS))[0]
    if family.startswith("pixart"):
        call["use_resolution_binning"] = False
    if family not in ("flux", "flux2_klein"):
        call["negative_prompt"] = [negative or (" " if family == "qwen_image" else "")] * len(PROMPTS)
    if not guided:
        call |= {"qwen_image": {"true_cfg_scale": 1.0}, "z_image": {"guidance_scale": 0.0}, "flux": {}}.get(
            family, {"guidance_scale": 1.0}
        )
    # A copy: Z-Image's pipeline writes into the list that it gets.
    images = pipe(prompt=list(PROMPTS), latents=latents.clone(), **call).images
    if family in PACKED:
        images = pixel_shuffle(images.transpose(1, 2).unflatten(2, (height // 8, width // 8)), 2)
    if family == "flux2_klein":  # its latents are those of the VAE
        norm = pipe.vae.bn
        squares = (x.reshape(1, 4, 2, 2) for x in (norm.running_mean, (norm.running_var + norm.eps).sqrt()))
        mean, std = (x.repeat(1, 1, height // 8, width // 8) for x in squares)
        images = (images - mean) / std
    return images


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("pipeline", [*NAMES, "pixart_alpha_1024"], indirect=True)  # that one is told the picture's size
def test_trajectories_end_where_the_pipelines_images_begin(pipeline: Path, guided: bool, tmp_path: Path) -> None:
    family = pipeline.name
    teacher = load_teacher(pipeline)
    assert isinstance(teacher, PipelineTeacher)
    negative = NEGATIVE if guided else None
    store = pyard.generate_trajectories(
        teacher.with_prompts(prompts_of(teacher, tmp_path / "table", negative)), tmp_path / "store", 2, num_steps=4,
        teacher_steps=8, height=32, width=48, cfg_scale=None if guided else 1.0, keep="state", progress=False,
    )  # fmt: skip
    assert store.manifest.cfg_scale == (teacher.cfg_scale if guided else 1.0)
    assert store.manifest.sample_shape == (4, 8, 12)
    batch = pyard.TrajectoryReader(store, 2, target="state").gather([0, 1])
    stock = stock_images(pipeline, family, batch.history[:, 0], guided, negative, 8)
    assert (batch.target[:, -1] - stock).abs().max() < 1e-4 * stock.abs().max()
    if guided and family != "flux":  # whose default is embedded guidance alone
        plain = stock_images(pipeline, family, batch.history[:, 0], False, None, 8)
        assert (plain - stock).abs().max() > 1e-3 * stock.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["flux"], indirect=True)
def test_true_guidance_of_a_pipeline_with_embedded_guidance(pipeline: Path, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    teacher: Any = load_teacher(pipeline)
    store = pyard.generate_trajectories(
        teacher.with_prompts(prompts_of(teacher, tmp_path / "table", NEGATIVE)), tmp_path / "store", 2, num_steps=4,
        teacher_steps=8, height=32, width=48, cfg_scale=4.0, keep="state", progress=False,
    )  # fmt: skip
    batch = pyard.TrajectoryReader(store, 2, target="state").gather([0, 1])
    pipe = FluxPipeline.from_pretrained(pipeline)
    noise = pixel_unshuffle(batch.history[:, 0], 2).flatten(2).transpose(1, 2)
    call: dict[str, Any] = dict(num_inference_steps=8, output_type="latent", height=32, width=48, latents=noise)
    drawn, plain = (
        pixel_shuffle(pipe(list(PROMPTS), **call, **more).images.transpose(1, 2).unflatten(2, (4, 6)), 2)
        for more in (dict(negative_prompt=[NEGATIVE] * 2, true_cfg_scale=4.0), {})
    )
    assert (batch.target[:, -1] - drawn).abs().max() < 1e-4 * drawn.abs().max()
    assert (plain - drawn).abs().max() > 1e-3 * drawn.abs().max()


@pytest.mark.parametrize("pipeline", ["z_image"], indirect=True)
def test_guidance_of_z_image_ends_where_it_is_truncated(pipeline: Path, tmp_path: Path) -> None:
    from diffusers import ZImagePipeline

    teacher: Any = load_teacher(pipeline)
    teacher = teacher.with_prompts(prompts_of(teacher, tmp_path / "table", NEGATIVE))
    settings: dict[str, Any] = dict(num_steps=4, teacher_steps=8, height=32, width=48, keep="state", progress=False)
    store = pyard.generate_trajectories(teacher, tmp_path / "store", 2, cfg_truncation=0.4, **settings)
    assert store.manifest.cfg_interval is not None
    batch = pyard.TrajectoryReader(store, 2, target="state").gather([0, 1])
    pipe = ZImagePipeline.from_pretrained(pipeline)
    call: dict[str, Any] = dict(num_inference_steps=8, output_type="latent", height=32, width=48)
    drawn, plain = (
        pipe(list(PROMPTS), negative_prompt=[NEGATIVE] * 2, latents=batch.history[:, 0].clone(), **call, **more).images
        for more in (dict(cfg_truncation=0.4), {})
    )
    assert (batch.target[:, -1] - drawn).abs().max() < 1e-4 * drawn.abs().max()
    assert (plain - drawn).abs().max() > 1e-3 * drawn.abs().max()
    with pytest.raises(InputError, match="in place of cfg_interval"):
        pyard.generate_trajectories(teacher, tmp_path / "two", 2, cfg_truncation=0.4, cfg_interval=(0.1, 1.0), **settings)


def draws_from_embeddings(pipe: pyard.ARDPipeline, texts: list[str], noise: torch.Tensor, drawn: torch.Tensor) -> None:
    """Embeddings that the caller computed draw what their texts draw; those that do not fit are refused by name."""
    condition = encode_prompts(pipe._text_encoder(), texts, {})
    given = {"prompt_embeds": condition["tokens"], "prompt_embeds_mask": condition["mask"]}
    if "pooled" in condition:
        given["pooled_prompt_embeds"] = condition["pooled"]
    options: dict[str, Any] = dict(latents=noise, output_type="latent")
    assert torch.equal(pipe(**given, **options).images, drawn)
    pooled = torch.zeros(2, 3)
    for wrong in (
        {"prompt_embeds": condition["tokens"][0]},
        {"prompt_embeds": condition["tokens"][..., 1:]},
        {"prompt_embeds_mask": condition["mask"][:, 1:]},
        {"pooled_prompt_embeds": pooled},
        *([{"pooled_prompt_embeds": None}] if "pooled" in condition else []),
    ):
        with pytest.raises(InputError, match=rf"^{next(iter(wrong))}: found .*; expected "):
            pipe(**{**given, **wrong}, **options)


def watch_offloading(pipe: pyard.ARDPipeline) -> list[str]:
    """Offload components to the CPU as to any other device, and note which one is moved to the device of the work, in order."""
    moved: list[str] = []
    pipe.enable_model_cpu_offload(device="cpu")
    for name, component in pipe.components.items():
        if hasattr(component, "_hf_hook"):
            usual = component._hf_hook.pre_forward

            def noted(*inputs: Any, name: str = name, usual: Any = usual, **options: Any) -> Any:
                moved.append(name)
                return usual(*inputs, **options)

            component._hf_hook.pre_forward = noted
    return moved


@pytest.mark.parametrize("pipeline", NAMES, indirect=True)
def test_from_a_folder_and_a_file_of_prompts_to_pictures(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a dog"]) + "\n", encoding="utf-8")
    settings = dict(num_steps=2, teacher_steps=4, height=32, width=32, batch_size=3, keep="state", dtype="bfloat16")
    store = pyard.generate_trajectories(
        pipeline, tmp_path / "store", 6, prompts=tmp_path / "prompts.txt", progress=False, **settings
    )
    assert store.manifest.labels == "balanced"
    run = tmp_path / "run"
    options = dict(num_steps=2, batch_size=3, max_steps=3, heads="shared", output="jump", learning_rate=1e-3, ema_decay=0.0)
    student = pyard.train(pipeline, tmp_path / "store", out=run, progress=False, trackers="none", **options)
    moved = [
        bool((mine != theirs).any())
        for mine, theirs in zip(student.trunk.parameters(), load_teacher(pipeline).network.trunk.parameters(), strict=True)
    ]
    assert sum(moved) > 0.8 * len(moved)
    texts = ["a red circle", "a cat that was in no prompt"]
    drawn = pyard.sample(run, prompts=texts, seed=3, latents=True)
    pipe = pyard.ARDPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(standard_normal(3, [0, 1], (4, 8, 8)))
    assert torch.equal(pipe(texts, latents=noise, output_type="latent").images, drawn)
    other = pipe(texts[::-1], latents=noise, output_type="latent").images
    assert (other - drawn).abs().max() > 1e-4
    pictures = pipe(texts[0], num_images_per_prompt=2, generator=torch.manual_seed(0)).images
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    with pytest.warns(UserWarning, match="negative_prompt and guidance_scale are ignored"):
        again = pipe(
            texts, negative_prompt="blurry", guidance_scale=7.5, num_inference_steps=2, latents=noise, output_type="latent"
        ).images
    assert torch.equal(again, drawn)
    pipe.save_pretrained(tmp_path / "pipe")
    shutil.rmtree(run)
    saved = pyard.ARDPipeline.from_pretrained(tmp_path / "pipe")
    saved.set_progress_bar_config(disable=True)
    assert torch.equal(saved(texts, latents=noise, output_type="latent").images, drawn)
    assert torch.equal(pyard.sample(tmp_path / "pipe", prompts=texts, seed=3, latents=True), drawn)
    draws_from_embeddings(saved, texts, noise, drawn)
    moved = watch_offloading(saved)
    assert torch.equal(saved(texts, latents=noise, output_type="latent").images, drawn)
    assert list(dict.fromkeys(moved)) == [
        name for name in (*TEXT_COMPONENTS[1::2], "student") if getattr(saved, name) is not None
    ]


@pytest.mark.parametrize("pipeline", ["sd3"], indirect=True)
def test_weights_in_bfloat16_are_trained_in_float32(pipeline: Path, tmp_path: Path) -> None:
    settings = dict(num_steps=2, teacher_steps=4, batch_size=2, keep="state", prompts=PROMPTS, progress=False)
    store = pyard.generate_trajectories(pipeline, tmp_path / "store", 4, precision="bfloat16", **settings)
    assert store.manifest.precision == "bfloat16"
    plain = pyard.generate_trajectories(pipeline, tmp_path / "plain", 4, **settings)
    ends = [pyard.TrajectoryReader(one, 4, target="state").gather(range(4)).target[:, -1] for one in (store, plain)]
    assert 1e-4 < (ends[0] - ends[1]).abs().max() / ends[1].abs().max() < 0.2
    student = pyard.train(
        pipeline, tmp_path / "store", out=tmp_path / "run", num_steps=2, batch_size=2, max_steps=2, trackers="none",
        progress=False,
    )  # fmt: skip
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


@pytest.mark.parametrize("pipeline", ["sd3"], indirect=True)
def test_two_sizes_in_one_training(pipeline: Path, tmp_path: Path) -> None:
    settings = dict(num_steps=2, teacher_steps=4, batch_size=2, keep="state", prompts=PROMPTS, progress=False)
    pyard.generate_trajectories(pipeline, tmp_path / "square", 4, height=32, width=32, **settings)
    pyard.generate_trajectories(pipeline, tmp_path / "wide", 4, height=24, width=48, **settings)
    student = pyard.train(
        pipeline, [tmp_path / "square", tmp_path / "wide"], out=tmp_path / "run", num_steps=2, batch_size=2, max_steps=4,
        trackers="none", progress=False,
    )  # fmt: skip
    assert student.sample_shapes == ((4, 8, 8), (4, 6, 12))
    pipe = pyard.ARDPipeline.from_pretrained(tmp_path / "run")
    assert pipe("a dog", height=24, width=48, output_type="pil").images[0].size == (48, 24)
    with pytest.raises(InputError, match=r"trained on \(4, 8, 8\), \(4, 6, 12\)"):
        pipe("a dog", height=32, width=48)


def changed_encoder(pipeline: Path, folder: Path) -> Path:
    """A copy of a pipeline with another text encoder."""
    shutil.copytree(pipeline, folder)
    file = folder / "text_encoder" / "model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("pipeline", ["sd3"], indirect=True)
def test_the_text_limit_of_the_trajectories_is_that_of_the_student(pipeline: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(num_steps=2, teacher_steps=4, batch_size=2, keep="state", progress=False)
    pyard.generate_trajectories(pipeline, tmp_path / "store", 2, prompts=PROMPTS, max_sequence_length=16, **settings)
    pyard.generate_trajectories(pipeline, tmp_path / "store", 4, **settings)  # the limit is the table's
    with pytest.raises(InputError, match="encoded with max_sequence_length 16, but it is 24 now"):
        pyard.generate_trajectories(pipeline, tmp_path / "store", 6, max_sequence_length=24, **settings)
    options: dict[str, Any] = dict(num_steps=2, batch_size=2, max_steps=1, trackers="none", progress=False)
    student = pyard.train(pipeline, tmp_path / "store", out=tmp_path / "run", **options)
    assert student.config.text is not None
    assert student.config.text.max_sequence_length == 16
    table = pyard.TrajectoryStore.open(tmp_path / "store").conditions
    assert condition_of_prompts(student, PROMPTS)["tokens"].shape == table.take([0, 1])["tokens"].shape
    other = changed_encoder(pipeline, tmp_path / "other")
    for work in (
        lambda: pyard.generate_trajectories(other, tmp_path / "store", 6, **settings),
        lambda: pyard.train(other, tmp_path / "store", out=tmp_path / "run 2", **options),
    ):
        with pytest.raises(InputError, match="encoded by other text encoders or tokenizers") as refused:
            work()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("pipeline", ["flux"], indirect=True)
def test_embedded_guidance_is_that_of_the_prompts(pipeline: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(num_steps=2, teacher_steps=4, batch_size=2, keep="state", progress=False)
    pyard.generate_trajectories(pipeline, tmp_path / "store", 2, prompts=PROMPTS, embedded_guidance=2.5, **settings)
    with pytest.raises(InputError, match=r"embedded_guidance is 9, but 2\.5 in "):
        pyard.generate_trajectories(pipeline, tmp_path / "store", 4, embedded_guidance=9.0, **settings)
    assert pyard.generate_trajectories(pipeline, tmp_path / "store", 4, embedded_guidance=2.5, **settings).count == 4


@pytest.mark.parametrize("pipeline", NAMES, indirect=True)
def test_every_jump_has_something_to_do(pipeline: Path) -> None:
    teacher = load_teacher(pipeline)
    assert isinstance(teacher, PipelineTeacher)
    grid = teacher.grid(4, None, (4, 8, 8))
    assert grid.teacher_steps % 4 == 0
    assert grid.state_index == tuple(s * grid.teacher_steps // 4 for s in range(5))
    jumps = [a - b for a, b in itertools.pairwise(grid.times)]
    assert min(jumps) > 0.04 * sum(jumps)


@pytest.mark.parametrize("pipeline", ["sd3"], indirect=True)
def test_a_pipeline_without_t5_draws_from_prompts(pipeline: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(pipeline, bare)
    index = json.loads((bare / "model_index.json").read_text(encoding="utf-8"))
    for name in ("text_encoder_3", "tokenizer_3"):
        index[name] = [None, None]
        shutil.rmtree(bare / name)
    (bare / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    settings = dict(num_steps=2, teacher_steps=4, batch_size=2, keep="state", prompts=PROMPTS, progress=False)
    pyard.generate_trajectories(bare, tmp_path / "store", 4, **settings)
    pyard.train(
        bare, tmp_path / "store", out=tmp_path / "run", num_steps=2, batch_size=2, max_steps=1, trackers="none", progress=False
    )
    pipe = pyard.ARDPipeline.from_pretrained(tmp_path / "run")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(standard_normal(0, [0], (4, 8, 8)))
    drawn = pipe(PROMPTS[0], latents=noise, output_type="latent").images
    assert torch.equal(drawn, pyard.sample(tmp_path / "run", prompts=PROMPTS[:1], latents=True))


@pytest.mark.parametrize("pipeline", ["sd3"], indirect=True)
def test_prompts_are_taken_in_turn_or_drawn(pipeline: Path, tmp_path: Path) -> None:
    settings = dict(
        num_steps=2, teacher_steps=2, batch_size=8, keep="state", prompts=[*PROMPTS, "a dog"], height=16, width=16,
        progress=False,
    )  # fmt: skip
    numbers = {}
    for order in ("in_turn", "uniform"):
        store = pyard.generate_trajectories(pipeline, tmp_path / order, 8, prompt_order=order, **settings)
        numbers[order] = store.manifest.number_of(np.arange(8)).tolist()
        batch = pyard.TrajectoryReader(store, 8, target="state").gather(range(8))
        table = store.conditions.take(numbers[order])
        assert torch.equal(batch.condition["tokens"], table["tokens"])
    assert numbers["in_turn"] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert numbers["uniform"] == uniform_labels(0, np.arange(8), 3).tolist() != numbers["in_turn"]
    for wrong, message in (
        (dict(prompt_order="random"), "prompt_order is 'random'; expected one of in_turn, uniform"),
        (dict(prompt_order="uniform", labels=np.array([0, 1])), "prompt_order is 'uniform', but labels is "),
        (dict(prompt_order="uniform", labels=[0]), r"prompt_order is 'uniform', but labels is \[0\]"),
    ):
        with pytest.raises(InputError, match=message):
            pyard.generate_trajectories(pipeline, tmp_path / "wrong", 8, **{**settings, **wrong})


@pytest.mark.parametrize("pipeline", ["sd3"], indirect=True)
def test_teacher_steps_are_the_pipelines_own_rounded_up_to_a_multiple(pipeline: Path) -> None:
    teacher: Any = load_teacher(pipeline)
    assert teacher.teacher_steps == 28
    assert [teacher.grid(S, None, (4, 8, 8)).teacher_steps for S in (1, 3, 4, 5)] == [28, 30, 28, 30]
