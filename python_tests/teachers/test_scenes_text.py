"""The text-to-image teacher of captioned scenes: its training, its folder, and the weights that pyard ships."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline
from torch import nn

from pyard.__main__ import main
from pyard.data.captioned_scenes import SceneSetting, draw_scene, follow_prompts, render_scenes
from pyard.data.captioned_scenes.tokenizer import MAX_TOKENS
from pyard.errors import InputError
from pyard.storage.checkpoints import Checkpoints
from pyard.teachers.scenes_text import (
    ScenesTextConfig,
    ScenesTextNetwork,
    new_network,
    new_scheduler,
    scenes_text_folder,
    teach,
    tokenize,
)

TINY: dict[str, Any] = dict(
    hidden_size=32, depth=2, num_heads=2, text_hidden_size=32, text_depth=1, batch_size=8, size=16, jitter=0.25, progress=False
)
FLOOR = 0.6  # measured: 43 of the 60 prompts
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return ScenesTextNetwork.from_pretrained(folder).state_dict()


def tiny_config() -> ScenesTextConfig:
    chosen = {name: p.default for name, p in inspect.signature(teach).parameters.items()} | TINY
    return ScenesTextConfig(**{key: value for key, value in chosen.items() if key in ScenesTextConfig.__dataclass_fields__})


def tiny_network(seed: int = 0) -> ScenesTextNetwork:
    """Small, and random in every parameter."""
    network = new_network(tiny_config())
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def draw(pipeline: PixArtSigmaPipeline, prompts: list[str], num_steps: int = 4, cfg_scale: float = 3.0) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompts,
        num_inference_steps=num_steps,
        guidance_scale=cfg_scale,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        output_type="latent",
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=MAX_TOKENS,
    ).images
    return latents.numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder of a small random network."""
    path = tmp_path_factory.mktemp("teachers") / "random"
    tiny_network().save_pretrained(path)
    return path


def test_a_resumed_training_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = teach(tmp_path / "whole", max_steps=5, save_every=100, **TINY)
    save = Checkpoints.save

    def save_then_stop(self: Checkpoints, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        teach(tmp_path / "broken", max_steps=5, save_every=3, **TINY)
    assert not (tmp_path / "broken").exists()
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"matrix_learning_rate: was 0\.02, now 0\.01"):
        teach(tmp_path / "broken", max_steps=5, **TINY, matrix_learning_rate=0.01)
    seen: list[int] = []
    monkeypatch.setattr(
        Checkpoints, "load", lambda self, step, parts, load=Checkpoints.load: seen.append(step) or load(self, step, parts)
    )
    resumed = teach(tmp_path / "broken", max_steps=5, **TINY)
    assert seen == [3]
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    untrained = new_network(tiny_config()).half().float().state_dict()
    assert not any(torch.equal(first[name], untrained[name]) for name in first if "weight" in name and first[name].ndim > 1)
    other = weights(teach(tmp_path / "other", max_steps=5, seed=1, **TINY))
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].ndim > 1)


