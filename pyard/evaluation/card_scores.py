"""What was measured of a student goes into its folder, for its model card."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyard.errors import InputError
from pyard.evaluation.report import COLUMNS, Evaluation
from pyard.models.card import Scores, record_scores
from pyard.models.fingerprint import weights_digest
from pyard.models.student import Student

# A time says more of the machine than of the student.
_LEFT_OUT = ("seconds_per_image",)
# Settings that name files, of which others are told the name alone.
_FILES = ("features", "reference", "clip")


def record_in_folders(evaluation: Evaluation, sources: Sequence[Any], students: Sequence[Any]) -> None:
    """Write the scores of students that were read from folders on this disk into these folders.

    A folder that cannot be written is left as it is.

    Args:
        evaluation: whose last rows are the students'.
        sources: paths, or students that were given as objects, which are skipped.
        students: what was loaded from each source.
    """
    rows = evaluation.rows[len(evaluation.rows) - len(students) :]
    teacher = evaluation.rows[: len(evaluation.rows) - len(students)]
    for source, student, row in zip(sources, students, rows, strict=True):
        if not isinstance(source, str | Path) or not isinstance(student, Student) or not Path(source).is_dir():
            continue
        run = Path(source)
        folder = run / "student" if (run / "student").is_dir() else run
        pair = [*(dataclasses.replace(one, name="teacher") for one in teacher), dataclasses.replace(row, name="student")]
        own = Evaluation(tuple(pair), _settings(evaluation))
        scores: Scores = {
            "weights": weights_digest(student),
            "about": _about(own),
            "table": own.cells(_LEFT_OUT),
            "evaluation": own.to_json(),
        }
        with contextlib.suppress(OSError, InputError):
            record_scores(student, folder, scores)


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    left_out = ("sheet", "samples_npz")
    settings = {key: value for key, value in evaluation.settings.items() if key not in left_out}
    return {key: Path(str(value)).name if key in _FILES else value for key, value in settings.items()}


def _about(evaluation: Evaluation) -> str:
    settings = evaluation.settings
    parts = [f"{settings['count']} samples a row, seed {settings['seed']}"]
    parts += [f"{name.replace('_', ' ')}: {settings[name]}" for name in ("features", "reference", "clip") if name in settings]
    meanings = [f"{short}: {meaning}" for key, (short, meaning) in COLUMNS.items() if short in evaluation.cells(_LEFT_OUT)[0]]
    return "; ".join(parts) + ".\n\n" + "\n".join(f"- {line}" for line in meanings)
