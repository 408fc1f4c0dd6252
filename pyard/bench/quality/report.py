"""What the quality benchmark found: JSON, tables in the paper's form, figures.

n samples · F features
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyard.bench.machine import processor
from pyard.bench.quality.cell import open_workshop, training_flops, valid_result
from pyard.bench.quality.figures import draw_figures
from pyard.bench.quality.intervals import Interval, degradation_ratio
from pyard.bench.quality.plan import AUTHORS_CODE, MAIN, Budget, Plan, Setting, corner
from pyard.bench.quality.workshop import FEATURES_NAME, Workshop
from pyard.models.folder import load_config
from pyard.models.student_config import StudentConfig
from pyard.storage.arrays import read_npy
from pyard.storage.files import write_text
from pyard.version import __version__

# METHOD of arXiv 2504.11295, ImageNet-256, ADM protocol, 50k samples: passes, FID, precision, recall.
PAPER = (
    ("DiT-XL/2 teacher, DDIM 25", 25, 2.89, 0.797, 0.572),
    ("step distillation, N = 0", 4, 10.25, 0.704, 0.474),
    ("ARD, N = 6", 4, 4.32, 0.770, 0.574),
    ("ARD + adversarial", 4, 1.84, 0.797, 0.615),
)
_MEASURES = {
    "frechet_to_data": "Fréchet, data",
    "frechet_to_teacher": "Fréchet, teacher",
    "endpoint_mse": "endpoint MSE",
    "precision": "precision",
    "recall": "recall",
    "label_accuracy": "accuracy",
}
_HEAD = f"| | seeds | passes | {' | '.join(_MEASURES.values())} | against N = 0 | exposure bias | TFLOP |"
_RULE = "|---" * (6 + len(_MEASURES)) + "|"


def write_report(plan: Plan, out: Path, results: Path, name: str, quick: bool) -> None:
    """Collect what is done in `out`, and write `results/NAME.json`, `NAME.md` and `NAME-*.png`.

    Args:
        plan: whose cells are reported.
        out: folder of the students.
        results: folder of the report; made if there is none.
        name: of the files.
        quick: the run had next to no budget; the tables say so.
    """
    results.mkdir(parents=True, exist_ok=True)
    workshops = {subject: open_workshop(subject, budget, out, quick) for subject, budget in plan.budgets.items()}
    rows, stale = [], 0
    for cell in plan.cells:
        workshop = workshops[cell.subject]
        row = valid_result(workshop, cell)
        if row is not None:
            student = StudentConfig.from_json(load_config(out / cell.name / "run" / "student", kind="Student"))
            settings = {**row["identity"]["settings"], **({"student": ""} if cell.setting.base else {})}
            rows.append({**row, "training_flops": training_flops(workshop, settings, student)})
        stale += row is None and (out / cell.name / "result.json").exists()
    if stale:
        print(f"{stale} results in {out} come from other settings, teachers or features and are left out")
    teachers = {subject: workshop.measure(workshop.teacher_samples()["ends"]) for subject, workshop in workshops.items()}
    ratios = {subject: _ratio(workshop, rows) for subject, workshop in workshops.items()}
    record = {
        "machine": machine(),
        "quick": quick,
        "features": {subject: workshop.subject.features.name for subject, workshop in workshops.items()},
        "teachers": teachers,
        "degradation": {subject: None if ratio is None else ratio.to_json() for subject, ratio in ratios.items()},
        "cells": rows,
    }
    write_text(results / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_text(results / f"{name}.md", _document(plan, record, ratios, rows, quick, name))
    draw_figures(plan, workshops, rows, teachers, results, name)
    print((results / f"{name}.md").read_text(encoding="utf-8"))


def _ratio(workshop: Workshop, rows: Sequence[dict[str, Any]]) -> Interval | None:
    """The degradation ratio in the setting of the authors' code; None: its students are not there."""
    pair = corner(AUTHORS_CODE, "0"), corner(AUTHORS_CODE, "L")
    seeds = sorted(_seeds(rows, workshop.subject.name, pair[0].name) & _seeds(rows, workshop.subject.name, pair[1].name))
    if not seeds:
        return None
    features = workshop.subject.features
    ends = features.features(workshop.teacher_samples()["ends"])
    drawn = [
        [read_npy(workshop.folder / setting.name / f"seed-{seed}" / FEATURES_NAME).astype(np.float64) for setting in pair]
        for seed in seeds
    ]
    return degradation_ratio(workshop.references["data"], ends, drawn)


def _seeds(rows: Sequence[dict[str, Any]], subject: str, setting: str) -> set[int]:
    return {row["seed"] for row in rows if row["subject"] == subject and row["setting"] == setting}


