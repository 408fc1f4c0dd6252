"""What an evaluation by prompts needs beside the measurements: the teacher and its prompts, CLIP scores, and a sheet."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyard.conditions import PromptLine, PromptTable, read_prompts
from pyard.diffusion.scheduler_times import Visits
from pyard.errors import InputError
from pyard.evaluation.clip_score import ClipFolder, require_clip_folder
from pyard.evaluation.report import Evaluation
from pyard.evaluation.sheet import save_sheet
from pyard.models.student import Student
from pyard.runtime import OnnxStudent
from pyard.storage.reading import as_object, read_yaml
from pyard.teachers import load_teacher
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.teachers.text_to_image.teacher import PipelineTeacher
from pyard.training.sharded import precision_of_run

_SHEET_PROMPTS = 8
# Of a run folder: what its trajectories are, and its settings.
_RECORD, _SETTINGS = "train.json", "settings.yaml"


@dataclass
class ByPrompts:
    """An evaluation by prompts, while it runs.

    Args:
        lines: the prompts; sample i has line i modulo their number.
        students: text-to-image ones, on their device.
        out: the JSON file of the results; the sheet and the folder of embeddings lie beside it. None: no sheet.
        clip: that pictures and prompts are compared in; None: no CLIP scores.
    """

    lines: Sequence[PromptLine]
    students: Sequence[Student]
    out: Path | None
    clip: ClipFolder | None
    _scores: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _shown: dict[str, list[np.ndarray]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        prompts: Path | Sequence[str] | None,
        students: Sequence[tuple[str, Student | OnnxStudent]],
        clip: Path | None,
        out: Path | None,
        device: str,
    ) -> ByPrompts | None:
        """Check everything before any work; None: the students are not of a text-to-image pipeline.

        Raises:
            InputError: prompts for students of classes, or none for those of texts; prompts or a CLIP folder that cannot be
                read.
        """
        by_text = [isinstance(student, Student) and student.config.text is not None for _, student in students]
        named = ", ".join(name for (name, _), text in zip(students, by_text, strict=True) if text == (prompts is None))
        if prompts is None:
            if any(by_text):
                raise InputError(f"evaluate: {named} draws from prompts: give --prompts, a file of them")
            if clip is not None:
                raise InputError("evaluate: clip compares pictures with prompts; give prompts as well, or leave it out")
            return None
        if named:
            raise InputError(
                f"evaluate: prompts are for PyTorch students of a text-to-image pipeline, which {named} is not; leave it out"
            )
        if len({name for name, _ in students}) < len(students):
            raise InputError("evaluate: two students have the same name, so their rows would too; give each student once")
        lines = read_prompts(prompts if isinstance(prompts, Path) else list(prompts))
        if clip is not None:
            require_clip_folder(clip)
        texts = [student for _, student in students if isinstance(student, Student)]
        return cls(lines, texts, out, None if clip is None else ClipFolder(clip, device))

    def teacher(self, given: str | Path | NetworkTeacher, source: Any, device: str) -> PipelineTeacher:
        """The teacher: one that is given, or the pipeline that the first student says, read as its run read it.

        Args:
            given: `digits`, the default of `evaluate`, is nobody's teacher here.
            source: of the first student: its run folder, if it is one.
            device: of a teacher that is read.
        """
        text = self.students[0].config.text
        assert text is not None
        if isinstance(given, str | Path):
            folder = Path(text.folder) if str(given) == "digits" else Path(given)
            if not folder.is_dir():
                raise InputError(f"evaluate: the teacher's pipeline {folder} does not exist; restore it, or give --teacher")
            given = load_teacher(
                folder, max_sequence_length=text.max_sequence_length, **_how_read(source, self.students[0])
            ).to(device)
        if not isinstance(given, PipelineTeacher):
            raise InputError("evaluate: prompts need a teacher that is a text-to-image pipeline of diffusers")
        return given

    def with_prompts(self, teacher: NetworkTeacher, folder: Path, progress: bool) -> PipelineTeacher:
        """The teacher with its prompts encoded in a folder: what is there already is not encoded again.

        Raises:
            InputError: students that are told different constants, or a folder with other prompts.
        """
        assert isinstance(teacher, PipelineTeacher)
        texts = [student.config.text for student in self.students]
        constants = [text.constants for text in texts if text is not None]
        if any(one != constants[0] for one in constants):
            raise InputError(
                f"evaluate: the students were trained with different constants, {constants}; evaluate them separately"
            )
        table = PromptTable.build(
            teacher.text_encoder,
            self.lines,
            folder,
            constants=constants[0],
            default_negative=teacher.family.negative_prompt,
            progress=progress,
        )
        return teacher.with_prompts(table)

    def asked_by(self, teacher: NetworkTeacher) -> list[Student]:
        """The students with the teacher's prompts as their conditions; their weights are shared."""
        asked = [copy.copy(student) for student in self.students]
        for student in asked:
            student.conditions = teacher.conditions
        return asked

    def visits(self, teacher: NetworkTeacher, sample_shape: tuple[int, ...]) -> Visits:
        """The times that the teacher visited for the students' trajectories of samples of this shape.

        Raises:
            InputError: students whose teachers visited different times.
        """
        found = [student.config.grid_of(sample_shape).visits(teacher.schedule) for student in self.students]
        if any(visits != found[0] for visits in found):
            raise InputError(
                "evaluate: the students were trained on trajectories with different times; evaluate them separately"
            )
        return found[0]

    def take(self, name: str, images: np.ndarray) -> None:
        """A batch of a row's pictures, [n, C, H, W], uint8 or float from -1 to 1, in the order of the samples."""
        kept = self._shown.setdefault(name, [])
        kept += [image.copy() for image in images[: min(_SHEET_PROMPTS, len(self.lines)) - len(kept)]]
        if self.clip is None:
            return
        scores = self._scores.setdefault(name, [])
        first = sum(map(len, scores))
        texts = [self.lines[i % len(self.lines)].prompt for i in range(first, first + len(images))]
        scores.append(self.clip.scores(self.clip.features(images), texts))

    def finish(self, evaluation: Evaluation, teacher: NetworkTeacher) -> Evaluation:
        """The evaluation with CLIP scores and what they depend on; writes the sheet."""
        means = {name: float(np.concatenate(scores).mean()) for name, scores in self._scores.items()}
        rows = tuple(dataclasses.replace(row, clip_score=means.get(row.name)) for row in evaluation.rows)
        settings = {**evaluation.settings, "prompts": len(self.lines), "prompts_fingerprint": teacher.conditions.fingerprint}
        if self.clip is not None:
            settings |= {"clip": self.clip.name, "clip_fingerprint": self.clip.fingerprint}
        if self.out is not None:
            sheet = self.out.with_suffix(".png")
            save_sheet(sheet, [line.prompt for line in self.lines[:_SHEET_PROMPTS]], self._shown)
            settings["sheet"] = str(sheet)
        return dataclasses.replace(evaluation, rows=rows, settings=settings)


def _how_read(source: Any, student: Student) -> dict[str, Any]:
    """Arguments of `load_teacher` with which a student's run read its teacher, as far as run or student say."""
    run = Path(source) if isinstance(source, str | Path) else None
    if run is None or not all((run / name).is_file() for name in (_RECORD, _SETTINGS)):
        text, base = student.config.text, student.config.base
        told = {} if text is None else dict(text.read_with)
        if base is not None:
            told |= {name: getattr(base, name) for name in ("dtype", "variant", "transformer", "lora")}
        return {name: value for name, value in told.items() if value is not None}
    settings = as_object(read_yaml(run / _SETTINGS), run / _SETTINGS, "the settings of a run")
    given = {name: settings.get(name) for name in ("variant", "transformer", "lora")}
    return {"dtype": precision_of_run(run / _RECORD), **{name: value for name, value in given.items() if value is not None}}
