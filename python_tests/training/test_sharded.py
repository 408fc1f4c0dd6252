"""FSDP2 on two gloo processes: really in shards, equal to DDP, resumed exactly, consolidated to one folder."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_runs import (
    SETTINGS,
    assert_same_run,
    kill_and_resume,
    signal_at,
    small_disk,
    start,
    student_and_real_data,
    teacher_and_store,
    train_in,
    wait,
)

import pyard
from pyard.cli.command_line import main
from pyard.errors import InputError
from pyard.models.codec import LatentCodec
from pyard.models.student import Student
from pyard.storage.checkpoints import Checkpoints
from pyard.storage.log import read_log
from pyard.teachers import load_teacher
from pyard.training import train
from pyard.training.processes import PREEMPTED_STATUS
from pyard.training.regression import Regression
from pyard.training.sharded import consolidate

FSDP = dict(parallel="fsdp", ema_decay=[0.9, 0.99], gradient_accumulation=2, rollout_probability=0.5, history_bias=-1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    teacher_and_store(tmp_path)
    return tmp_path


def assert_in_shards() -> None:
    """In each process: what is trained and averaged are DTensors, of which this process holds a part."""
    apply = Regression.apply

    def checked(self: Regression) -> None:
        for module in (self.student, *self.averages):
            assert isinstance(module, FSDPModule)
            for name, parameter in module.named_parameters():
                assert isinstance(parameter, DTensor), name
                assert parameter.to_local().numel() < parameter.numel(), name
        assert all(isinstance(p.grad, DTensor) for p in self.student.parameters())
        apply(self)

    Regression.apply = checked  # type: ignore[method-assign]


def assert_near(one: Path, two: Path, names: list[str], rel: float) -> None:
    a, b = read_log(one / "log.jsonl"), read_log(two / "log.jsonl")
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        for name in names:
            assert x[name] == pytest.approx(y[name], rel=rel, abs=1e-5), (x["step"], name)
    weights = [load_file(run / "student" / "model.safetensors") for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0]) < 1e-3


@pytest.mark.slow
def test_equal_to_ddp_and_consolidated(folder, capsys):
    settings = {**FSDP, "max_steps": 6, "save_every": 3, "evaluate_every": 3, "evaluation_trajectories": 8}
    assert set(wait(start(folder, "ddp", 2, **{**settings, "parallel": "ddp"}))) == {0}
    assert set(wait(start(folder, "fsdp", 2, assert_in_shards, **settings))) == {0}
    assert_near(folder / "ddp", folder / "fsdp", ["loss", "grad_norm"], 1e-4)
    curves = [read_log(folder / name / "exposure_bias.jsonl") for name in ("ddp", "fsdp")]
    for a, b in zip(*curves, strict=True):
        assert a["rollout"] == pytest.approx(b["rollout"], rel=1e-4)
        assert a["teacher_forced"] == pytest.approx(b["teacher_forced"], rel=1e-4)
    # One folder of a checkpoint in shards, by the command.
    newest = folder / "fsdp" / "checkpoints" / "step-0000006"
    assert len(list((newest / "shards").glob("*.distcp"))) == 2
    assert main(["consolidate", "--run", str(folder / "fsdp"), "--out", str(folder / "whole")]) == 0
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder / "whole", folder / "fsdp" / "student"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    Student.from_pretrained(folder / "whole")
    slow = consolidate(folder / "fsdp", folder / "slow", weights="ema-0.99").state_dict()
    second = load_file(folder / "fsdp" / "student-ema-0.99" / "model.safetensors")
    assert all(torch.equal(slow[key], second[key]) for key in second)
    early = consolidate(folder / "fsdp", folder / "early", step=3, weights="model").state_dict()
    ddp = consolidate(folder / "ddp", folder / "early-ddp", step=3, weights="model").state_dict()
    assert max((early[key] - ddp[key]).abs().max() for key in ddp) < 1e-3
    with pytest.raises(InputError, match=r"no weights 'emma'; there are.*ema-0\.99"):
        consolidate(folder / "fsdp", folder / "x", weights="emma")
    with pytest.raises(InputError, match=r"checkpoints of steps \[3, 6\]; expected 4"):
        consolidate(folder / "fsdp", folder / "x", step=4)


@pytest.mark.slow
def test_low_rank_additions_are_equal_to_ddp_in_both_stages(folder):
    settings = {**FSDP, "max_steps": 6, "save_every": 3, "lora_rank": 2}
    assert set(wait(start(folder, "ddp", 2, **{**settings, "parallel": "ddp"}))) == {0}
    assert set(wait(start(folder, "fsdp", 2, **settings))) == {0}
    assert_near(folder / "ddp", folder / "fsdp", ["loss", "grad_norm"], 1e-4)
    whole = consolidate(folder / "fsdp", folder / "whole").state_dict()
    result = load_file(folder / "fsdp" / "student" / "model.safetensors")
    assert all(torch.equal(whole[key], result[key]) for key in result)
    settings = {**student_and_real_data(folder), "max_steps": 4, "lora_rank": 2, "lora_heads": "lora"}
    settings["adversarial"]["warmup_steps"] = 1
    assert set(wait(start(folder, "gan-ddp", 2, **settings))) == {0}
    assert set(wait(start(folder, "gan-fsdp", 2, **{**settings, "parallel": "fsdp"}))) == {0}
    assert_near(folder / "gan-ddp", folder / "gan-fsdp", ["loss", "grad_norm", "generator", "generator_weight"], 5e-3)
    first, last = (load_file(folder / name / "student" / "model.safetensors") for name in ("first", "gan-fsdp"))
    moved = torch.linalg.svdvals(last["heads.0.linear.weight"] - first["heads.0.linear.weight"])
    assert moved[1] > 1e-5
    assert moved[2] < 1e-2 * moved[0], "the heads move by a matrix of rank 2 as well"


def assert_same_shards(a: Path, b: Path) -> None:
    """Bit for bit: log, result, and everything in the last checkpoints, their shards included."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    assert_same_run(a, b)
    newest = [max((run / "checkpoints").glob("step-*")) for run in (a, b)]
    states = []
    for i, checkpoint in enumerate(newest):
        dcp_to_torch_save(checkpoint / "shards", a / f"{i}.pt")
        states.append(torch.load(a / f"{i}.pt", weights_only=True))
    leaves = [torch.utils._pytree.tree_leaves(state) for state in states]
    assert len(leaves[0]) == len(leaves[1]) > 100
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(*leaves, strict=True))


