"""Draws docs/images/{trajectory,student,masks}.svg, the figures of docs/method.md. Run: python docs/figures/method.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from architecture import GREY, INK, PATH, SEAM
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from pyard.ops.masks import MASKS, visible

IMAGES = Path(__file__).parents[1] / "images"
S = 4
STUDENT = "#c0504d"


def main() -> None:
    """Draws all of them, the same bytes each time."""
    matplotlib.rcParams["svg.hashsalt"] = "pyard"
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    for name, figure in (("trajectory", trajectory()), ("student", student()), ("masks", masks())):
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight", facecolor="white")


def trajectory() -> Figure:
    """The teacher's walk and the student's jumps along it."""
    figure = Figure(figsize=(8, 3))
    axes = figure.subplots()
    fine = np.linspace(0, 1, 25)
    curve = lambda t: 2 * t - 1 + 0.55 * np.sin(np.pi * t)  # noqa: E731
    axes.plot(
        fine, curve(fine), "o-", color=GREY, markersize=4, linewidth=1.2, label="teacher: 24 steps, 48 passes with guidance"
    )
    coarse = fine[:: 24 // S]
    axes.plot(coarse, curve(coarse), "o", color=STUDENT, markersize=9, label=f"student: {S} jumps, {S} passes")
    for i in range(S):
        for j in range(i + 1):
            begin, end = (coarse[j], curve(coarse[j])), (coarse[i + 1], curve(coarse[i + 1]))
            style: dict[str, Any] = dict(color=STUDENT, linewidth=1.6) if i == j else dict(color=STUDENT, linewidth=0.7, linestyle=(0, (4, 3)))
            bend = -0.25 if i == j else -0.35
            arrow = FancyArrowPatch(
                begin,
                end,
                arrowstyle="-|>",
                mutation_scale=10,
                connectionstyle=f"arc3,rad={bend}",
                shrinkA=5,
                shrinkB=6,
                **style,
            )
            axes.add_patch(arrow)
    axes.annotate("noise", (0, -1), (0.0, -1.55), ha="center", color=INK)
    axes.annotate("picture", (1, 1), (1.0, 1.35), ha="center", color=INK)
    axes.plot([], [], color=STUDENT, linewidth=0.7, linestyle=(0, (4, 3)), label="what a jump also sees: its history")
    axes.set(xlim=(-0.06, 1.08), ylim=(-1.8, 2.0))
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    axes.axis("off")
    return figure


def student() -> Figure:
    """S blocks of tokens through the layers."""
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    names = ["noise", "1st landing", "2nd landing", "3rd landing"]
    for step in range(S):
        x = 2.2 * step
        _box(axes, x, 0, 1.6, 0.55, "white", names[step])
        _box(axes, x, 1.3, 1.6, 0.8, SEAM, "lowest N layers")
        _box(axes, x, 2.6, 1.6, 0.8, PATH, "other layers")
        _box(axes, x, 3.9, 1.6, 0.55, "white", f"prediction {step + 1}")
        for low, high in ((0.55, 1.3), (2.1, 2.6), (3.4, 3.9)):
            _arrow(axes, (x + 0.8, low), (x + 0.8, high))
        for earlier in range(step):
            height = 1.55 + 0.15 * earlier
            axes.add_patch(
                FancyArrowPatch(
                    (2.2 * earlier + 1.6, height), (x, height), arrowstyle="-|>", mutation_scale=9, color=STUDENT, linewidth=1,
                    connectionstyle=f"arc3,rad={0.0 if step - earlier == 1 else 0.18}",
                )
            )  # fmt: skip
    axes.text(8.5, 1.7, "keys and values\nof earlier blocks", color=STUDENT, fontsize=9, va="center")
    axes.text(8.5, 3.0, "each block alone", color=GREY, fontsize=9, va="center")
    axes.text(8.5, 0.27, "each with its own time", color=GREY, fontsize=9, va="center")
    axes.set(xlim=(-0.2, 11), ylim=(-0.2, 4.7))
    axes.axis("off")
    return figure


def masks() -> Figure:
    """Which blocks a block sees, by the function that everything else is compared with."""
    figure = Figure(figsize=(8, 2.3))
    for axes, mask in zip(figure.subplots(1, len(MASKS)), MASKS, strict=True):
        for query in range(S):
            for key in range(S):
                seen = visible(mask, query, key, 2 if mask == "window" else None)
                colour = (PATH if query == key else SEAM) if seen else "white"
                axes.add_patch(Rectangle((key, S - 1 - query), 1, 1, facecolor=colour, edgecolor=INK, linewidth=0.8))
        axes.set(xlim=(-0.1, S + 0.1), ylim=(-0.1, S + 0.1), aspect="equal")
        axes.set_title(mask + (", 2 blocks" if mask == "window" else ""), fontsize=10, color=INK)
        axes.axis("off")
    figure.text(0.5, 0.0, "a row for each block that looks, a column for each that it may see; the noise is first", ha="center",
                fontsize=9, color=GREY)  # fmt: skip
    return figure


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str) -> None:
    style = "round,pad=0.02,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=INK, linewidth=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, color=INK)


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1.1))


if __name__ == "__main__":
    main()
