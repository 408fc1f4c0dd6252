"""What goes wrong in long runs: numbers that are not finite, full disks, too little memory."""

from __future__ import annotations

import functools
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import assert_same_run, small_disk, start, student_and_real_data, teacher_and_store, train_in, wait

from pyard.errors import InputError
from pyard.storage.checkpoints import Checkpoints
from pyard.storage.log import read_log
from pyard.training import regression
from pyard.training.processes import memory_advice


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    teacher_and_store(tmp_path)
    return tmp_path


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch):
    """Put NaN into a gradient, or into the loss, of the given updates."""

    def at(steps: set[int], what: str) -> None:
        compute = regression.Regression.compute

        def poisoned(self, step, batch):
            if what == "loss" and step in steps:
                batch.target[0, 0] = float("nan")
            measured = compute(self, step, batch)
            if what == "gradient" and step in steps:
                self.parameters[0].grad.fill_(float("inf"))
                return regression.Measured(measured.loss, measured.per_step, torch.tensor(float("inf")), {})
            return measured

        monkeypatch.setattr(regression.Regression, "compute", poisoned)

    return at


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(folder, poison, what):
    poison({2, 5, 6}, what)
    run = train_in(folder, "run", max_steps=8, lr_schedule="constant")
    lines = read_log(run / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 4, 7, 8]
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 1, 3, 3]
    state = torch.load(run / "checkpoints" / "step-0000008" / "optimizer.pt", weights_only=True)["state"]
    assert {int(entry["step"]) for entry in state.values()} == {5}
    weights = load_file(run / "student" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_so_many_in_a_row_end_the_run_and_leave_the_last_checkpoint(folder, poison):
    poison({3, 6, 7, 8}, "loss")
    with pytest.raises(InputError, match=r"3 updates in a row, up to step 8.*the checkpoint of step 5 is intact"):
        train_in(folder, "run", max_steps=20, save_every=5, max_skipped_in_a_row=3)
    assert Checkpoints(folder / "run" / "checkpoints").steps() == [5]


def test_skips_are_remembered_by_checkpoints(folder, poison):
    poison({2, 4, 5}, "loss")
    with pytest.raises(InputError):
        train_in(folder, "run", max_steps=6, save_every=1, max_skipped_in_a_row=2)
    # The run goes on from the checkpoint of step 4, whose update was skipped: with that of step 5 they are 2 again.
    with pytest.raises(InputError, match=r"2 updates in a row, up to step 5"):
        train_in(folder, "run", max_steps=6, save_every=1, max_skipped_in_a_row=2)


def test_checkpoints_kept(folder):
    run = train_in(folder, "run", max_steps=12, save_every=1, keep_last=3, keep_every=4)
    assert Checkpoints(run / "checkpoints").steps() == [4, 8, 10, 11, 12]


def test_killed_saves_leave_nothing_behind(folder, monkeypatch):
    """Neither the half of a checkpoint that a kill has left, nor one that lacks files because a kill came while it went."""
    run = train_in(folder, "run", max_steps=4, save_every=2)
    half = run / "checkpoints" / ".step-0000006.4711.new"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    with monkeypatch.context() as patch:

        def killed(path: Path, **options: bool) -> None:
            if not options:
                (path / "model.safetensors").unlink()
                raise KeyboardInterrupt

        patch.setattr("pyard.storage.checkpoints.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            Checkpoints(run / "checkpoints", keep_last=1).drop_old()
    assert Checkpoints(run / "checkpoints").steps() == [4]
    train_in(folder, "run", max_steps=4, save_every=2)
    assert [entry.name for entry in (run / "checkpoints").iterdir()] == ["step-0000004"]


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_previous_checkpoint_valid(folder, world):
    settings = dict(max_steps=9, save_every=3, keep_last=1, keep_every=3)
    assert set(wait(start(folder, "whole", world, **settings))) == {0}
    with small_disk(folder / "run", "2600k"):  # a checkpoint is 1 MB
        assert set(wait(start(folder, "run", world, **settings))) == {1}
        checkpoints = Checkpoints(folder / "run" / "checkpoints")
        done = checkpoints.steps()
        assert done == [3, 6]
        for rank in range(world):
            error = (folder / f"run.error-{rank}").read_text()
            assert "InputError" in error
            assert "the checkpoint of step 9 cannot be written" in error
            assert "the disk is full" in error
            assert "the checkpoint of step 6 is intact" in error
        assert [path.name for path in sorted(checkpoints.path.iterdir())] == ["step-0000003", "step-0000006"]
        subprocess.run(["mount", "-o", "remount,size=16m", folder / "run"], check=True)
        assert set(wait(start(folder, "run", world, **settings))) == {0}
        assert_same_run(folder / "whole", folder / "run")


def limit_memory(spare: int) -> None:
    """Let this process have `spare` more bytes than it has now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, used + spare))


@pytest.mark.slow
def test_running_out_of_memory_says_what_to_lower(tmp_path):
    teacher_and_store(tmp_path, count=2000)
    settings = dict(batch_size=2000, max_steps=1)
    assert wait(start(tmp_path, "run", 1, functools.partial(limit_memory, 600 * 2**20), **settings)) == [1]
    error = (tmp_path / "run.error-0").read_text()
    assert "out of memory with a micro-batch of 2000 samples per process, S = 3 steps and T = 16 tokens" in error
    assert "--gradient_accumulation (now 1" in error
    assert "--activation_checkpointing true" in error
    # The adversarial stage does not accumulate gradients, and does not advise it.
    adversarial = {**student_and_real_data(tmp_path), **settings}
    assert wait(start(tmp_path, "gan", 1, functools.partial(limit_memory, 600 * 2**20), **adversarial)) == [1]
    error = (tmp_path / "gan.error-0").read_text()
    assert "2000 samples per process" in error
    assert "two settings help: more processes, or a smaller --batch_size, and --activation_checkpointing true" in error
    # The advice helps.
    settings |= dict(gradient_accumulation=20, activation_checkpointing=True)
    assert wait(start(tmp_path, "run", 1, functools.partial(limit_memory, 600 * 2**20), **settings)) == [0]


def test_other_errors_are_not_called_memory():
    with pytest.raises(RuntimeError, match="shapes"), memory_advice(1, 2, 3, 4):
        raise RuntimeError("shapes differ")
