from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_student
from models.autoencoders import plain_vae
from tiny_pipelines import tiny_pipeline
from training_runs import numbers, teacher_and_store, train_in

from pyard.data.pictures import tiles
from pyard.diffusion.noise import standard_normal
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.sampling.exposure_bias import exposure_bias
from pyard.storage.log import read_log
from pyard.teachers import load_teacher
from pyard.training import train
from pyard.training.loop import Meter
from pyard.training.processes import Processes
from pyard.training.watch import in_order
from pyard.trajectories import TrajectoryBatch, TrajectoryStore, generate_trajectories


def test_exposure_bias_of_known_errors():
    """A student that is given its own rollout as the teacher's trajectory has no error, and known ones when that is shifted."""
    student = tiny_student(3, history_layers=2)
    noise, labels = torch.randn(6, 2, 8, 8), torch.arange(6) % 5
    rolled = torch.stack(list(student.rollout(noise, labels)), dim=1).detach()
    history = torch.cat([noise[:, None], rolled[:, :-1]], dim=1)
    batches = [TrajectoryBatch(history[:4], rolled[:4], labels[:4]), TrajectoryBatch(history[4:], rolled[4:], labels[4:])]
    curve = exposure_bias(student, batches)
    assert curve.times == student.config.grid.times[1:]
    assert max(curve.teacher_forced) < 1e-8
    assert max(curve.rollout) < 1e-8
    shifted = [
        TrajectoryBatch(b.history, b.target + torch.tensor([1.0, 2.0, 3.0])[:, None, None, None], b.condition) for b in batches
    ]
    curve = exposure_bias(student, shifted)
    assert curve.teacher_forced == pytest.approx((1, 4, 9), rel=1e-4)
    assert curve.rollout == pytest.approx((1, 4, 9), rel=1e-4)


def test_first_step_has_no_exposure_bias_and_later_ones_have(tmp_path: Path):
    teacher_and_store(tmp_path)
    run = train_in(tmp_path, "run", max_steps=2)
    student = Student.from_pretrained(run)
    store = TrajectoryStore.open(tmp_path / "store")
    from pyard.training import TrainConfig

    curve = exposure_bias(student, in_order(store, TrainConfig(teacher="", out=run, batch_size=16)))
    assert curve.teacher_forced[0] == pytest.approx(curve.rollout[0], rel=1e-5)
    assert curve.rollout[2] > 1.01 * curve.teacher_forced[2]
    with pytest.raises(InputError, match="no trajectories"):
        exposure_bias(student, [])


