"""Several stores read as one, and students trained on several sample shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from own_teachers import TALL, TEXT, WIDE, save, text_teacher
from safetensors.torch import load_file
from training_runs import assert_same_run, kill_and_resume, start, wait

import pyard
from pyard.cli.command_line import main
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.storage.log import read_log
from pyard.trajectories import TrajectoryReader, TrajectoryStore, generate_trajectories
from pyard.trajectories.buckets import BucketReader, check_buckets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher/`, and `wide/` and `tall/` with 40 and 25 trajectories of three steps."""
    folder = tmp_path_factory.mktemp("buckets")
    teacher = text_teacher()
    save(teacher, folder / "teacher")
    for name, shape, count, size in (("wide", WIDE, 40, 20), ("tall", TALL, 25, 5)):
        generate_trajectories(
            teacher, folder / name, count, num_steps=3, teacher_steps=6, batch_size=size, sample_shape=shape, progress=False
        )
    return folder


def readers(folder: Path, batch_size: int = 4, **options) -> list[TrajectoryReader]:
    stores = [TrajectoryStore.open(folder / name) for name in ("wide", "tall")]
    return [TrajectoryReader(store, batch_size, target="state", seed=3, **options) for store in stores]


def test_an_epoch_is_an_epoch_of_each_store_in_an_order_of_the_seed(folder):
    reader = BucketReader(readers(folder), seed=3)
    assert reader.batches_per_epoch == 10 + 6
    alone = {reader.store.manifest.sample_shape: reader for reader in readers(folder)}
    orders = []
    for _ in range(3):
        shapes = []
        for _ in range(16):
            batch = next(reader)
            shapes.append(tuple(batch.history.shape[2:]))
            assert torch.equal(batch.history, next(alone[shapes[-1]]).history)  # each store's own order
        assert shapes.count(WIDE) == 10
        orders.append(shapes)
    assert orders[0] != orders[1] != orders[2]
    again, other = BucketReader(readers(folder), seed=3), BucketReader(readers(folder), seed=4)
    assert [tuple(next(again).history.shape[2:]) for _ in range(16)] == orders[0]
    assert [tuple(next(other).history.shape[2:]) for _ in range(16)] != orders[0]


@pytest.mark.parametrize("taken", [0, 5, 16, 21, 32])
def test_it_resumes_at_the_exact_sample(folder, taken):
    reader = BucketReader(readers(folder), seed=3)
    for _ in range(taken):
        next(reader)
    state = json.loads(json.dumps(reader.state_dict()))
    rest = [next(reader).history.clone() for _ in range(20)]
    resumed = BucketReader(readers(folder), seed=3)
    next(resumed)
    resumed.load_state_dict(state)
    assert all(torch.equal(next(resumed).history, batch) for batch in rest)


def test_ranks_take_their_share_of_the_same_store(folder):
    whole = BucketReader(readers(folder), seed=3)
    shares = [BucketReader(readers(folder, 2, rank=rank, world_size=2), seed=3) for rank in range(2)]
    for _ in range(20):
        assert torch.equal(next(whole).history, torch.cat([next(share).history for share in shares]))


def test_what_does_not_resume_or_belong_together_is_refused(folder, tmp_path: Path):
    reader = BucketReader(readers(folder), seed=3)
    state = reader.state_dict()
    with pytest.raises(InputError, match="2 stores with seed 4, was 2 with seed 3"):
        BucketReader(readers(folder), seed=4).load_state_dict(state)
    with pytest.raises(InputError, match="1 stores with seed 3, was 2"):
        BucketReader(readers(folder)[:1], seed=3).load_state_dict(state)
    with pytest.raises(InputError, match=r"epoch 0, batch 17; expected"):
        reader.load_state_dict({**state, "batch": 17})
    with pytest.raises(InputError, match="manifest is"):
        BucketReader(readers(folder)[::-1], seed=3).load_state_dict(state)
    with pytest.raises(InputError, match="expected one and the same"):
        BucketReader([*readers(folder, 2), *readers(folder, 4)])
    wide, tall = (TrajectoryStore.open(folder / name) for name in ("wide", "tall"))
    options = dict(num_steps=3, teacher_steps=6, batch_size=5, progress=False)
    teacher = text_teacher()
    guided = generate_trajectories(teacher, tmp_path / "guided", 5, sample_shape=TALL, cfg_scale=2.0, **options)
    with pytest.raises(InputError, match=r"do not belong together: cfg_scale is 1\.5 in one, 2\.0 in the other"):
        check_buckets([wide, guided])
    more = generate_trajectories(teacher, tmp_path / "more", 5, sample_shape=TALL, seed=1, **options)
    with pytest.raises(InputError, match=r"have one sample shape, \(3, 6, 4\)"):
        check_buckets([wide, tall, more])
    with pytest.raises(InputError, match="this network takes"):
        generate_trajectories(teacher, tmp_path / "odd", 5, sample_shape=(3, 5, 4), **options)


