"""Draws docs/images/architecture.svg: the data path and the four seams. Run: python docs/figures/architecture.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = Path(__file__).parents[1] / "images" / "architecture.svg"
INK, GREY, PATH, SEAM = "#1f2933", "#6b7785", "#dbe9f6", "#fdebd0"

# (x, y, width, title, folder): the data path, left to right and down.
STAGES = [
    (0.2, 4.2, 2.3, "teacher", "teachers/"),
    (3.3, 4.2, 2.3, "trajectories", "trajectories/"),
    (6.4, 4.2, 2.3, "training", "training/"),
    (9.5, 4.2, 2.3, "student", "models/"),
    (9.5, 2.55, 2.3, "samples, pictures", "sampling/, pipeline.py"),
    (6.4, 2.55, 2.3, "evaluation", "evaluation/"),
    (3.3, 2.55, 2.3, "ONNX file", "export/"),
    (0.2, 2.55, 2.3, "onnxruntime", "runtime/"),
]
ARROWS = [(0, 1, "ODE"), (1, 2, "batches"), (2, 3, "weights")]
SEAMS = [
    (0.2, "conditions", "a number on disk,\ntensors at the door", "conditions/"),
    (3.3, "backbone", "any transformer\nbelow its head", "models/backbone.py"),
    (6.4, "shape", "[C, …]: pictures,\nvideos, several sizes", "no file: nobody asks"),
    (9.5, "codec", "latents to pictures", "models/codec.py"),
]


def box(axes, x, y, width, height, colour):
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=INK, linewidth=1))


def arrow(axes, begin, end, text="", above=0.12):
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=12, color=INK, linewidth=1.2))
    if text:
        axes.text((begin[0] + end[0]) / 2, begin[1] + above, text, ha="center", va="bottom", fontsize=8, color=GREY)


def main():
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pyard", "font.family": "sans-serif"})
    figure = Figure(figsize=(12, 5.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12), ylim=(0, 5.6))
    axes.axis("off")
    for x, y, width, title, folder in STAGES:
        box(axes, x, y, width, 0.95, PATH)
        axes.text(x + width / 2, y + 0.62, title, ha="center", va="center", fontsize=12, color=INK)
        axes.text(x + width / 2, y + 0.26, folder, ha="center", va="center", fontsize=9, color=GREY, family="monospace")
    for begin, end, text in ARROWS:
        (x, y, width, *_), (to, *_) = STAGES[begin], STAGES[end]
        arrow(axes, (x + width + 0.04, y + 0.48), (to - 0.04, y + 0.48), text)
    arrow(axes, (10.65, 4.16), (10.65, 3.54))
    arrow(axes, (9.46, 3.02), (8.74, 3.02), "compare")
    arrow(axes, (9.46, 4.3), (5.64, 3.4))  # the student is exported
    arrow(axes, (3.26, 3.02), (2.54, 3.02))
    axes.text(0.2, 1.95, "four seams: what the rooms above know of each other", fontsize=10, color=GREY)
    for x, title, meaning, file in SEAMS:
        box(axes, x, 0.2, 2.3, 1.55, SEAM)
        axes.text(x + 1.15, 1.45, title, ha="center", va="center", fontsize=12, color=INK)
        axes.text(x + 1.15, 0.95, meaning, ha="center", va="center", fontsize=9, color=INK)
        axes.text(x + 1.15, 0.42, file, ha="center", va="center", fontsize=9, color=GREY, family="monospace")
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
