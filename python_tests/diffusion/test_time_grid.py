from __future__ import annotations

import dataclasses

import pytest

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError


def test_the_published_grid():
    grid = TimeGrid.build(NoiseSchedule(), num_steps=4, teacher_steps=25)
    assert grid.state_index == (0, 6, 12, 18, 25)
    assert grid.denoised_index == (10, 15, 20)
    assert grid.embed_times == pytest.approx([999 * f for f in (1, 3 / 4, 1 / 2, 1 / 4)])
    visited = NoiseSchedule().timesteps(25)
    assert grid.times == tuple(visited[k] for k in grid.state_index)
    assert grid.for_target("denoised") == grid
    assert grid.for_target("state").embed_times == grid.times[:-1]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6, 12, 24, 25])
def test_every_number_of_steps_has_a_grid(num_steps):
    grid = TimeGrid.build(NoiseSchedule(), num_steps, 25)
    assert grid.num_steps == num_steps
    assert grid.teacher_steps == 25
    assert len(grid.denoised_index) == num_steps - 1


def test_uneven_grids_and_json():
    grid = TimeGrid.build(NoiseSchedule(), 3, 10, state_index=[0, 1, 7, 10], denoised_index=[2, 9], embed_times=[999, 20, 1])
    assert TimeGrid.from_json(grid.to_json()) == grid
    assert grid.same_trajectory(dataclasses.replace(grid, embed_times=(3, 2, 1)))
    assert not grid.same_trajectory(TimeGrid.build(NoiseSchedule(), 3, 10))
    assert not grid.same_trajectory(TimeGrid.build(NoiseSchedule(), 4, 10))


@pytest.mark.parametrize(("settings", "message"), [
    (dict(num_steps=0), "expected 1 to 25"),
    (dict(num_steps=26), "expected 1 to 25"),
    (dict(state_index=[0, 6, 12, 25]), "expected 5 numbers"),
    (dict(state_index=[0, 6, 12, 12, 25]), "decrease"),
    (dict(state_index=[1, 6, 12, 18, 25]), "increase from 0"),
    (dict(state_index=[0, 6, 12, 18, 24]), "from 0 to 25"),
    (dict(denoised_index=[0, 15, 20]), "between 1 and 25"),
    (dict(denoised_index=[10, 20]), "3 denoised_index"),
    (dict(embed_times=[1.0]), "need 4 embed_times"),
])  # fmt: skip
def test_grids_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TimeGrid.build(NoiseSchedule(), **settings)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(times=(1.0, float("nan"), 0.0)), "a time of times is nan"),
    (dict(embed_times=(float("inf"), 0.5)), "a time of embed_times is inf"),
    (dict(state_index=(0, 1.5, 2)), "a number of state_index is 1.5"),
    (dict(state_index=("a", 1, 2)), "a number of state_index is 'a'"),
])  # fmt: skip
def test_grids_of_no_numbers_are_refused(changes, message):
    good = dict(times=(1.0, 0.5, 0.0), embed_times=(1.0, 0.5), state_index=(0, 1, 2), denoised_index=(2,))
    TimeGrid(**good)
    with pytest.raises(InputError, match=message):
        TimeGrid(**{**good, **changes})
    with pytest.raises(InputError, match="teacher_steps is 1000000000"):
        TimeGrid.build(NoiseSchedule(), 2, 10**9)
