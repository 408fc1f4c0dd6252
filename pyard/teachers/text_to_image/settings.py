"""The settings of a text-to-image pipeline's trajectories that its configuration files determine, without any weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.scheduler_solvers import own_solver
from pyard.diffusion.scheduler_times import Visits, visited
from pyard.diffusion.solvers import Solver
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.teachers.text_to_image.families import PipelineConfigs, PipelineFamily


class PipelineSettings:
    """A text-to-image pipeline as its configuration files describe it.

    Attributes:
        family: what pyard knows about the pipeline's class.
        configs: configurations of its transformer and VAE.
        scheduler: the pipeline's scheduler, or the deterministic one that replaces it.
        schedule: that scheduler's forward process.
    """

    family: PipelineFamily
    configs: PipelineConfigs
    scheduler: Any
    schedule: NoiseSchedule

    @property
    def cfg_scale(self) -> float:
        """The pipeline's own guidance weight s in F_u + s (F_c - F_u)."""
        return self.family.cfg_scale

    @property
    def teacher_steps(self) -> int:
        """The pipeline's own number of steps."""
        return self.family.num_steps

    @property
    def solver(self) -> Solver:
        """The solver that corresponds to the folder's scheduler, or the nearest one."""
        return own_solver(self.scheduler).solver

    @property
    def solver_options(self) -> Mapping[str, Any] | None:
        """Settings of the folder's multistep solver that differ from its defaults."""
        return own_solver(self.scheduler).options

    def visits(self, num_steps: int, sample_shape: tuple[int, ...]) -> Visits:
        """The times that the pipeline visits in a number of steps, for samples of a shape."""
        patch = self.family.patch_size(self.configs)
        call = self.family.scheduler_call(self.scheduler.config, num_steps, sample_shape, patch)
        return visited(self.scheduler, num_steps, sigmas=call.get("sigmas"), mu=call.get("mu"))

    def grid(self, num_steps: int, teacher_steps: int | None, sample_shape: tuple[int, ...]) -> TimeGrid:
        """The grid of a student of `num_steps` jumps, evenly spaced among the teacher's steps.

        If S divides n, these are the times of stock sampling with S steps (the table of `pyard.diffusion.scheduler_times`). The
        exception are schedulers whose last step starts next to clean data, such as SD3's: there, the last jump would have
        almost nothing to do.

        Args:
            num_steps: S, the number of jumps.
            teacher_steps: n, the number of teacher steps; None: the pipeline's own, rounded up to a multiple of S.
            sample_shape: [C, h, w], which some shifts depend on.
        """
        n = -(-self.teacher_steps // num_steps) * num_steps if teacher_steps is None else teacher_steps
        return TimeGrid.build(self.schedule, num_steps, n, visits=self.visits(n, sample_shape))

    def shape_of(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """[C, h, w] of the samples for pictures of a size in pixels; None: the pipeline's default."""
        return self.family.sample_shape(self.configs, height, width)

    def constants(self, embedded_guidance: float | None) -> dict[str, float]:
        """Further conditions that are the same for every prompt, by name.

        Args:
            embedded_guidance: guidance scale to pass to the transformer; None: the pipeline's default.

        Raises:
            InputError: a value is given, but the transformer takes none; or none is given, and the pipeline has no default.
        """
        if embedded_guidance is not None and self.configs.transformer.get("guidance_embeds"):
            return {"guidance": float(embedded_guidance)}
        default = self.family.embedded_guidance(self.configs)
        if default is None and embedded_guidance is not None:
            raise InputError(
                f"embedded_guidance is {embedded_guidance:g}, but the transformer of this {self.family.pipeline} takes none; "
                "use cfg_scale"
            )
        return {} if default is None else {"guidance": float(default)}
