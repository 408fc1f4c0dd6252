"""Stores of trajectories whose times a diffusers scheduler placed, and of DPM-Solver++."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from trajectories.gaussian import GaussianTeacher, write

from pyard import TimeGrid
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.scheduler_times import visited
from pyard.errors import InputError
from pyard.teachers.guidance import solve
from pyard.trajectories import TrajectoryStore

FLOW = NoiseSchedule(kind="flow", prediction="velocity")


def test_a_store_holds_the_trajectory_of_the_schedulers_times(tmp_path: Path) -> None:
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    visits, teacher = visited(scheduler, 12), GaussianTeacher(schedule=FLOW)
    assert visited(scheduler, 4).times == pytest.approx(visits.times[::3], abs=1e-6)
    grid = TimeGrid.build(FLOW, 4, visits=visits, state_index=(0, 3, 6, 9, 12))
    store = write(tmp_path / "store", teacher=teacher, grid=grid, solver="dpm++2m")
    manifest = TrajectoryStore.open(tmp_path / "store").manifest
    assert (manifest, manifest.solver) == (store.manifest, "dpm++2m")
    assert manifest.grid.visits(manifest.schedule) == visits
    tensors = store.tensors(store.shards[0])
    noise, numbers, stored = (torch.as_tensor(tensors[name]) for name in ("noise", "label", "state"))
    told: list[float] = []
    predict = teacher.predict
    teacher.predict = lambda x, time, condition: told.append(time) or predict(x, time, condition)  # type: ignore[method-assign]
    walked = solve(teacher, noise, numbers, visits, solver="dpm++2m", cfg_scale=store.manifest.cfg_scale)
    states = [state for state, _ in walked]
    assert tuple(told) == visits.embed_times
    for k, target in zip((3, 6, 9, 12), stored.unbind(1), strict=True):
        torch.testing.assert_close(target, states[k - 1], rtol=1e-5, atol=1e-5)
    # Neither other times nor another solver go into the same store, and the times are named.
    with pytest.raises(InputError, match=r"grid\.times is .*grid\.teacher_times is \[0\.99.*requested None"):
        write(tmp_path / "store", 40, teacher=teacher, num_steps=4, teacher_steps=12, solver="dpm++2m")
    with pytest.raises(InputError, match="solver is 'dpm\\+\\+2m', requested 'euler'"):
        write(tmp_path / "store", 40, teacher=teacher, grid=grid)
    plain = write(tmp_path / "plain", teacher=teacher, num_steps=4, teacher_steps=12)
    assert {"teacher_times", "teacher_embed_times"}.isdisjoint(plain.manifest.to_json()["grid"])
    with pytest.raises(InputError, match=r"grid\.teacher_times is None, requested"):
        write(tmp_path / "plain", 40, teacher=teacher, grid=grid)