def test_a_finished_teacher_is_left_as_it_is_and_other_settings_are_refused(tmp_path: Path) -> None:
    out = teach(tmp_path / "t", max_steps=1, **TINY)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    assert teach(out, max_steps=1, **TINY) == out
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()} == before
    with pytest.raises(InputError, match=r"jitter: was 0\.25, now 0\.5"):
        teach(out, max_steps=1, **{**TINY, "jitter": 0.5})


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    faster = {"hidden_size": 64, "batch_size": 16, "ema_decay": 0.9, "learning_rate": 5e-3, "matrix_learning_rate": 0.1}
    out = teach(tmp_path / "t", max_steps=100, **{**TINY, **faster})
    network = ScenesTextNetwork.from_pretrained(out)
    scenes = [draw_scene(1, i, SceneSetting(jitter=0.25), category="colours") for i in range(64)]
    clean = torch.from_numpy(render_scenes(scenes))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        predicted = network(0.3 * clean + 0.7 * noise, torch.full((64,), 0.7), tokenize([scene.caption for scene in scenes]))
    error = float((predicted - (noise - clean)).square().mean())
    assert error < 0.4 * float((noise - clean).square().mean())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"caption_dropout": 1.0}, "caption_dropout is 1.0; expected at least 0 and below 1"),
        ({"matrix_learning_rate": 0.0}, "matrix_learning_rate is 0.0; expected more than 0"),
        ({"hidden_size": 33}, "hidden_size is 33; expected a multiple of num_heads, 2"),
        ({"text_hidden_size": 40}, "text_hidden_size is 40; expected a multiple of 32"),
        ({"patch_size": 5}, "size is 16; expected a multiple of patch_size, 5"),
        ({"text_depth": 0}, "text_depth is 0; expected at least 1"),
        ({"jitter": 2.0}, "jitter is 2.0; expected 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        teach(tmp_path / "t", max_steps=1, **{**TINY, **wrong})
    assert not (tmp_path / "t").exists()


def test_the_stock_pipeline_draws_what_the_networks_say(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).propagate = True
    pipeline = PixArtSigmaPipeline.from_pretrained(folder, vae=None)
    texts = ["a red disc", "two small blue crosses"]
    pictures = draw(pipeline, texts)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert pictures.shape == (2, 3, 16, 16)

    network, scheduler = ScenesTextNetwork.from_pretrained(folder), new_scheduler()
    scheduler.set_timesteps(4)
    x = torch.cat([torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    with torch.inference_mode():
        for time in scheduler.timesteps:
            told = time.float().expand(2) / 1000
            with_caption, without = (network(x, told, tokenize(captions)) for captions in (texts, ["", ""]))
            x = scheduler.step(without + 3.0 * (with_caption - without), time, x).prev_sample
    np.testing.assert_allclose(pictures, x.numpy(), atol=1e-4 * np.abs(x.numpy()).max())


def test_the_defaults_of_a_call_give_the_same_picture(folder: Path) -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(folder, vae=None)
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline(
        "a red disc",
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        use_resolution_binning=False,
    ).images
    torch.testing.assert_close(plain, torch.from_numpy(draw(pipeline, ["a red disc"])), atol=1e-4, rtol=1e-4)


def test_captions_change_the_picture(folder: Path) -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(folder, vae=None)
    (red,), (blue,), (none,) = (draw(pipeline, [text]) for text in ("a red disc", "a blue disc", ""))
    assert min(np.abs(red - blue).max(), np.abs(red - none).max()) > 0.01


def test_the_scheduler_follows_a_flow_s_straight_lines() -> None:
    scheduler = new_scheduler()
    scheduler.set_timesteps(5)
    noise, clean = torch.randn(2, 1, 3, 4, 4)
    x = scheduler.sigmas[0] * noise + (1 - scheduler.sigmas[0]) * clean
    for time in scheduler.timesteps:
        x = scheduler.step(noise - clean, time, x).prev_sample
    torch.testing.assert_close(x, clean, atol=1e-4, rtol=1e-4)


def test_the_command_line_trains_it(tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={str(value).lower()}" for name, value in TINY.items()]
    assert main(["teach", "scenes-text", "--out", str(tmp_path / "t"), "--max-steps", "1", *flags]) == 0
    assert (tmp_path / "t" / "model_index.json").exists()


def test_the_shipped_folder_is_what_its_record_says() -> None:
    shipped = scenes_text_folder()
    files = [file for file in shipped.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    record = json.loads((shipped.parent / "scenes-text.json").read_text(encoding="utf-8"))
    defaults = {name: p.default for name, p in inspect.signature(teach).parameters.items()}
    taught = json.loads((shipped / "teach.json").read_text(encoding="utf-8"))
    assert taught == {name: defaults[name] for name in taught}
    assert record["images"] == taught["max_steps"] * taught["batch_size"]
    assert record["command"].startswith("pyard teach scenes-text --out ")
    assert record["parameters"] == sum(p.numel() for p in ScenesTextNetwork.from_pretrained(shipped).parameters())
    measured = json.loads((RESULTS / "scenes-teacher.json").read_text(encoding="utf-8"))
    assert record["adherence"] == {split: found["all"]["share"] for split, found in measured["splits"].items()}


def test_the_shipped_teacher_follows_prompts() -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(scenes_text_folder(), vae=None)
    scenes = [draw_scene(2**63 + 7, i) for i in range(60)]
    prompts = [scene.prompt for scene in scenes]
    pictures = draw(pipeline, [scene.caption for scene in scenes], num_steps=12, cfg_scale=2.0)
    assert follow_prompts(pictures, prompts).mean() > FLOOR
    assert follow_prompts(pictures, prompts[1:] + prompts[:1]).mean() < 0.2
