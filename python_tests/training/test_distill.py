from __future__ import annotations

from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file

import pyard
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.storage.checkpoints import Checkpoints
from pyard.storage.log import read_log
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.training import train
from pyard.trajectories import TrajectoryStore, generate_trajectories

FLOW = dict(kind="flow", prediction="velocity")  # the trajectories of a random eps-prediction explode
SETTINGS = dict(history_layers=2, batch_size=8, learning_rate=3e-3, save_every=4, log_every=1, progress=False)


def tiny_teacher(seed: int = 0) -> NetworkTeacher:
    return factories.tiny_teacher(NoiseSchedule(**FLOW), seed)


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    return generate_trajectories(
        tiny_teacher(), tmp_path / "store", 40, num_steps=3, teacher_steps=6, batch_size=20, shard_size=20, progress=False
    )


def run(tmp_path: Path, name: str, **changes) -> Path:
    settings = {**SETTINGS, "num_steps": 3, "max_steps": 12, **changes}
    train(tiny_teacher(), tmp_path / "store", out=tmp_path / name, **settings)
    return tmp_path / name


@pytest.mark.parametrize("settings", [
    dict(), dict(heads="shared", mask="anchor"), dict(target="state", output="jump", history_bias=-2.0),
    dict(history_layers=0, target="state"),
], ids=["published", "shared heads, anchor", "jump, bias", "step distillation on states"])  # fmt: skip
def test_training_lowers_the_loss(store, tmp_path, settings):
    out = run(tmp_path, "run", max_steps=60, **settings)
    losses = [line["loss"] for line in read_log(out / "log.jsonl")]
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_teacher_and_its_checkpoint_do_not_change(store, tmp_path):
    teacher = tiny_teacher()
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    train(teacher, store, out=tmp_path / "run", num_steps=3, max_steps=3, **SETTINGS)
    assert all(torch.equal(v, before[k]) for k, v in teacher.network.state_dict().items())


def test_a_finished_run_is_not_trained_again(store, tmp_path):
    out = run(tmp_path, "run")
    before = (out / "checkpoints" / "step-0000012" / "model.safetensors").stat().st_mtime_ns
    run(tmp_path, "run")
    assert (out / "checkpoints" / "step-0000012" / "model.safetensors").stat().st_mtime_ns == before
    assert Checkpoints(out / "checkpoints").steps() == [8, 12]


def test_result_is_the_average_of_the_weights(store, tmp_path):
    out = run(tmp_path, "run")
    newest = out / "checkpoints" / "step-0000012"
    average, weights = load_file(newest / "ema.safetensors"), load_file(newest / "model.safetensors")
    result = load_file(out / "student" / "model.safetensors")
    assert all(torch.equal(result[k], average[k]) for k in result)
    assert any(not torch.equal(result[k], weights[k]) for k in result)


def test_run_folder_of_other_settings_is_refused(store, tmp_path):
    run(tmp_path, "run", max_steps=2)
    with pytest.raises(InputError, match=r"learning_rate: was 0\.003, now 0\.001"):
        run(tmp_path, "run", max_steps=2, learning_rate=1e-3)


def test_another_number_of_trajectories_is_refused_before_any_is_generated(tmp_path):
    settings = {**SETTINGS, "num_steps": 3, "teacher_steps": 6}
    train(factories.tiny_teacher(), out=tmp_path / "run", num_trajectories=16, max_steps=2, **settings)
    with pytest.raises(InputError, match="a run on 16 trajectories, but num_trajectories is 48"):
        train(factories.tiny_teacher(), out=tmp_path / "run", num_trajectories=48, max_steps=2, **settings)
    assert TrajectoryStore.open(tmp_path / "run" / "trajectories").count == 16
    # A store that is there already may hold more than is asked for: the run takes all, and resumes by the same command.
    for count in (16, 8):
        train(factories.tiny_teacher(), out=tmp_path / "run", num_trajectories=count, max_steps=2, **settings)


def test_a_run_goes_on_with_the_trajectories_that_it_began_with(store, tmp_path):
    whole = run(tmp_path, "whole", max_steps=12)
    with pytest.MonkeyPatch.context() as patch:
        save = Checkpoints.save

        def interrupted(self, step, *rest):
            save(self, step, *rest)
            if step == 8:
                raise KeyboardInterrupt

        patch.setattr(Checkpoints, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "grown", max_steps=12)
    more = generate_trajectories(
        tiny_teacher(), tmp_path / "store", 80, num_steps=3, teacher_steps=6, batch_size=20, shard_size=20, progress=False
    )
    assert more.count == 80
    ours, theirs = (load_file(out / "student" / "model.safetensors") for out in (run(tmp_path, "grown", max_steps=12), whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_store_of_another_teacher_or_grid_is_refused(store, tmp_path):
    with pytest.raises(InputError, match="made by teacher"):
        train(tiny_teacher(seed=3), store, out=tmp_path / "run", num_steps=3, max_steps=1, **SETTINGS)
    with pytest.raises(InputError, match=r"num_steps is 4, but 3 in the trajectories in .*store"):
        train(tiny_teacher(), store, out=tmp_path / "run", num_steps=4, max_steps=1, **SETTINGS)


def test_a_loss_that_explodes_stops_the_run(store, tmp_path):
    with pytest.raises(InputError, match="lower --learning_rate"):
        run(tmp_path, "run", learning_rate=1e30, grad_clip=1e30, max_skipped_in_a_row=3)


@pytest.mark.parametrize("settings", [dict(max_steps=0), dict(batch_size=0), dict(learning_rate=-1.0), dict(ema_decay=1.0)])
def test_settings_out_of_range_are_refused(store, tmp_path, settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        run(tmp_path, "run", **settings)


def test_public_train_generates_what_is_missing(tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    student = pyard.train(
        str(tmp_path / "teacher"),
        out=tmp_path / "run",
        num_steps=2,
        num_trajectories=16,
        max_steps=2,
        batch_size=4,
        progress=False,
    )
    assert student.config.history_layers == 1
    assert TrajectoryStore.open(tmp_path / "run" / "trajectories").count == 16
    images = pyard.sample(tmp_path / "run", [0, 1, 2], seed=3)
    assert torch.equal(images[1:2], pyard.sample(student, [0, 1, 2], seed=3)[1:2])


def test_a_student_that_diverged_in_the_last_updates_is_no_result(tmp_path):
    teacher = factories.tiny_teacher(NoiseSchedule(kind="flow", prediction="velocity"))
    settings = dict(num_steps=2, teacher_steps=4, num_trajectories=32, batch_size=8, trackers="none", progress=False)
    settings |= dict(max_steps=6, learning_rate=1e30, lr_schedule="constant")
    with pytest.raises(InputError, match="the student has diverged: its averaged weights reach 1e"):
        train(teacher, out=tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "student").exists()
