"""What the trajectories of a text-to-image pipeline have beside those of other teachers: prompts, and settings of guidance."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pyard.conditions import Conditions, PromptTable, load_conditions
from pyard.conditions.prompt_file import PromptLine
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.teachers import Teacher
from pyard.teachers.guidance import truncation_interval
from pyard.teachers.text_to_image.teacher import PipelineTeacher

_Teacher = TypeVar("_Teacher", bound=Teacher)


def with_prompts(
    teacher: _Teacher, lines: list[PromptLine] | None, out: Path, *, embedded_guidance: float | None, progress: bool
) -> _Teacher:
    """A text-to-image teacher with its prompts encoded in the folder of a store; other teachers are returned unchanged.

    Raises:
        InputError: prompts are given for a class-conditional teacher, or none for a text-to-image teacher.
    """
    if not isinstance(teacher, PipelineTeacher):
        check_classes(lines, embedded_guidance)
        return teacher
    if lines is None:
        if isinstance(teacher.conditions, PromptTable):
            return teacher
        table = load_conditions(out)
        if not isinstance(table, PromptTable):
            raise InputError("trajectories: this teacher draws from prompts: give prompts=… (--prompts), a file or a list")
        table.require_encoder(teacher.text_encoder)
        own = table.record.constants.get("guidance")
        if embedded_guidance is not None and embedded_guidance != own:
            raise InputError(
                f"trajectories: embedded_guidance is {embedded_guidance:g}, but {own} in {table.folder}; leave it out, or give "
                "that value"
            )
        return teacher.with_prompts(table)
    table = PromptTable.build(
        teacher.text_encoder,
        lines,
        out / "conditions",
        constants=teacher.constants(embedded_guidance),
        default_negative=teacher.family.negative_prompt,
        progress=progress,
    )
    return teacher.with_prompts(table)


def guided_interval(
    cfg_truncation: float, cfg_interval: tuple[float, float] | None, teacher: Teacher, grid: TimeGrid
) -> tuple[float, float] | None:
    """The interval of times that Z-Image's setting stands for."""
    if not isinstance(teacher, PipelineTeacher) or teacher.family.guidance != "z_image" or cfg_interval is not None:
        raise InputError("trajectories: cfg_truncation is for Z-Image, in place of cfg_interval; give cfg_interval alone")
    return truncation_interval(cfg_truncation, grid.visits(teacher.schedule))


def text_limit(table: Conditions | None) -> int | None:
    """The text encoder's limit of tokens that a table of prompts was made with; None: unknown, or no such table."""
    return table.record.max_sequence_length if isinstance(table, PromptTable) else None


def check_classes(lines: list[PromptLine] | None, embedded_guidance: float | None) -> None:
    """Refuse what a class-conditional teacher has no use for."""
    if lines is not None or embedded_guidance is not None:
        raise InputError("trajectories: prompts and embedded_guidance are for text-to-image pipelines of diffusers")