@pytest.mark.slow
def test_everything_that_saves_memory_together_is_equal_to_ddp(folder):
    """Gradients through the rollout, blocks computed again, bfloat16: shards are gathered S times before one backward pass."""
    changes = dict(rollout_probability=1.0, rollout_gradient="backprop", activation_checkpointing=True, mixed_precision="bf16")
    settings = {**FSDP, **changes, "max_steps": 4}
    assert set(wait(start(folder, "ddp", 2, **{**settings, "parallel": "ddp"}))) == {0}
    assert set(wait(start(folder, "fsdp", 2, assert_in_shards, **settings))) == {0}
    assert_near(folder / "ddp", folder / "fsdp", ["loss", "grad_norm"], 2e-2)


def test_the_vae_comes_along(folder):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    teacher = load_teacher(folder / "teacher")
    teacher.codec = LatentCodec(vae)
    teacher.save_pretrained(folder / "latent" / "teacher")
    (folder / "store").rename(folder / "latent" / "store")
    assert set(wait(start(folder / "latent", "run", 2, parallel="fsdp", max_steps=2))) == {0}
    assert pyard.sample(folder / "latent" / "run", [1]).shape == (1, 3, 8, 8)
    consolidate(folder / "latent" / "run", folder / "whole")
    assert pyard.sample(folder / "whole", [1]).shape == (1, 3, 8, 8)


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_the_same(folder):
    settings = {**FSDP, "max_steps": 16}
    assert set(wait(start(folder, "whole", 2, **settings))) == {0}
    settings["save_every"] = 3
    assert kill_and_resume(folder, 2, 2, random.randrange(2**32), settings)
    assert_same_shards(folder / "whole", folder / "killed")


