"""What an evaluation found: rows that print as a table and are stored as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyard.errors import InputError

# What is measured: (heading of the table, what it is).
COLUMNS = {
    "network_passes": ("passes", "network passes a sample; a guided teacher step is two"),
    "frechet_to_data": ("Fréchet data", "Fréchet distance to the real images"),
    "frechet_to_teacher": (
        "Fréchet teacher",
        "Fréchet distance to teacher samples from other noise; its own row is what chance leaves",
    ),
    "label_accuracy": ("accuracy", "share of the samples that the classifier takes for their label"),
    "endpoint_mse": (
        "endpoint MSE",
        "mean squared error to the teacher's samples of the same noise and labels (pixels clipped to -1 ... 1)",
    ),
    "seconds_per_image": (
        "ms/image",
        "milliseconds a sample, the median over batches drawn in turn; noise is drawn beforehand",
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
    """

    name: str
    network_passes: int
    frechet_to_data: float
    frechet_to_teacher: float
    label_accuracy: float | None
    endpoint_mse: float
    seconds_per_image: float


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
        cells = [["", *(short for short, _ in COLUMNS.values())]]
        cells += [[row.name, *(_format(key, getattr(row, key)) for key in COLUMNS)] for row in self.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, len(widths)))]) for line in cells
        ]
        lines.insert(1, "-" * len(lines[0]))
        legend = [f"  {short}: {meaning}" for short, meaning in COLUMNS.values()]
        return "\n".join(
            [*lines, "", f"{self.settings['count']} samples a row, {self.settings['batch_size']} at a time.", *legend]
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_json` turns back."""
        return {"settings": self.settings, "rows": [dataclasses.asdict(row) for row in self.rows]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Evaluation:
        """The evaluation of a `to_json` dictionary."""
        return cls(tuple(Quality(**row) for row in content["rows"]), content["settings"])

    def save(self, path: Path, **more: Any) -> None:
        """Write the evaluation, and `more` beside it, as a JSON file that is complete or absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        meanings = {key: meaning for key, (_, meaning) in COLUMNS.items()}
        partial.write_text(json.dumps({**self.to_json(), "meaning": meanings, **more}, indent=2) + "\n")
        partial.replace(path)


def _format(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "network_passes":
        return str(value)
    if key == "label_accuracy":
        return f"{100 * value:.1f} %"
    if key == "seconds_per_image":
        return f"{1000 * value:.3f}"
    return f"{value:.4f}" if key == "endpoint_mse" else f"{value:.3f}"