def test_tensorboard_gets_numbers_pictures_and_curves_once_each(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    teacher_and_store(tmp_path)
    settings = dict(evaluate_every=2, evaluation_trajectories=8, max_steps=6, save_every=2)
    with pytest.MonkeyPatch.context() as patch:
        # Ends after the evaluation of step 4 and before its checkpoint: on resuming, step 4 is watched again.
        from pyard.storage.checkpoints import Checkpoints

        save = Checkpoints.save

        def interrupted(self: Checkpoints, step: int, *rest: object) -> None:
            if step == 4:
                raise KeyboardInterrupt
            save(self, step, *rest)  # type: ignore[arg-type]

        patch.setattr(Checkpoints, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_in(tmp_path, "run", **settings)
    run = train_in(tmp_path, "run", **settings)
    curves = read_log(run / "exposure_bias.jsonl")
    assert [curve["step"] for curve in curves] == [2, 4, 6]
    assert all(len(curve["rollout"]) == 3 for curve in curves)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    curves_of = {"exposure_bias/rollout/2", "exposure_bias/teacher_forced/0"}
    assert {"loss", "grad_norm", "loss_step/2", *curves_of} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("exposure_bias/rollout/2")] == [2, 4, 6]
    log = {line["step"]: line["loss"] for line in read_log(run / "log.jsonl")}
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(log, rel=1e-5)
    assert [event.step for event in events.Images("samples")] == [2, 4, 6]
    # Held-out trajectories start from other noise than those trained on.
    stores = [TrajectoryStore.open(folder) for folder in (run / "held-out", tmp_path / "store")]
    first = [store.tensors(store.shards[0])["noise"][0] for store in stores]
    assert (first[0] != first[1]).any()


def test_pictures_are_decoded_with_the_vae_of_the_run(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    teacher_and_store(tmp_path)
    plain_vae().save_pretrained(tmp_path / "teacher" / "vae")
    run = train_in(
        tmp_path, "run", max_steps=2, evaluate_every=2, evaluation_trajectories=4, save_every=2, trackers="tensorboard"
    )
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    (event,) = events.Images("samples")
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    student = Student.from_pretrained(run)
    assert student.codec is not None
    noise = torch.from_numpy(standard_normal(0, np.arange(20), student.sample_shape))
    with torch.inference_mode():
        *_, latents = student.rollout(noise, torch.arange(20) % 5)
    expected = tiles(student.codec.decode(latents).numpy(), columns=10)  # images of 16 x 16 pixels, in colour
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).max() <= 2
    assert (shown[..., 0] != shown[..., 2]).any()
    assert np.array_equal(np.asarray(Image.open(run / "grids" / "step-0000002.png")), shown)

    plain_vae(latent_channels=3).save_pretrained(tmp_path / "teacher" / "vae")
    with pytest.raises(InputError, match="latents of 3 channels"):  # before the first update
        train_in(tmp_path, "wrong", max_steps=2, evaluate_every=2, evaluation_trajectories=4, trackers="tensorboard")


def test_grids_of_the_first_prompts_are_kept_in_the_run_folder(tmp_path: Path):
    """Step by step the same prompts and noise; a prompt that comes twice is drawn once."""
    from PIL import Image

    pipeline = tiny_pipeline("pixart_sigma", tmp_path / "pipeline")
    prompts = ["a red circle", "a red circle", "a square\tabove", *(f"{n} circles" for n in range(9))]
    size = dict(num_steps=2, teacher_steps=4)
    store = generate_trajectories(
        pipeline, tmp_path / "store", 4, height=32, width=32, prompts=prompts, batch_size=2, progress=False, **size
    )
    run = tmp_path / "run"
    student = train(
        pipeline, store, out=run, batch_size=2, max_steps=2, num_steps=2, learning_rate=1e-2, evaluate_every=1,
        evaluation_trajectories=2, trackers="none", progress=False, heads="shared",
    )  # fmt: skip
    texts = (run / "grids" / "prompts.txt").read_text().splitlines()
    assert texts == ["a red circle", "a square above", *(f"{n} circles" for n in range(6))]
    first, last = (np.asarray(Image.open(run / "grids" / f"step-000000{n}.png")) for n in (1, 2))
    noise = torch.from_numpy(standard_normal(0, np.arange(8), student.sample_shape))
    with torch.inference_mode():
        *_, latents = student.rollout(noise, store.conditions.take([0, *range(2, 9)]))
    assert student.codec is not None
    expected = tiles(student.codec.decode(latents).numpy(), columns=4)
    assert last.shape == expected.shape
    assert np.abs(last.astype(int) - expected).max() <= 2
    assert (first != last).any()


def test_held_out_trajectories_are_of_the_same_classes_and_may_become_more(tmp_path: Path):
    teacher_and_store(tmp_path)
    teacher = load_teacher(tmp_path / "teacher")
    generate_trajectories(
        teacher, tmp_path / "two", 40, num_steps=3, teacher_steps=6, labels=[1, 4], batch_size=20, progress=False
    )
    for count in (4, 12):
        changes = dict(max_steps=count, evaluate_every=4, evaluation_trajectories=count)
        run = train_in(tmp_path, f"run-{count}", store=tmp_path / "two", **changes)
        held_out = TrajectoryStore.open(run / "held-out")
        assert held_out.manifest.number_of(np.arange(4)).tolist() == [1, 4, 1, 4]
    train_in(tmp_path, "run-4", store=tmp_path / "two", max_steps=4, evaluate_every=4, evaluation_trajectories=12)
    assert TrajectoryStore.open(tmp_path / "run-4" / "held-out").count == 12


def test_watching_does_not_change_the_run(tmp_path: Path):
    teacher_and_store(tmp_path)
    plain = train_in(tmp_path, "plain", max_steps=4)
    watched = train_in(tmp_path, "watched", max_steps=4, evaluate_every=1, evaluation_trajectories=8)
    assert (plain / "student" / "model.safetensors").read_bytes() == (watched / "student" / "model.safetensors").read_bytes()
    assert numbers(plain / "log.jsonl") == numbers(watched / "log.jsonl")


def test_wandb_gets_numbers_pictures_and_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    teacher_and_store(tmp_path)
    run = train_in(tmp_path, "run", trackers="wandb", max_steps=4, evaluate_every=2, evaluation_trajectories=8)
    (folder,) = (run / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    content = record.read_bytes()
    for name in (b"loss_step/2", b"grad_norm", b"exposure_bias/rollout/2", b"history_layers"):
        assert name in content, name
    assert len(list((folder / "files" / "media" / "images").glob("samples*.png"))) == 2


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="W&B is installed")
def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path):
    teacher_and_store(tmp_path)
    with pytest.raises(InputError, match="pip install wandb"):
        train_in(tmp_path, "run", trackers="wandb")


def test_progress_bar_shows_loss_rate_and_use_of_the_device(tmp_path: Path, capfd):
    teacher_and_store(tmp_path)
    train_in(tmp_path, "run", progress=True, peak_tflops=0.01)
    err = capfd.readouterr().err
    assert re.search(r"12/12 \[\d\d:\d\d<\d\d:\d\d", err)  # tqdm's time left
    assert re.search(r"loss=\d\.\d{4}", err)
    assert re.search(r"samples/s=\d+", err)
    assert re.search(r"MFU=\d+\.\d%", err)


def test_rates(monkeypatch):
    from pyard.training import TrainConfig

    clock = iter([0.0, 2.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Meter(TrainConfig(teacher="", out=Path(), batch_size=8, peak_tflops=1e-3), 5e7, Processes())
    for _ in range(5):
        meter.count()
    # 2.5 updates a second of 0.05 GFLOP, at a peak of 1 GFLOP/s.
    assert meter.rates() == {"samples/s": "20.00", "MFU": "12.5%"}
