"""Students of somebody else's backbones through the command line and the public functions, from trajectories to a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.feature_files import Plain, SmallInception, save_onnx, save_torchscript
from own_teachers import TEXT, VIDEO, WIDE, save, text_teacher, video_teacher

import pyard
from pyard.cli.command_line import main
from pyard.runtime import OnnxStudent
from pyard.storage.log import read_log
from pyard.trajectories import TrajectoryReader, TrajectoryStore


def run(*words: Any) -> None:
    """A command that must succeed."""
    assert main([str(word) for word in words]) == 0, words


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line with which a command refuses."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2, words
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher/`, `store/` and `run/`, made by commands."""
    folder = tmp_path_factory.mktemp("text")
    save(text_teacher(), folder / "teacher")
    flags = ["--count", 24, "--num-steps", 3, "--teacher-steps", 6, "--batch-size", 12, "--seed", 3, "--progress", "false"]
    named = ["--teacher", folder / "teacher", "--network", TEXT]
    run("trajectories", *named, "--out", folder / "store", *flags, "--precision", "bfloat16", "--dtype", "bfloat16")
    flags = ["--num-steps", 3, "--max-steps", 6, "--batch-size", 8, "--save-every", 3, "--log-every", 1, "--evaluate-every", 3]
    flags += ["--evaluation-trajectories", 8, "--mixed-precision", "bf16", "--progress", "false"]
    run("train", *named, "--trajectories", folder / "store", "--out", folder / "run", *flags)
    return folder


def test_trajectories_hold_prompts_and_no_square_pictures(folder, capsys):
    store = TrajectoryStore.open(folder / "store")
    assert store.manifest.sample_shape == WIDE
    assert store.manifest.precision == store.manifest.dtype == "bfloat16"
    assert store.conditions.count == 5
    batch = next(TrajectoryReader(store, 4, target="state"))
    assert batch.history.shape == (4, 3, *WIDE)
    assert set(batch.condition) == {"tokens", "mask"}
    run("trajectories", "verify", folder / "store")
    run("trajectories", "stats", folder / "store")
    assert "24 trajectories" in capsys.readouterr().out
    assert (folder / "store" / "stats.png").is_file()


def test_training_wrote_a_log_pictures_and_curves(folder):
    log = read_log(folder / "run" / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in log)
    curves = read_log(folder / "run" / "exposure_bias.jsonl")
    assert len(curves) == 2
    assert list((folder / "run" / "tensorboard").iterdir())
    assert json.loads((folder / "run" / "student" / "config.json").read_text())["family"] == TEXT


