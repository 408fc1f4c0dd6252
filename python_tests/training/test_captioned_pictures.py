"""The adversarial stage of a text-to-image student, on a folder of pictures that says what each shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline
from training_runs import assert_same_run, signal_at, start, train_in, wait

from pyard.conditions import PromptTable
from pyard.errors import InputError
from pyard.models.codec import LatentCodec
from pyard.trajectories import generate_trajectories

REGRESSION: dict[str, Any] = dict(
    num_steps=2, history_layers=2, max_steps=2, batch_size=4, learning_rate=1e-3, save_every=2, log_every=1, heads="shared",
    trackers="none", progress=False, history_bias=-1.0,
)  # fmt: skip
CAPTIONS = ["a red circle", "a dog", "two small blue squares above a cross", "a dog", "a blue cross", "a small dog"]


def write_pictures(folder: Path, captions: list[str]) -> Path:
    """Noise of several sizes; the one that no line names is left out."""
    random = np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    lines = []
    for number, caption in enumerate(captions):
        name = f"more/{number}.png" if number % 2 else f"{number}.png"
        pixels = random.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}))
    Image.fromarray(pixels).save(folder / "unnamed.png")
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("captions")
    tiny_pipeline("sd3", place / "teacher")
    generate_trajectories(
        place / "teacher", place / "store", 8, num_steps=2, teacher_steps=4, height=32, width=32,
        prompts=["a red circle", "a small blue cross"], batch_size=4, keep="state", progress=False,
    )  # fmt: skip
    train_in(place, "regression", **REGRESSION)
    write_pictures(place / "pictures", CAPTIONS)
    return place


def settings_of(folder: Path, pictures: str = "pictures", **adversarial: Any) -> dict[str, Any]:
    options = dict(real=str(folder / pictures), virtual_batch=2, width=8, warmup_steps=1, flips=True, **adversarial)
    return {
        **REGRESSION, "max_steps": 6, "stage": "adversarial", "student": str(folder / "regression"), "adversarial": options
    }  # fmt: skip


@pytest.mark.slow
def test_pictures_and_captions_are_encoded_once_and_a_killed_run_resumes(folder: Path) -> None:
    settings = settings_of(folder)
    train_in(folder, "whole", **settings)
    processes = start(folder, "killed", 1, None, **settings)
    assert signal_at(processes, folder / "killed" / "log.jsonl", 3) >= 3
    wait(processes)
    assert not (folder / "killed" / "student").exists()
    shard = folder / "killed" / "real" / "000000.safetensors"
    encoded = shard.stat().st_mtime_ns
    train_in(folder, "killed", **settings)
    assert shard.stat().st_mtime_ns == encoded
    assert_same_run(folder / "whole", folder / "killed")
    # What is there: the VAE's posteriors in the order of the lines, and the numbers of their captions.
    table, tensors = PromptTable(folder / "whole" / "real" / "conditions"), load_file(shard)
    assert list(table.prompts) == CAPTIONS
    assert tensors["labels"].tolist() == list(range(6))
    with Image.open(folder / "pictures" / "more" / "1.png") as picture:
        scale = 32 / 41
        resized = picture.resize((round(50 * scale), 32), Image.Resampling.BICUBIC)
        left = (resized.width - 32) // 2
        pixels = torch.from_numpy(np.asarray(resized.crop((left, 0, left + 32, 32))).copy()).permute(2, 0, 1) / 127.5 - 1
    codec = LatentCodec.beside(folder / "teacher")
    assert codec is not None
    mean, std = codec.posterior(pixels[None], sample_shape=tensors["images"].shape[1:])
    torch.testing.assert_close(tensors["images"][1].float(), mean[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(tensors["std"][1].float(), std[0], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_captions_reach_the_discriminators(folder: Path) -> None:
    short = {**settings_of(folder), "max_steps": 3}
    train_in(folder, "as-told", **short)
    write_pictures(folder / "swapped", CAPTIONS[1:] + CAPTIONS[:1])
    train_in(folder, "told-otherwise", **{**short, "adversarial": settings_of(folder, "swapped")["adversarial"]})
    ours, theirs = (
        load_file(folder / run / "checkpoints" / "step-0000003" / "discriminator.safetensors")
        for run in ("as-told", "told-otherwise")
    )
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (load_file(folder / run / "real" / "000000.safetensors") for run in ("as-told", "told-otherwise"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "the pictures are the same"
    # An edited caption is no longer what the run learns from.
    lines = (folder / "swapped" / "metadata.jsonl").read_text(encoding="utf-8")
    (folder / "swapped" / "metadata.jsonl").write_text(lines.replace("a blue cross", "a red cross"), encoding="utf-8")
    with pytest.raises(InputError, match="prompt 4: found 'a blue cross', requested 'a red cross'"):
        train_in(folder, "told-otherwise", **{**short, "adversarial": settings_of(folder, "swapped")["adversarial"]})


def test_bad_folders_are_refused(folder: Path) -> None:
    classes = folder / "classes"
    for name in ("0", "1"):
        (classes / name).mkdir(parents=True)
        shutil.copy(folder / "pictures" / "0.png", classes / name)
    with pytest.raises(InputError, match=r"classes, but this student draws from prompts; .* metadata\.jsonl"):
        train_in(folder, "bad", **settings_of(folder, "classes"))
    for line, message in (
        ('{"text": "a dog"}', r'line 1: "file_name" is None; expected the name of a picture'),
        ('{"file_name": "0.png"}', "line 1: none of text, prompt, caption"),
        ('{"file_name": "7.png", "text": "a dog"}', r"line 1: there is no picture 7\.png in"),
        ('{"file_name": "metadata.jsonl", "text": "a dog"}', r"metadata\.jsonl cannot be read as a picture"),
    ):
        (classes / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
        with pytest.raises(InputError, match=message):
            train_in(folder, "bad", **settings_of(folder, "classes", real_cache=str(folder / "bad-real")))
