"""What the configuration files of a text-to-image pipeline decide about its trajectories; weights have no part in it."""

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
        family: what pyard knows of the pipeline's class.
        configs: of its transformer and VAE.
        scheduler: the pipeline's, or the deterministic one in its place.
        schedule: the forward process of that scheduler.
    """

    family: PipelineFamily
    configs: PipelineConfigs
    scheduler: Any
    schedule: NoiseSchedule

    @property
    def cfg_scale(self) -> float:
        """The pipeline's own guidance, as F_u + cfg_scale (F_c - F_u)."""
        return self.family.cfg_scale

    @property
    def teacher_steps(self) -> int:
        """The pipeline's own number of steps."""
        return self.family.num_steps

    @property
    def solver(self) -> Solver:
        """The solver that the folder's scheduler is, or the nearest one."""
        return own_solver(self.scheduler).solver

    @property
    def solver_options(self) -> Mapping[str, Any] | None:
        """Settings of the folder's multistep solver that are not its defaults."""
        return own_solver(self.scheduler).options

    def visits(self, num_steps: int, sample_shape: tuple[int, ...]) -> Visits:
        """The times that the pipeline visits in so many steps for samples of this shape."""
        patch = self.family.patch_size(self.configs)
        call = self.family.scheduler_call(self.scheduler.config, num_steps, sample_shape, patch)
        return visited(self.scheduler, num_steps, sigmas=call.get("sigmas"), mu=call.get("mu"))

    def grid(self, num_steps: int, teacher_steps: int | None, sample_shape: tuple[int, ...]) -> TimeGrid:
        """The grid of a student of `num_steps` jumps, evenly spaced among the teacher's steps.

        Where S divides n these are the times of stock sampling of S steps (the table of `pyard.diffusion.scheduler_times`), but
        for schedulers whose last step starts next to clean data, as SD3's does: there a jump would have almost nothing to do.

        Args:
            num_steps: S.
            teacher_steps: n; None: the pipeline's own number, rounded up to a multiple of S.
            sample_shape: [C, h, w], which some shifts depend on.
        """
        n = -(-self.teacher_steps // num_steps) * num_steps if teacher_steps is None else teacher_steps
        return TimeGrid.build(self.schedule, num_steps, n, visits=self.visits(n, sample_shape))

    def shape_of(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """[C, h, w] of the samples of pictures of so many pixels; None: the pipeline's default."""
        return self.family.sample_shape(self.configs, height, width)

    def constants(self, embedded_guidance: float | None) -> dict[str, float]:
        """What every prompt is conditioned on beside its text.

        Args:
            embedded_guidance: what the transformer is told of guidance; None: the pipeline's default.

        Raises:
            InputError: a value, and a transformer that is told none.
        """
        default = self.family.embedded_guidance(self.configs)
        if default is None and embedded_guidance is not None:
            raise InputError(
                f"embedded_guidance is {embedded_guidance:g}, but the transformer of this {self.family.pipeline} takes none; "
                "use cfg_scale"
            )
        return {} if default is None else {"guidance": float(default if embedded_guidance is None else embedded_guidance)}
