"""Which solver a diffusers scheduler asks for, and what stands in for one that adds noise on the way."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pyard.diffusion.multistep import OPTIONS, checked_options
from pyard.diffusion.schedulers import CONFIG_NAME, OTHER_SPACINGS, build_scheduler, process_of, scheduler_config
from pyard.diffusion.solvers import Solver, solver_of

# Noise at every step: a sample is no function of x_T.
_STOCHASTIC = r"^EulerAncestral|^KDPM2Ancestral|^DPMSolverSDE|^SASolver|^DDPM(Parallel)?Scheduler$|^CogVideoXDPM"
# diffusers builds this class only beside a library that it is rarely installed with, so its defaults cannot be asked for.
_DPM_SDE = {"_class_name": "DPMSolverSDEScheduler", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "linspace"}
# Multistep solvers of second order that DPM-Solver++ resembles most.
_LIKE_DPM = r"^UniPC|^DPMSolverSinglestep"


class OwnSolver(NamedTuple):
    """What to walk a scheduler's trajectory with.

    Attributes:
        solver: see `pyard.diffusion.solvers.integrate`.
        options: of `dpm++2m`, where they differ from its defaults; None: no difference.
        note: a line to print where it is not the scheduler's own solver; None where it is.
    """

    solver: Solver
    options: Mapping[str, Any] | None
    note: str | None


def load_scheduler(folder: str | Path) -> tuple[Any, str | None]:
    """The scheduler in a diffusers scheduler's folder, a deterministic one, and a line to print if that is another one.

    Raises:
        InputError: no scheduler there, or one that diffusers cannot build.
    """
    config, file = scheduler_config(folder), Path(folder) / CONFIG_NAME
    if config.get("_class_name") == _DPM_SDE["_class_name"]:
        config, note = _deterministic({**_DPM_SDE, **config})
        return build_scheduler(config, file), note
    return deterministic(build_scheduler(config, file))


def deterministic(scheduler: Any) -> tuple[Any, str | None]:
    """A scheduler without noise on the way, since a student learns a trajectory that x_T decides.

    Args:
        scheduler: an instance of a diffusers scheduler; it stays as it is.

    Returns:
        The scheduler itself and None; or one of the same process and spacing that adds no noise, and a line to print about it:
        DDIM for DDPM, ancestral and SDE samplers (Euler where their sigmas are Karras', exponential or of a beta distribution),
        DPM-Solver++ for its SDE variant and for SA-Solver, a flow without `stochastic_sampling`.
    """
    config, note = _deterministic({**getattr(scheduler, "config", {}), "_class_name": type(scheduler).__name__})
    return (scheduler, None) if note is None else (build_scheduler(config, "scheduler"), note)


def own_solver(scheduler: Any) -> OwnSolver:
    """The solver of a deterministic scheduler, or the one of pyard's that is nearest to it."""
    process, config, name = process_of(scheduler), scheduler.config, type(scheduler).__name__
    usual = solver_of(process)
    if name == "DPMSolverMultistepScheduler":
        # algorithm_type 'dpmsolver' cannot end on clean data, so process_of has refused it.
        options = checked_options({key: config[key] for key in OPTIONS})
        return OwnSolver("dpm++2m", {key: value for key, value in options.items() if value != OPTIONS[key]} or None, None)
    if name == "FlowMatchHeunDiscreteScheduler":
        return OwnSolver("heun", None, None)
    if re.search(_LIKE_DPM, name):
        return OwnSolver("dpm++2m", None, f"{name}: pyard uses its times with solver 'dpm++2m', which is also second-order")
    if re.search(r"^(FlowMatchEuler|EulerDiscrete|DDIM|CogVideoXDDIM)", name):
        return OwnSolver(usual, None, None)
    return OwnSolver(usual, None, f"{name}: pyard uses its times with solver {usual!r}, which is first-order")


def _deterministic(config: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The settings, with their `_class_name`, of a scheduler that adds no noise, and the line that says what changed."""
    found, name = dict(config), str(config.get("_class_name"))
    algorithm = str(found.get("algorithm_type", ""))
    if algorithm.startswith("sde-"):
        found["algorithm_type"] = "dpmsolver++"
        return found, f"{name}: algorithm_type {algorithm!r} adds noise at every step; replaced by 'dpmsolver++'"
    if found.get("stochastic_sampling"):
        found["stochastic_sampling"] = False
        return found, f"{name}: stochastic_sampling adds noise at every step; replaced by Euler steps without noise"
    if not re.search(_STOCHASTIC, name):
        return found, None
    if name.startswith("SASolver"):
        replaced, dropped = "DPMSolverMultistepScheduler", {"algorithm_type"}
    elif name.startswith("CogVideoX"):
        replaced, dropped = "CogVideoXDDIMScheduler", set()
    elif any(found.get(key) for key in OTHER_SPACINGS):
        replaced, dropped = "EulerDiscreteScheduler", set()
    else:
        replaced, dropped = "DDIMScheduler", set()
    # They end on clean data, whatever is left in their settings of other classes; those that clip say so.
    settings = {"clip_sample": False, **found, "set_alpha_to_one": True}
    known = _parameters(replaced) - dropped
    return (
        {**{key: value for key, value in settings.items() if key in known}, "_class_name": replaced},
        f"{name} adds noise at every step, so x_T does not decide its samples; replaced by {replaced}",
    )


def _parameters(name: str) -> set[str]:
    import diffusers

    return set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
