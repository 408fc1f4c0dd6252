"""The mathematics: noise, schedules, time grids and ODE solvers. No networks; `noise` needs numpy alone."""
