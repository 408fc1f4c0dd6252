"""The figures of the quality benchmark: distance against S and N, exposure bias, samples side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyard.bench.quality.cell import Workshop, draw
from pyard.bench.quality.plan import AUTHORS_CODE, ENDS, FAMILIES, PAPERS_TEXT, STRONG, Plan, adversarial, corner
from pyard.data.pictures import tiles
from pyard.models.student import Student

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
_COLOURS = {"denoised-direct": "#c8553d", "state-direct": "#8f7a1f", "state-jump": "#2a6f97"}
_ALL = (AUTHORS_CODE, PAPERS_TEXT, STRONG)
_INK, _QUIET = "#1d1f27", "#6b6f7b"
_PICTURED = 20


def draw_figures(
    plan: Plan, workshops: Mapping[str, Workshop], rows: Sequence[Row], teachers: Mapping[str, Row], results: Path, name: str
) -> None:
    """Write `NAME-steps.png`, `NAME-layers.png`, `NAME-exposure.png` and `NAME-samples.png` of the first subject."""
    subject = next(iter(plan.budgets))
    mine = [row for row in rows if row["subject"] == subject]
    _against_steps(mine, teachers[subject], subject).savefig(results / f"{name}-steps.png")
    _against_layers(mine, teachers[subject], subject).savefig(results / f"{name}-layers.png")
    _exposure(mine, subject).savefig(results / f"{name}-exposure.png")
    _samples(workshops[subject], mine).savefig(results / f"{name}-samples.png")


def _axes(columns: int, title: str) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * columns, 4.2), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#e4e4e0", linewidth=0.8)
        each.tick_params(colors=_QUIET)
    figure.suptitle(title, color=_INK, weight="bold", x=0.01, ha="left")
    return figure, axes


def _logarithmic(axis: Axes) -> None:
    axis.set_yscale("log")
    for side in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        side(lambda value, _: f"{value:.1g}" if f"{value:e}"[0] in "1235" else "")


def _mean(rows: Sequence[Row], key: str, **wanted: Any) -> float | None:
    found = [row[key] for row in rows if all(row[name] == value for name, value in wanted.items())]
    return statistics.mean(found) if found else None


def _against_steps(rows: Sequence[Row], teacher: Row, subject: str) -> Figure:
    figure, axes = _axes(2, f"{subject}: quality against the number of steps, equal budgets")
    for family in _ALL:
        for layers, style in zip(ENDS, ("--", "-"), strict=True):
            start = corner(family, layers)
            names = {4: start.name} | {steps: f"{start.name}-S{steps}" for steps in (1, 2, 3, 6)}
            for axis, key in zip(axes, ("frechet_to_data", "endpoint_mse"), strict=True):
                points = {steps: _mean(rows, key, setting=name) for steps, name in names.items()}
                known = sorted((steps, value) for steps, value in points.items() if value is not None)
                prefix = start.name.rsplit("-N", 1)[0]
                label = f"{FAMILIES[prefix]}, N = {layers}"
                axis.plot(*zip(*known, strict=True), style, color=_COLOURS[prefix], marker="o", label=label) if known else None
    axes[0].axhline(teacher["frechet_to_data"], color=_QUIET, linewidth=1, label="teacher, 25 steps")
    _finish(axes, "steps of the student, S")
    return figure


def _against_layers(rows: Sequence[Row], teacher: Row, subject: str) -> Figure:
    figure, axes = _axes(2, f"{subject}: quality against the layers with a history, S = 4")
    for family in _ALL:
        settings = [corner(family, layers) for layers in ("0", "L/4", "L/2", "L")]
        prefix = settings[0].name.rsplit("-N", 1)[0]
        for axis, key in zip(axes, ("frechet_to_data", "endpoint_mse"), strict=True):
            found = [[row for row in rows if row["setting"] == setting.name] for setting in settings]
            known = [(each[0]["history_layers"], [row[key] for row in each]) for each in found if each]
            if not known:
                continue
            axis.plot(
                [n for n, _ in known], [statistics.mean(v) for _, v in known], color=_COLOURS[prefix], label=FAMILIES[prefix]
            )
            for n, values in known:
                axis.plot([n] * len(values), values, "o", color=_COLOURS[prefix], alpha=0.6)
    axes[0].axhline(teacher["frechet_to_data"], color=_QUIET, linewidth=1, label="teacher, 25 steps")
    _finish(axes, "layers with a history, N (dots: seeds)")
    return figure


def _finish(axes: Sequence[Axes], horizontal: str) -> None:
    from matplotlib.ticker import MaxNLocator

    titles = ("Fréchet distance to the data", "mean squared error to the teacher's endpoints")
    for axis, title in zip(axes, titles, strict=True):
        _logarithmic(axis)
        axis.set_xlabel(horizontal, color=_QUIET)
        axis.set_title(title, color=_INK, fontsize=10, loc="left")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(frameon=False, fontsize=8)


def _exposure(rows: Sequence[Row], subject: str) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(3, f"{subject}: exposure bias, S = 4: the error on the teacher's history and on the student's own")
    for axis, family in zip(axes, _ALL, strict=True):
        for layers, colour in (("0", "#c8553d"), ("L/4", "#8a8d91"), ("L", "#2a6f97")):
            found = [row["exposure_bias"] for row in rows if row["setting"] == corner(family, layers).name]  # type: ignore[arg-type]
            if not found:
                continue
            for kind, style in (("teacher_forced", "--"), ("rollout", "-")):
                mean = np.mean([each[kind] for each in found], axis=0)
                label = f"N = {layers}, {'rollout' if kind == 'rollout' else 'teacher forced'}"
                axis.plot(range(1, len(mean) + 1), mean, style, color=colour, marker="o", label=label)
        _logarithmic(axis)
        axis.set_xlabel("step", color=_QUIET)
        axis.set_title(FAMILIES[f"{family['target']}-{family['output']}"], color=_INK, fontsize=10, loc="left")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("mean squared error to the teacher", color=_QUIET)
    return figure


def _samples(workshop: Workshop, rows: Sequence[Row]) -> Figure:
    """Teacher, students of the authors' code, of the paper's text and of the strong setting, from the same noise and labels."""
    from matplotlib.figure import Figure

    ard = corner(AUTHORS_CODE, "L")
    wanted = {
        "Authors' code, N = 0, 4 steps": corner(AUTHORS_CODE, "0"),
        "Authors' code, N = L, 4 steps": ard,
        "… + adversarial, 4 steps": adversarial(ard),
        "Paper's text, N = 0, 4 steps": corner(PAPERS_TEXT, "0"),
        "Paper's text, N = L, 4 steps": corner(PAPERS_TEXT, "L"),
        "State targets, jump, N = 0, 4 steps": corner(STRONG, "0"),
        "State targets, jump, N = L, 4 steps": corner(STRONG, "L"),
    }
    pictured = {"Teacher, 25 steps": workshop.teacher_samples()["ends"][:_PICTURED]}
    for title, setting in wanted.items():
        folder = workshop.folder / setting.name / "seed-0" / "run"
        if any(row["setting"] == setting.name and row["seed"] == 0 for row in rows):
            pictured[title] = draw(workshop, Student.from_pretrained(folder), _PICTURED)
    figure = Figure(figsize=(11, 0.5 * len(pictured)), dpi=130, layout="constrained", facecolor="white")
    axes = figure.subplots(len(pictured), 1, squeeze=False)[:, 0]
    for axis, (title, samples) in zip(axes, pictured.items(), strict=True):
        axis.imshow(tiles(samples, columns=_PICTURED, pixel=4), interpolation="nearest")
        axis.set_axis_off()
        axis.text(-0.01, 0.5, title, transform=axis.transAxes, ha="right", va="center", fontsize=8, color=_INK)
    return figure
