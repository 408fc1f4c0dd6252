from __future__ import annotations

import dataclasses

import pytest

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.scheduler_times import Visits
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


FLOW = NoiseSchedule(kind="flow", prediction="velocity")
VISITS = Visits((1.0, 0.9, 0.7, 0.4, 0.0), (1.0, 0.899, 0.699, 0.399))


def test_a_grid_of_a_solvers_own_times():
    grid = TimeGrid.build(FLOW, 2, visits=VISITS)
    assert (grid.times, grid.state_index, grid.teacher_steps) == ((1.0, 0.7, 0.0), (0, 2, 4), 4)
    assert grid.visits(FLOW) == VISITS
    # What the teacher's network was told where the states are.
    assert grid.for_target("state").embed_times == (1.0, 0.699)
    assert grid.for_target("denoised") == grid
    assert TimeGrid.from_json(grid.to_json()) == grid
    true_times = TimeGrid.build(FLOW, 2, visits=VISITS._replace(embed_times=VISITS.times[:-1]))
    assert true_times.teacher_embed_times is None
    assert true_times.for_target("state").embed_times == (1.0, 0.7)
    assert true_times.visits(FLOW).embed_times == VISITS.times[:-1]
    # Another thing told on the way is another trajectory, whatever the student is told.
    assert not grid.same_trajectory(true_times)
    assert grid.same_trajectory(grid.for_target("state"))
    placed = TimeGrid.build(FLOW, 2, visits=VISITS, state_index=(0, 3, 4))
    assert placed.times == (1.0, 0.4, 0.0)


def test_the_schedules_own_times_are_not_written_down():
    grid = TimeGrid.build(FLOW, 2, 4, visits=Visits.of(FLOW, 4))
    assert grid == TimeGrid.build(FLOW, 2, 4)
    assert set(grid.to_json()) == {"times", "embed_times", "state_index", "denoised_index"}
    assert grid.visits(FLOW) == Visits.of(FLOW, 4)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(teacher_times=(1.0, 0.0)), "2 teacher_times; expected 5, decreasing"),
    (dict(teacher_times=(1.0, 0.9, 0.9, 0.4, 0.0)), "5 teacher_times; expected 5, decreasing"),
    (dict(teacher_times=(1.0, 0.9, 0.8, 0.4, 0.0)), "are not the teacher_times at state_index"),
    (dict(teacher_times=(1.0, 0.9, "x", 0.4, 0.0)), "a time of teacher_times is 'x'"),
    (dict(teacher_embed_times=(1.0, 0.9)), "teacher_embed_times with 2 times; expected 4 beside 5 teacher_times"),
    (dict(teacher_times=None), "teacher_embed_times with no teacher_times"),
])  # fmt: skip
def test_teacher_times_that_do_not_fit_are_refused(changes, message):
    grid = TimeGrid.build(FLOW, 2, visits=VISITS)
    with pytest.raises(InputError, match=message):
        dataclasses.replace(grid, **changes)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(teacher_steps=5), "visits of 4 steps; expected those of 5 teacher steps"),
    (dict(visits=VISITS._replace(times=(1.0, 0.9, 0.7, 0.4, 0.1))), "must decrease to 0"),
    (dict(num_steps=5), "5 jumps out of 4 teacher steps"),
])  # fmt: skip
def test_visits_that_do_not_fit_a_grid_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TimeGrid.build(FLOW, **{"num_steps": 2, "visits": VISITS, **settings})
