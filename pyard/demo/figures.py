"""The demo's pictures: samples side by side, and how the losses fell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyard.storage.files import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, INK, QUIET = "#f6f4ee", "#1d1f27", "#6b6f7b"
STUDENT_COLOURS = ("#c8553d", "#2a6f97", "#5b8c5a")
JUDGE, FORGER = "#7b4b94", "#d98e04"
PIXEL = 10  # of the picture, to each pixel of a sample: whole, so that edges stay sharp
GAP = 8
DPI = 100


@dataclass(frozen=True)
class PicturedRow:
    """A row of the samples' picture.

    Args:
        title: what drew it.
        facts: what it costs and how good it is.
        samples: float32 [n, 1, H, W], -1 paper to 1 ink.
    """

    title: str
    facts: str
    samples: np.ndarray


def draw_samples(rows: list[PicturedRow], labels: np.ndarray, path: Path) -> None:
    """Write a picture with a row for each sampler and a column for each noise and label.

    Args:
        rows: from top to bottom, all with n samples.
        labels: int [n], ascending; equal ones share a heading.
        path: the PNG.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    count = len(labels)
    height, width = (size * PIXEL for size in rows[0].samples.shape[2:])
    left, top, margin = 330, 46, 16
    canvas_width = left + count * (width + GAP) - GAP + margin
    canvas_height = top + len(rows) * (height + GAP) - GAP + margin
    figure = Figure(figsize=(canvas_width / DPI, canvas_height / DPI), dpi=DPI, facecolor="white")
    ink = LinearSegmentedColormap.from_list("ink", [PAPER, INK])
    for i, row in enumerate(rows):
        y = top + i * (height + GAP)
        for j, picture in enumerate(row.samples[:, 0]):
            shades = ink(np.clip((picture + 1) / 2, 0, 1), bytes=True).repeat(PIXEL, axis=0).repeat(PIXEL, axis=1)
            # figimage counts from the lower left corner and copies pixels as they are.
            figure.figimage(shades, left + j * (width + GAP), canvas_height - y - height, origin="upper")
        _text(figure, left - 18, y + height / 2 - 3, row.title, va="bottom", size=13, color=INK, weight="bold")
        _text(figure, left - 18, y + height / 2 + 5, row.facts, va="top", size=10.5, color=QUIET)
    for label in np.unique(labels):
        columns = np.flatnonzero(labels == label)
        middle = left + (columns[0] + columns[-1] + 1) / 2 * (width + GAP) - GAP / 2
        _text(figure, middle, top - 10, str(label), ha="center", va="bottom", size=14, color=INK, weight="bold")
    _save(figure, path)


def draw_training(logs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write a picture of the losses of some runs; runs with discriminators get a panel of their own.

    Args:
        logs: for each run the lines of its `log.jsonl`, with `step`, `loss` and `loss_per_step`.
        path: the PNG.
    """
    from matplotlib.figure import Figure

    judged = {name: log for name, log in logs.items() if "discriminator" in log[-1]}
    plain = {name: log for name, log in logs.items() if name not in judged}
    panels = 2 + bool(judged)
    figure = Figure(figsize=(5.5 * panels, 4.4), dpi=130, layout="constrained", facecolor="white")
    whole, parts, *others = figure.subplots(1, panels)
    parts.sharey(whole)
    for (name, log), colour in zip(plain.items(), STUDENT_COLOURS, strict=False):
        steps = np.array([line["step"] for line in log])
        losses = np.array([line["loss"] for line in log])
        per_step = np.array([line["loss_per_step"] for line in log], float)  # [lines, S]
        whole.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        whole.plot(steps, smooth(losses), color=colour, linewidth=2, label=name)
        num_steps = per_step.shape[1]
        for s in range(num_steps):
            parts.plot(steps, smooth(per_step[:, s]), color=colour, alpha=_shade(s, num_steps), linewidth=1.6)
    # Grey stands for any student: light to dark, first jump to last.
    for s in range(num_steps):
        parts.plot([], [], color=INK, alpha=_shade(s, num_steps), linewidth=1.6, label=f"jump {s + 1}")
    _panel(whole, "Mean over the jumps (running median, and as logged)", "teacher-forced mean squared error")
    _panel(parts, "Each jump on its own", "")
    for axes in (whole, parts):
        axes.set_yscale("log")
    if judged:
        _draw_judged(others[0], judged)
    _save(figure, path)


def _draw_judged(axes: Axes, logs: dict[str, list[dict[str, Any]]]) -> None:
    """Hinge loss of the discriminators and the loss of the student that they judge."""
    for name, log in logs.items():
        steps = np.array([line["step"] for line in log])
        for key, colour, what in (("discriminator", JUDGE, "discriminators"), ("generator", FORGER, "student")):
            values = np.array([line[key] for line in log])
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values), color=colour, linewidth=2, label=f"{name}: {what}")
    axes.axhline(2, color=QUIET, linewidth=0.8, linestyle="--")
    axes.annotate("cannot tell", (steps[-1], 2), (0, 3), textcoords="offset points", ha="right", color=QUIET, fontsize=9)
    _panel(axes, "Discriminators against student", "hinge loss, and minus the mean logit")


def _panel(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_ylabel(quantity)
    axes.set_xlabel("updates")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def smooth(values: np.ndarray, window: int = 15) -> np.ndarray:
    """The running median, which a single odd batch does not move; shorter at both ends: float [n] to [n]."""
    half = window // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _shade(step: int, num_steps: int) -> float:
    return 0.3 + 0.7 * step / max(1, num_steps - 1)


def _text(figure: Figure, x: float, y: float, text: str, ha: str = "right", **style: Any) -> None:
    """Text at a place counted in pixels from the upper left corner."""
    width, height = figure.get_size_inches() * figure.dpi
    figure.text(x / width, 1 - y / height, text, ha=ha, **style)


def _save(figure: Figure, path: Path) -> None:
    with new_file(path) as partial:
        figure.savefig(partial, format="png", facecolor=figure.get_facecolor())
