"""What an evaluation found: rows that print as a table and are stored as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyard.errors import InputError
from pyard.storage.files import write_text

if TYPE_CHECKING:
    from pyard.sampling.exposure_bias import ExposureBias

# What is measured: (heading of the table, what it is). Columns that no row has are left out.
COLUMNS = {
    "network_passes": ("passes", "network passes a sample; a guided teacher step is two"),
    "frechet_to_data": ("Fréchet data", "Fréchet distance to the real images (FID if the features are Inception's)"),
    "frechet_to_data_infinity": ("F∞ data", "the same, extrapolated to infinitely many samples"),
    "spatial_frechet_to_data": ("spatial", "Fréchet distance to the real images in spatial features (sFID)"),
    "inception_score": ("IS", "Inception Score"),
    "precision": ("precision", "share of the samples inside the real images' 3-nearest-neighbour manifold"),
    "recall": ("recall", "share of the real images inside the samples' manifold"),
    "frechet_to_teacher": (
        "Fréchet teacher",
        "Fréchet distance to teacher samples from other noise; its own row shows what is due to chance",
    ),
    "frechet_to_teacher_infinity": ("F∞ teacher", "the same, extrapolated to infinitely many samples of both"),
    "label_accuracy": ("accuracy", "share of the samples that the classifier assigns to their label"),
    "endpoint_mse": (
        "endpoint MSE",
        "mean squared error to the teacher's samples of the same noise and labels (pixels clipped to -1 ... 1; or latents)",
    ),
    "clip_score": ("CLIP score", "100 max(cos, 0) of CLIP's embeddings of picture and prompt, on average"),
    "seconds_per_image": (
        "ms/image",
        "seconds a sample, the median over batches drawn in turn; noise is drawn beforehand, latents are not decoded",
    ),
}


@dataclass(frozen=True)
class Quality:
    """One row: how good and how fast one way of drawing samples is; None where it was not measured.

    Args:
        name: of the row.
        network_passes: network passes a sample.
        frechet_to_data: Fréchet distance to the real images.
        frechet_to_teacher: Fréchet distance to samples of the teacher from other noise.
        label_accuracy: 0 to 1.
        endpoint_mse: mean squared error to the teacher's endpoints for the same noise and labels.
        seconds_per_image: median over batches of the seconds a batch takes, over its size.
        precision: 0 to 1, of real images' neighbourhoods (k = 3).
        recall: 0 to 1.
        frechet_to_data_infinity: `frechet_to_data` extrapolated to infinitely many samples.
        frechet_to_teacher_infinity: `frechet_to_teacher` extrapolated to infinitely many samples of both.
        spatial_frechet_to_data: Fréchet distance to the real images in spatial features.
        inception_score: 1 to the number of classes.
        exposure_bias: errors to the teacher at each step, on its history and on the student's own.
        clip_score: 0 to 100, mean over the samples of 100 max(cos, 0) of CLIP's embeddings of picture and prompt.
    """

    name: str
    network_passes: int
    frechet_to_data: float | None
    frechet_to_teacher: float | None
    label_accuracy: float | None
    endpoint_mse: float | None
    seconds_per_image: float
    precision: float | None = None
    recall: float | None = None
    frechet_to_data_infinity: float | None = None
    frechet_to_teacher_infinity: float | None = None
    spatial_frechet_to_data: float | None = None
    inception_score: float | None = None
    exposure_bias: ExposureBias | None = None
    clip_score: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: its rows, and all that they depend on.

    Args:
        rows: teacher first.
        settings: count, seeds, teacher steps, feature network and whatever else two evaluations must share to compare.
    """

    rows: tuple[Quality, ...]
    settings: dict[str, Any]

    def row(self, name: str) -> Quality:
        """The row of this name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise InputError(f"evaluation: no row {name!r}; there are {', '.join(row.name for row in self.rows)}")

    def table(self) -> str:
        """The rows as text, one column each measure, and a line on what each column is."""
        columns, cells = self._columns(), self.cells()
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, len(widths)))]) for line in cells
        ]
        lines.insert(1, "-" * len(lines[0]))
        # The file has seconds; the table's columns of times show milliseconds.
        legend = [f"  {short}: {'milli' * short.startswith('ms/')}{meaning}" for short, meaning in columns.values()]
        return "\n".join(
            [
                *lines,
                *self._exposure_lines(),
                "",
                f"{self.settings['count']} samples a row, {self.settings['batch_size']} at a time.",
                *legend,
            ]
        )

    def cells(self, without: Sequence[str] = ()) -> list[list[str]]:
        """The table's cells by rows, the first of them headings; `without` names measures to leave out."""
        columns = {key: text for key, text in self._columns().items() if key not in without}
        head = ["", *(short for short, _ in columns.values())]
        return [head, *([row.name, *(_format(key, getattr(row, key)) for key in columns)] for row in self.rows)]

    def _columns(self) -> dict[str, tuple[str, str]]:
        return {key: text for key, text in COLUMNS.items() if any(getattr(row, key) is not None for row in self.rows)}

    def _exposure_lines(self) -> list[str]:
        biases = {row.name: row.exposure_bias for row in self.rows if row.exposure_bias is not None}
        if not biases:
            return []
        title = "Exposure bias: MSE to the teacher at each step, on the teacher's history → on its own"
        pairs = {n: zip(b.teacher_forced, b.rollout, strict=True) for n, b in biases.items()}
        return ["", title, *(f"  {n}: " + "  ".join(f"{f:.3g} → {r:.3g}" for f, r in both) for n, both in pairs.items())]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_json` turns back."""
        return {"settings": self.settings, "rows": [dataclasses.asdict(row) for row in self.rows]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Evaluation:
        """The evaluation of a `to_json` dictionary."""
        return cls(tuple(_quality(row) for row in content["rows"]), content["settings"])

    def save(self, path: Path, **more: Any) -> None:
        """Write the evaluation, and `more` beside it, as a JSON file that is complete or absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        meanings = {key: meaning for key, (_, meaning) in COLUMNS.items()}
        write_text(path, json.dumps({**self.to_json(), "meaning": meanings, **more}, indent=2) + "\n")


def _quality(row: dict[str, Any]) -> Quality:
    from pyard.sampling.exposure_bias import ExposureBias

    curves = row.get("exposure_bias")
    bias = None if curves is None else ExposureBias(**{key: tuple(values) for key, values in curves.items()})
    return Quality(**{**row, "exposure_bias": bias})


def _format(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "network_passes":
        return str(value)
    if key in ("label_accuracy", "precision", "recall"):
        return f"{100 * value:.1f} %"
    if key == "seconds_per_image":
        return f"{1000 * value:.3f}"
    return f"{value:.4f}" if key == "endpoint_mse" else f"{value:.3f}"
