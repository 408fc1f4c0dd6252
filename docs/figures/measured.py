"""Draws docs/images/{quality-steps,latency}.svg from benchmarks/results. Run: python docs/figures/measured.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from architecture import GREY, INK
from matplotlib.figure import Figure
from method import IMAGES, STUDENT

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BLUE, LIGHT = "#4472a8", "#b9c6d6"
# Setting in quality-cpu.json: label, colour, line.
SETTINGS = {
    "denoised-direct-N0": ("authors' code, no history", GREY, "--"),
    "denoised-direct-N-all": ("authors' code, history in all layers", GREY, "-"),
    "state-jump-N0": ("jump outputs, no history", STUDENT, "--"),
    "state-jump-N-all": ("jump outputs, history in all layers", STUDENT, "-"),
}
# Way in onnx.json: label, colour.
WAYS = {
    "PyTorch eager, plain": ("PyTorch", LIGHT),
    "torch.compile": ("torch.compile", LIGHT),
    "PyTorch eager, native operators": ("PyTorch, pyard's operators", BLUE),
    "ONNX fp32": ("onnxruntime, fp32", STUDENT),
    "ONNX int8": ("onnxruntime, int8", STUDENT),
}


def main() -> None:
    """Draws both, the same bytes each time."""
    matplotlib.rcParams.update({"svg.hashsalt": "pyard", "font.family": "DejaVu Sans", "axes.edgecolor": GREY})
    for name, figure in (("quality-steps", quality_steps()), ("latency", latency())):
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight", facecolor="white")


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def quality_steps() -> Figure:
    """Students of the digits, by number of steps: error to the teacher, and Fréchet distance to real digits. First seed."""
    found = read("quality-cpu.json")
    figure = Figure(figsize=(10, 3.8))
    left, right = figure.subplots(1, 2)
    for setting, (label, colour, line) in SETTINGS.items():
        cells = sorted(
            (
                cell
                for cell in found["cells"]
                if cell["subject"] == "digits"
                and cell["seed"] == 0
                and cell["setting"] in (setting, *(f"{setting}-S{steps}" for steps in (1, 2, 3, 6)))
            ),
            key=lambda cell: cell["num_steps"],
        )
        steps = [cell["num_steps"] for cell in cells]
        for axes, measure in ((left, "endpoint_mse"), (right, "frechet_to_data")):
            values = [cell[measure] for cell in cells]
            axes.plot(steps, values, line, marker="o", markersize=4, color=colour, linewidth=1.6, label=label)
    right.axhline(found["teachers"]["digits"]["frechet_to_data"], color=INK, linewidth=0.9, linestyle=":")
    right.text(1, 0.97 * found["teachers"]["digits"]["frechet_to_data"], "teacher", va="top", fontsize=8, color=INK)
    left.set_ylabel("squared error to the teacher", color=INK)
    left.set_yscale("log")
    right.set(yscale="log", yticks=[0.5, 1, 2, 5], yticklabels=["0.5", "1", "2", "5"], ylim=(0.45, 7))
    right.minorticks_off()
    right.set_ylabel("Fréchet distance to real digits", color=INK)
    for axes in (left, right):
        plain(axes)
        axes.set_xlabel("steps = network passes", color=INK)
        axes.set_xticks([1, 2, 3, 4, 6])
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def latency() -> Figure:
    """Seconds for one image of a 4-step student on two cores, batch 1."""
    found = read("onnx.json")
    figure = Figure(figsize=(10, 2.6))
    for axes, (model, results) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        rows = {row["way"]: row["seconds_per_image"] for row in results["rows"] if row["batch_size"] == 1}
        for place, (way, (label, colour)) in enumerate(WAYS.items()):
            axes.barh(-place, rows[way], color=colour, height=0.7)
            axes.text(rows[way], -place, f" {rows[way]:.2f} s", va="center", fontsize=8, color=INK)
            axes.text(0, -place, f"{label}  ", va="center", ha="right", fontsize=9, color=INK)
        axes.set_title(f"{model}, 4 steps, 256 tokens, batch 1", fontsize=10, color=INK, loc="left")
        axes.set(yticks=[], xlim=(0, 1.18 * max(rows.values())))
        axes.set_xlabel("seconds an image", color=INK, fontsize=9)
        plain(axes)
    figure.tight_layout(w_pad=3)
    return figure


def plain(axes: Any) -> None:
    """Without a box, labels in grey."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=8)


if __name__ == "__main__":
    main()