def test_the_command_line_trains_on_all_and_records_them(folder, tmp_path: Path, capsys):
    words = ["train", "--teacher", str(folder / "teacher"), "--network", TEXT, "--num-steps", "3", "--batch-size", "4"]
    words += ["--save-every", "5", "--log-every", "1", "--evaluate-every", "10", "--evaluation-trajectories", "4"]
    words += ["--trackers", "none", "--progress", "false", "--max-steps", "20"]
    stores = [str(folder / "wide"), str(folder / "tall")]
    assert main([*words, "--out", str(tmp_path / "a"), "--trajectories", *stores]) == 0
    assert main([*words, "--out", str(tmp_path / "b"), "--trajectories", f"[{', '.join(stores)}]"]) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert len(read_log(tmp_path / "a" / "log.jsonl")) == 20
    assert len(read_log(tmp_path / "a" / "exposure_bias.jsonl")) == 2
    config = json.loads((tmp_path / "a" / "student" / "config.json").read_text())
    assert config["sample_shapes"] == [list(WIDE), list(TALL)]
    student = Student.from_pretrained(tmp_path / "a", network=TEXT)
    assert student.sample_shapes == (WIDE, TALL)
    assert pyard.sample(student, [1, 2]).shape == (2, *WIDE)
    assert pyard.sample(student, [1, 2], sample_shape=TALL).shape == (2, *TALL)
    with pytest.raises(InputError, match=r"trained on \(3, 4, 8\), \(3, 6, 4\)"):
        pyard.sample(student, [1], sample_shape=(3, 8, 8))
    pipe = pyard.ARDPipeline(student)
    assert pipe(condition_numbers=[1], sample_shape=TALL).images[0].size == (4, 6)
    with pytest.raises(InputError, match="trained on"):
        pipe(condition_numbers=[1], latents=torch.randn(1, 3, 8, 8))
    sample = ["sample", "--student", str(tmp_path / "a"), "--network", TEXT, "--out", str(tmp_path / "s.npz")]
    assert main([*sample, "--sample-shape", "[3, 6, 4]"]) == 0
    assert np.load(tmp_path / "s.npz")["samples"].shape == (5, *TALL)
    assert main([*sample, "--sample-shape", "3", "6", "4"]) == 0
    capsys.readouterr()
    assert main([*sample, "--sample-shape", "[3, 6, 8]"]) == 2
    assert "this student was trained on (3, 4, 8), (3, 6, 4)" in capsys.readouterr().err
    evaluate = ["evaluate", "--students", str(tmp_path / "a"), "--teacher", str(folder / "teacher"), "--network", TEXT]
    evaluate += ["--count", "8", "--samples-npz", str(tmp_path / "e.npz"), "--progress", "false"]
    assert main([*evaluate, "--sample-shape", "[3, 6, 4]"]) == 0
    assert np.load(tmp_path / "e.npz")["arr_0"].shape == (8, 6, 4, 3)
    capsys.readouterr()
    assert main([*evaluate, "--sample-shape", "[3, 2, 2]"]) == 2
    assert "draws (3, 4, 8), (3, 6, 4) of 5 classes; the teacher draws (3, 2, 2) of 5" in capsys.readouterr().err
    # The checkpoint says what it was trained on, too.
    words = ["consolidate", "--run", str(tmp_path / "a"), "--out", str(tmp_path / "early"), "--step", "15", "--network", TEXT]
    assert main(words) == 0
    assert Student.from_pretrained(tmp_path / "early", network=TEXT).sample_shapes == (WIDE, TALL)


def test_one_store_of_the_usual_shape_leaves_no_trace(folder, tmp_path: Path):
    options = dict(network=TEXT, num_steps=3, batch_size=4, max_steps=1, progress=False)
    for name, recorded in (("wide", None), ("tall", [list(TALL)])):
        student = pyard.train(folder / "teacher", [folder / name], out=tmp_path / name, **options)
        config = json.loads((tmp_path / name / "student" / "config.json").read_text())
        assert config.get("sample_shapes") == recorded
        assert ("sample_shapes" in config) == (recorded is not None)
        assert student.sample_shape == (WIDE if name == "wide" else TALL)
        assert pyard.sample(student, [0]).shape == (1, *student.sample_shape)
    with pytest.raises(InputError, match="an empty list"):
        pyard.train(folder / "teacher", [], out=tmp_path / "none", **options)
    with pytest.raises(InputError, match="takes one store"):
        pyard.train(
            folder / "teacher",
            [folder / "wide", folder / "tall"],
            out=tmp_path / "x",
            **options,
            student="x",
            stage="adversarial",
        )


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_and_resumed_is_bitwise_the_same(folder, tmp_path: Path, world):
    (tmp_path / "teacher").symlink_to(folder / "teacher")
    stores = [str(folder / "wide"), str(folder / "tall")]
    settings = dict(network=TEXT, store=stores, max_steps=30, batch_size=4, loss="pseudo_huber", ema_decay=[0.9, 0.99])
    assert set(wait(start(tmp_path, "whole", world, **settings))) == {0}
    settings["save_every"] = 3
    assert len(kill_and_resume(tmp_path, world, 2, 11, settings)) == 2
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_pseudo_huber_suits_every_size(folder, tmp_path: Path):
    """A store alone and in a bucket has one loss: c grows with the numbers of its own samples."""
    options = dict(network=TEXT, num_steps=3, batch_size=25, max_steps=1, progress=False, loss="pseudo_huber", log_every=1)
    pyard.train(folder / "teacher", folder / "tall", out=tmp_path / "alone", **options)
    both = [folder / "wide", folder / "tall"]
    pyard.train(folder / "teacher", both, out=tmp_path / "both", **{**options, "max_steps": 2, "learning_rate": 1e-12})
    alone = load_file(tmp_path / "alone" / "student" / "model.safetensors")
    assert alone.keys() == load_file(tmp_path / "both" / "student" / "model.safetensors").keys()
    losses = [line["loss"] for line in read_log(tmp_path / "both" / "log.jsonl")]
    assert any(loss == pytest.approx(read_log(tmp_path / "alone" / "log.jsonl")[0]["loss"], rel=1e-5) for loss in losses)