@pytest.mark.slow
def test_adversarial_stage_is_equal_to_ddp_and_resumes(folder):
    settings = {**student_and_real_data(folder), "max_steps": 8}
    settings["adversarial"]["warmup_steps"] = 2
    assert set(wait(start(folder, "ddp", 2, **settings))) == {0}
    settings["parallel"] = "fsdp"
    assert set(wait(start(folder, "fsdp", 2, assert_in_shards, **settings))) == {0}
    names = ["loss", "grad_norm", "generator", "generator_weight", "discriminator", "r1", "feature_distance"]
    assert_near(folder / "ddp", folder / "fsdp", names, 5e-3)
    settings["save_every"] = 2
    assert kill_and_resume(folder, 2, 1, random.randrange(2**32), settings)
    assert_same_shards(folder / "fsdp", folder / "killed")


@pytest.mark.slow
def test_signal_writes_shards_and_a_full_disk_leaves_those_before(folder):
    settings = {**FSDP, "max_steps": 9, "save_every": 3, "keep_last": 1, "keep_every": 3}
    assert set(wait(start(folder, "whole", 2, **settings))) == {0}
    signalled = {**settings, "save_every": 1000}
    processes = start(folder, "signalled", 2, **signalled)
    assert signal_at(processes[:1], folder / "signalled" / "log.jsonl", 2, signal.SIGTERM) > 0
    assert set(wait(processes)) == {PREEMPTED_STATUS}
    assert set(wait(start(folder, "signalled", 2, **signalled))) == {0}
    assert_same_shards(folder / "whole", folder / "signalled")
    size = sum(f.stat().st_size for f in (folder / "whole" / "checkpoints" / "step-0000003").rglob("*") if f.is_file())
    with small_disk(folder / "run", f"{size * 5 // 2 // 1024}k"):
        assert set(wait(start(folder, "run", 2, **settings))) == {1}
        checkpoints = Checkpoints(folder / "run" / "checkpoints")
        assert [path.name for path in sorted(checkpoints.path.iterdir())] == ["step-0000003", "step-0000006"]
        for rank in range(2):
            error = (folder / f"run.error-{rank}").read_text()
            assert error.startswith("InputError")
            assert "the disk is full" in error
            assert "the checkpoint of step 9 cannot be written" in error
            assert "the checkpoint of step 6 is intact" in error
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", folder / "run"], check=True)
        assert set(wait(start(folder, "run", 2, **settings))) == {0}
        assert_same_shards(folder / "whole", folder / "run")


@pytest.mark.slow
def test_damaged_shards_are_named(folder):
    settings = {**FSDP, "max_steps": 2}
    assert set(wait(start(folder, "run", 2, **settings))) == {0}
    shard = folder / "run" / "checkpoints" / "step-0000002" / "shards" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert set(wait(start(folder, "run", 2, **settings))) == {1}
    for rank in range(2):
        error = (folder / f"run.error-{rank}").read_text()
        assert "step-0000002 is damaged (shards/__1_0.distcp is not the file that was written), and no earlier one is" in error
    with pytest.raises(InputError, match=r"step-0000002 is damaged \(shards/__1_0.distcp .*choose another --step of \[2\]"):
        consolidate(folder / "run", folder / "whole")


def test_one_process_reads_what_several_have_finished_and_trains_nothing(folder):
    with pytest.raises(InputError, match="expected several processes"):
        train_in(folder, "run", parallel="fsdp")
    settings = {**FSDP, "max_steps": 2, "lr_schedule": "constant"}
    assert set(wait(start(folder, "run", 2, **settings))) == {0}
    before = {file: file.read_bytes() for file in sorted((folder / "run" / "student").iterdir())}
    train_in(folder, "run", **settings)
    assert {file: file.read_bytes() for file in sorted((folder / "run" / "student").iterdir())} == before
    student = train(folder / "teacher", folder / "store", out=folder / "run", **{**SETTINGS, **settings})
    expected = load_file(folder / "run" / "student" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in student.state_dict().items())
    with pytest.raises(InputError, match="expected several processes"):
        train_in(folder, "run", **{**settings, "max_steps": 3})
    with pytest.raises(InputError, match="seed: was 0, now 1"):
        train_in(folder, "run", **{**settings, "seed": 1})