def test_samples_are_arrays_and_pictures(folder, capsys):
    named = ["sample", "--student", folder / "run", "--network", TEXT, "--seed", 5]
    run(*named, "--labels", "[4, 0]", "--out", folder / "a.npz")
    with np.load(folder / "a.npz") as archive:
        assert archive["labels"].tolist() == [4, 0]
        student = pyard.Student.from_pretrained(folder / "run", network=TEXT)
        np.testing.assert_allclose(archive["samples"], pyard.sample(student, [4, 0], seed=5).numpy(), rtol=1e-6)
    run(*named, "--out", folder / "a.png")
    assert (folder / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "label 5: expected 0 to 4" in refused(capsys, *named, "--labels", "[5]", "--out", folder / "a.npz")
    assert "has no classes" in refused(capsys, *named, "--labels", "[tench]", "--out", folder / "a.npz")


def test_described(folder, capsys):
    run("describe", folder / "run", "--network", TEXT)
    out = capsys.readouterr().out
    assert "history in the lowest 1 layers" in out
    # Keys and values of one attention: 2 heads, 3 steps of 8 tokens, 8 wide, in float32.
    assert f"cache per image    {2 * 2 * 3 * 8 * 8 * 4 / 1000:.3g} kB" in out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_evaluated_by_features_of_a_file(folder, kind, tmp_path: Path):
    if kind == "torchscript":
        save_torchscript(SmallInception(), tmp_path / "network.pt")
    else:
        save_onnx(Plain(), tmp_path / "network.onnx", size=8)
    features = tmp_path / ("network.pt" if kind == "torchscript" else "network.onnx")
    real = np.random.default_rng(1).integers(0, 256, (40, WIDE[1], WIDE[2], 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", real)
    words = ["--students", folder / "run", "--teacher", folder / "teacher", "--network", TEXT, "--out", tmp_path / "q.json"]
    words += ["--count", 20, "--batch-size", 8, "--trajectories", folder / "store", "--progress", "false"]
    words += ["--reference", tmp_path / "reference.npz", "--samples-npz", tmp_path / "samples.npz"]
    # The network in ONNX takes images of one size.
    run("evaluate", *words, "--features", features, *([] if kind == "torchscript" else ["--feature-settings.resize", 8]))
    teacher, student = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert teacher["network_passes"] == 12  # the guided 6 steps that the student was trained on
    assert student["network_passes"] == 3
    assert student["frechet_to_data"] > 0
    assert student["endpoint_mse"] > 0
    assert len(student["exposure_bias"]["rollout"]) == 3
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (20, WIDE[1], WIDE[2], 3)


@pytest.mark.slow
def test_consolidated_and_exported(folder, capsys):
    run("consolidate", "--run", folder / "run", "--out", folder / "early", "--step", 3, "--network", TEXT)
    early = pyard.Student.from_pretrained(folder / "early", network=TEXT)
    assert early.num_conditions == 5
    assert pyard.sample(early, [1]).shape == (1, *WIDE)
    for form in ("sampler", "step"):
        file = folder / f"{form}.onnx"
        run("export", "--student", folder / "early", "--onnx", file, "--network", TEXT, "--form", form)
        condition = {name: tensor.numpy() for name, tensor in early.conditions.take([1, 3]).items()}
        expected = pyard.sample(early, [1, 3], seed=4).numpy()
        found = OnnxStudent(file).sample(condition=condition, seed=4)
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_folder_alone_is_refused_by_every_command(folder, capsys):
    student, teacher = folder / "run", folder / "teacher"
    for words in (
        ["sample", "--student", student, "--out", folder / "b.npz"],
        ["describe", student],
        ["evaluate", "--students", student, "--teacher", teacher],
        ["export", "--student", student, "--onnx", folder / "s.onnx"],
        ["consolidate", "--run", student, "--out", folder / "c"],
        ["trajectories", "--teacher", teacher, "--out", folder / "t", "--count", 8],
        ["train", "--teacher", teacher, "--out", folder / "r"],
        ["convert", "--source", teacher, "--out", folder / "d"],
    ):
        assert f"--network {TEXT}" in refused(capsys, *words), words


def test_the_pipeline_draws_what_sample_draws(folder, tmp_path: Path):
    from pyard import ARDPipeline

    pipe = ARDPipeline.from_pretrained(folder / "run", network=TEXT)
    pipe.save_pretrained(tmp_path / "pipe")
    again = ARDPipeline.from_pretrained(tmp_path / "pipe", network=TEXT)
    noise = torch.randn(2, *WIDE)
    student = pipe.student.student
    with torch.inference_mode():
        *_, expected = student.rollout(noise, torch.tensor([3, 1]))
    for one in (pipe, again):
        one.set_progress_bar_config(disable=True)
        assert torch.equal(one(condition_numbers=[3, 1], latents=noise, output_type="latent").images, expected)
        condition = student.conditions.take([3, 1])
        assert torch.equal(one(condition=condition, latents=noise, output_type="latent").images, expected)
    assert [picture.size for picture in again(condition_numbers=[3, 1]).images] == [(8, 4), (8, 4)]
    with pytest.raises(pyard.InputError, match="one of"):
        again()
    with pytest.raises(pyard.InputError, match="has no classes"):
        again(class_labels=["tench"])


def test_a_video_toy_from_trajectories_to_arrays(tmp_path: Path, capsys):
    save(video_teacher(), tmp_path / "teacher")
    named = ["--teacher", tmp_path / "teacher", "--network", VIDEO]
    run("trajectories", *named, "--out", tmp_path / "store", "--count", 16, "--num-steps", 2, "--teacher-steps", 4)
    run("trajectories", "stats", tmp_path / "store")
    assert "not pictures" in capsys.readouterr().out
    assert not (tmp_path / "store" / "stats.png").exists()
    assert "not pictures" in refused(capsys, "trajectories", "stats", tmp_path / "store", "--picture", tmp_path / "a.png")
    flags = ["--num-steps", 2, "--batch-size", 4, "--save-every", 2, "--evaluate-every", 2, "--evaluation-trajectories", 4]
    flags += ["--trackers", "tensorboard", "--trajectories", tmp_path / "store", "--progress", "false"]
    run("train", *named, *flags, "--out", tmp_path / "run", "--max-steps", 4)
    assert len(read_log(tmp_path / "run" / "exposure_bias.jsonl")) == 2
    student = ["--student", tmp_path / "run", "--network", VIDEO]
    run("sample", *student, "--labels", "[3, 1]", "--out", tmp_path / "a.npz")
    assert np.load(tmp_path / "a.npz")["samples"].shape == (2, 2, 3, 2, 4)
    assert "not pictures" in refused(capsys, "sample", *student, "--out", tmp_path / "a.png")
    run("describe", tmp_path / "run", "--network", VIDEO)
