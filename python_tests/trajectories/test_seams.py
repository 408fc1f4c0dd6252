"""Trajectories of a text-conditional teacher of several sizes, killed and resumed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from own_teachers import TALL, TEXT, WIDE, save, text_teacher
from training_runs import CONTEXT
from trajectories.gaussian import contents

from pyard.errors import InputError
from pyard.teachers.guidance import solve
from pyard.trajectories import TrajectoryReader, TrajectoryStore, generate_trajectories, merge_trajectories

COUNT = 160


def write(teacher: Path, out: Path, shape: tuple[int, ...], count: int = COUNT, part: str | None = None) -> TrajectoryStore:
    torch.set_num_threads(1)
    options = dict(num_steps=3, teacher_steps=6, batch_size=4, shard_size=4, precision="bfloat16", dtype="bfloat16", seed=2)
    return generate_trajectories(
        teacher,
        out,
        count,
        network=TEXT,
        sample_shape=shape,
        part=part,
        progress=False,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_killed_and_resumed_to_the_same_bytes(shape, tmp_path: Path):
    teacher = Path(save(text_teacher(), tmp_path / "teacher"))
    write(teacher, tmp_path / "whole", shape)
    for shards in (2, 9):
        process = CONTEXT.Process(target=write, args=(teacher, tmp_path / "killed", shape))
        process.start()
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "killed").glob("shards/*.json"))) < shards:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert TrajectoryStore.open(tmp_path / "killed").count < COUNT
    write(teacher, tmp_path / "killed", shape).verify()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_the_store_holds_the_teacher_s_guided_solutions(tmp_path: Path):
    teacher = text_teacher()
    store = generate_trajectories(
        teacher, tmp_path / "store", 8, num_steps=3, teacher_steps=6, sample_shape=TALL, cfg_scale=2.0, progress=False
    )
    batch = TrajectoryReader(store, 8, target="state").gather(np.arange(8))
    numbers = torch.from_numpy(store.manifest.number_of(np.arange(8)))
    states = [state for state, _ in solve(teacher, batch.history[:, 0], numbers, 6, cfg_scale=2.0)]
    for step, found in enumerate(batch.target.unbind(1)):
        torch.testing.assert_close(found, states[2 * step + 1], rtol=1e-4, atol=1e-4)
    expected = teacher.conditions.take(numbers)
    assert all(torch.equal(batch.condition[name], expected[name]) for name in ("tokens", "mask"))


def test_parts_of_another_shape_are_another_store(tmp_path: Path):
    teacher = Path(save(text_teacher(), tmp_path / "teacher"))
    for number in (1, 2):
        write(teacher, tmp_path / str(number), TALL, 16, f"{number}/2")
    merge_trajectories([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    merged = TrajectoryStore.open(tmp_path / "merged")
    merged.verify()
    assert merged.conditions.fingerprint == text_teacher().conditions.fingerprint
    with pytest.raises(InputError, match=r"sample_shape is \(3, 6, 4\), requested \(3, 4, 8\)"):
        write(teacher, tmp_path / "merged", WIDE, 16)
