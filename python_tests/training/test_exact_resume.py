"""Killed at any moment, a run ends as one that was left alone: bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from covering import repetitions, with_products
from safetensors.torch import load_file
from training_runs import (
    assert_same_run,
    kill_and_resume,
    log_kills,
    signal_at,
    start,
    student_and_real_data,
    teacher_and_store,
    train_in,
    wait,
)

from pyard.storage.checkpoints import Checkpoints
from pyard.storage.log import read_log
from pyard.training.processes import PREEMPTED_STATUS, preemption
from pyard.trajectories import TrajectoryStore

# Several of everything that a checkpoint has to remember.
EVERYTHING = dict(ema_decay=[0.9, 0.99], gradient_accumulation=2, rollout_probability=0.5, history_bias=-1.0, warmup_steps=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    teacher_and_store(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", ["regression", "adversarial"])
def test_killed_three_times_and_resumed_is_bitwise_the_same(folder, stage, world):
    settings = EVERYTHING if stage == "regression" else student_and_real_data(folder)
    settings = {**settings, "max_steps": 24}
    assert set(wait(start(folder, "whole", world, **settings))) == {0}
    settings["save_every"] = 3
    kills = kill_and_resume(folder, world, 3, seed=random.randrange(2**32), settings=settings)
    assert len(kills) == 3, kills
    assert_same_run(folder / "whole", folder / "killed")
    if stage == "adversarial":
        newest = folder / "killed" / "checkpoints" / "step-0000024"
        assert {"discriminator.safetensors", "discriminator-optimizer.pt", "real.pt"} <= {f.name for f in newest.iterdir()}
        assert torch.load(newest / "real.pt", weights_only=True) == {"position": 24 * 8}


def test_one_process_and_two_see_the_same_losses(folder):
    settings = {**EVERYTHING, "max_steps": 6, "step_weights": "min_snr"}
    train_in(folder, "one", **{**settings, "gradient_accumulation": 1})
    assert set(wait(start(folder, "two", 2, **settings))) == {0}
    one, two = (read_log(folder / name / "log.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
        assert a["loss_per_step"] == pytest.approx(b["loss_per_step"], rel=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-4)
    weights = [load_file(folder / name / "student" / "model.safetensors") for name in ("one", "two")]
    assert max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0]) < 2e-4


def test_two_processes_generate_trajectories_once(folder):
    changes = dict(store=None, num_trajectories=2100, teacher_steps=6, max_steps=2, evaluate_every=1, evaluation_trajectories=8)
    assert set(wait(start(folder, "run", 2, **changes))) == {0}
    store = TrajectoryStore.open(folder / "run" / "trajectories")
    store.verify()
    assert store.count == 2100
    assert len(store.shards) > 2  # each process has some to write
    assert len(read_log(folder / "run" / "exposure_bias.jsonl")) == 2


def test_an_error_of_rank_0_ends_both(folder):
    (folder / "file").write_text("in the way")
    assert set(wait(start(folder, "file", 2))) == {1}
    assert re.match("InputError: .*file is a file; expected a folder", (folder / "file.error-0").read_text())
    assert (folder / "file.error-1").read_text().startswith("InputError: rank 0: ")


@pytest.mark.parametrize(
    ("world", "number"),
    [(1, signal.SIGUSR1), pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow)],
    ids=["one, USR1", "two, TERM"],
)
def test_signals_write_a_checkpoint_and_end_with_a_code_of_their_own(folder, world, number):
    settings = dict(max_steps=40, save_every=1000)
    processes = start(folder, "killed", world, **settings)
    # The scheduler of a cluster may signal any one of the processes.
    step = signal_at(processes[-1:], folder / "killed" / "log.jsonl", 3, number)
    assert step >= 3
    assert set(wait(processes)) == {PREEMPTED_STATUS}
    (saved,) = Checkpoints(folder / "killed" / "checkpoints").steps()
    assert saved >= step
    assert set(wait(start(folder, "killed", world, **settings))) == {0}
    assert set(wait(start(folder, "whole", world, **settings))) == {0}
    assert_same_run(folder / "whole", folder / "killed")


def test_ctrl_c_writes_a_checkpoint_and_ends_with_130(folder):
    settings = dict(max_steps=40, save_every=1000)
    processes = start(folder, "killed", 1, **settings)
    step = signal_at(processes, folder / "killed" / "log.jsonl", 3, signal.SIGINT)
    assert set(wait(processes)) == {130}
    (saved,) = Checkpoints(folder / "killed" / "checkpoints").steps()
    assert saved >= step >= 3
    assert set(wait(start(folder, "killed", 1, **settings))) == {0}
    assert set(wait(start(folder, "whole", 1, **settings))) == {0}
    assert_same_run(folder / "whole", folder / "killed")


def test_a_second_ctrl_c_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with preemption() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.status == PREEMPTED_STATUS
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.status == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_while_trajectories_are_generated_end_with_that_code_too(folder, number):
    settings = dict(store=None, num_trajectories=60_000, teacher_steps=6, max_steps=2)
    processes = start(folder, "run", 1, **settings)
    shards = folder / "run" / "trajectories" / "shards"
    deadline = time.monotonic() + 120
    while not list(shards.glob("*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(processes[0].pid, number)
    assert set(wait(processes)) == {PREEMPTED_STATUS}
    count = TrajectoryStore.open(folder / "run" / "trajectories").count
    assert 0 < count < 60_000
    assert set(wait(start(folder, "run", 1, **{**settings, "num_trajectories": count}))) == {0}
    TrajectoryStore.open(folder / "run" / "trajectories").verify()


def test_handlers_are_put_back(folder):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    state = torch.get_rng_state()
    train_in(folder, "run", max_steps=1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [pytest.param("regression", 1, marks=with_products), ("adversarial", 2)])
def test_killed_many_times(folder, stage, world):
    """Fifty times with PYARD_TEST_PRODUCTS=1; PYARD_KILL_LOG=FILE keeps what was done."""
    count = repetitions(50, in_ci=20)
    settings = EVERYTHING if stage == "regression" else student_and_real_data(folder)
    settings = {**settings, "max_steps": 120 + 4 * count}
    assert set(wait(start(folder, "whole", world, **settings))) == {0}
    settings["save_every"] = 3
    seed = int(os.environ.get("PYARD_KILL_SEED", random.randrange(2**32)))
    kills = kill_and_resume(folder, world, count, seed, settings)
    assert len(kills) == count
    assert_same_run(folder / "whole", folder / "killed")
    log_kills(f"{stage} stage, {world} process(es)", seed, settings, kills)