def _document(
    plan: Plan,
    record: dict[str, Any],
    ratios: dict[str, Interval | None],
    rows: Sequence[dict[str, Any]],
    quick: bool,
    name: str,
) -> str:
    lines = [f"`pyard bench quality`: {machine_sentence(record['machine'])}", ""]
    if quick:
        lines += ["A quick run with next to no training: the numbers mean nothing.", ""]
    for subject, budget in plan.budgets.items():
        if not any(row["subject"] == subject for row in rows):
            continue
        lines += [
            f"## {subject}: the main table, S = 4",
            "",
            _what(budget, record["features"][subject]),
            "",
            _HEAD,
            _RULE,
            _teacher_row(record["teachers"][subject]),
            *_table_rows(plan, rows, subject, MAIN),
            "",
        ]
        if (ratio := ratios[subject]) is not None:
            lines += [
                f"Degradation ratio in the setting of the authors' code, N = 0 over N = L: {ratio}; in the paper: 5.1.",
                "",
            ]
        for factor in dict.fromkeys(cell.setting.factor for cell in plan.cells if cell.setting.factor != "main"):
            settings = {c.setting.name: c.setting for c in plan.cells if c.setting.factor == factor and c.subject == subject}
            body = _table_rows(plan, rows, subject, list(settings.values()))
            if body:
                lines += [f"### {subject}: {factor}", "", _HEAD, _RULE, *body, ""]
    lines += [
        "## The paper's numbers, for the form of the table alone",
        "",
        "arXiv 2504.11295, ImageNet 256 x 256, ADM protocol, 50k samples. No number of ours compares with them.",
        "",
        "| | passes | FID | precision | recall |",
        "|---|---|---|---|---|",
        *(f"| {title} | {passes} | {fid} | {precision} | {recall} |" for title, passes, fid, precision, recall in PAPER),
        "",
        *(f"![{kind}]({name}-{kind}.png)" for kind in ("steps", "layers", "exposure", "samples")),
    ]
    return "\n".join(lines) + "\n"


def _what(budget: Budget, features: str) -> str:
    return (
        f"{budget.updates} updates of {budget.batch_size} from {budget.trajectories} trajectories each, {budget.samples} "
        f"samples a row; features: {features}. Mean ± standard deviation over the seeds. Exposure bias: the last step's error "
        "on the student's own history over that on the teacher's. Against N = 0: the change of the endpoint error from the "
        "student without a history, all else and seed equal. TFLOP: of the whole training, with rollouts and discriminators."
    )


def _teacher_row(teacher: dict[str, Any]) -> str:
    cells = [_number(teacher.get(key), key) for key in _MEASURES]
    return f"| teacher, 25 steps | | | {' | '.join(cells)} | | | |"


def _table_rows(plan: Plan, rows: Sequence[dict[str, Any]], subject: str, settings: Sequence[Setting]) -> list[str]:
    """A line for each setting that has results."""
    lines = []
    for setting in settings:
        mine = [row for row in rows if row["subject"] == subject and row["setting"] == setting.name]
        if not mine:
            continue
        cells = [_spread([row.get(key) for row in mine], key) for key in _MEASURES]
        bias = [row["exposure_bias"]["rollout"][-1] / row["exposure_bias"]["teacher_forced"][-1] for row in mine]
        steps = mine[0]["num_steps"]
        against, tflop = _against_no_history(plan, rows, subject, setting), mine[0]["training_flops"] / 1e12
        numbers = f"{' | '.join(cells)} | {against} | {statistics.mean(bias):.2f} | {tflop:.2f}"
        lines.append(f"| {setting.title} | {len(mine)} | {steps} | {numbers} |")
    return lines


def _against_no_history(plan: Plan, rows: Sequence[dict[str, Any]], subject: str, setting: Setting) -> str:
    """The change of the endpoint error from N = 0 in percent, over the seeds that both have; "" if there is no such student."""
    changes = [100 * change for change in history_changes(plan, rows, subject, setting)]
    if not changes:
        return ""
    mean = f"{statistics.mean(changes):+.1f}"
    return f"{mean} %" if len(changes) < 2 else f"{mean} ± {statistics.stdev(changes):.1f} %"


def history_changes(plan: Plan, rows: Sequence[dict[str, Any]], subject: str, setting: Setting) -> list[float]:
    """What a setting's history changes about the endpoint error, relative to the student without one, for every seed of both.

    Students of a seed learn from the same trajectories in the same order, so that their difference varies less than either.
    """
    without = (s for s in (cell.setting for cell in plan.cells) if s.layers == "0")
    plain = next((s.name for s in without if s.but_for_its_history == setting.but_for_its_history), setting.name)
    if plain == setting.name:
        return []
    mine, theirs = (
        {row["seed"]: row["endpoint_mse"] for row in rows if row["subject"] == subject and row["setting"] == name}
        for name in (setting.name, plain)
    )
    return [mine[seed] / theirs[seed] - 1 for seed in sorted(mine) if seed in theirs]


def _spread(values: Sequence[float | None], key: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = _number(statistics.mean(known), key)
    return mean if len(known) < 2 else f"{mean} ± {_number(statistics.stdev(known), key)}"


def _number(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    if key == "endpoint_mse":
        return f"{value:.5f}"
    if key.startswith("frechet") and value < 0.1:  # the mixtures' distances are small numbers in units of their own
        return f"{value:.2g}"
    return f"{value:.3f}"


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {"device": device, "cores": os.cpu_count(), "torch": torch.__version__, "pyard": __version__}


def machine_sentence(machine: dict[str, Any]) -> str:
    """The same as a sentence."""
    return f"{machine['device']}, {machine['cores']} cores; torch {machine['torch']}, pyard {machine['pyard']}."
