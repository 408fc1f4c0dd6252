"""What the quality benchmark found on captioned scenes: JSON, tables, and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyard.bench.quality.cell import open_workshop, valid_result
from pyard.bench.quality.intervals import Interval, paired_difference
from pyard.bench.quality.plan import AUTHORS_CODE, MAIN, PAPERS_TEXT, STRONG, TEXT, Cell, Plan, Setting, corner
from pyard.bench.quality.report import machine, machine_sentence
from pyard.bench.quality.text_workshop import FOLLOWED_NAME, PICTURED, PICTURES_NAME, REFERENCES, TextWorkshop
from pyard.data.captioned_scenes import CATEGORIES, SPLITS, Proportion
from pyard.evaluation.prompt_pictures import draw_prompts
from pyard.storage.files import write_text

Row = dict[str, Any]
START = corner(STRONG, "L/4")  # what one thing at a time is changed of
_PICTURED = {
    "authors' code, N = 0": corner(AUTHORS_CODE, "0"),
    "authors' code, N = L": corner(AUTHORS_CODE, "L"),
    "paper's text, N = 0": corner(PAPERS_TEXT, "0"),
    "paper's text, N = L": corner(PAPERS_TEXT, "L"),
    "state, jump, N = 0": corner(STRONG, "0"),
    "state, jump, N = L/4": corner(STRONG, "L/4"),
    "state, jump, N = L": corner(STRONG, "L"),
}


def write_text_report(plan: Plan, out: Path, results: Path, name: str, quick: bool) -> None:
    """Collect what is done in `out`, and write `results/NAME.json`, `NAME.md` and `NAME.png`.

    Args:
        plan: whose cells are reported, all of captioned scenes.
        out: folder of the students.
        results: folder of the report; made if there is none.
        name: of the files.
        quick: the run had next to no budget; the tables say so.
    """
    results.mkdir(parents=True, exist_ok=True)
    workshop = open_workshop(TEXT, plan.budgets[TEXT], out, quick)
    assert isinstance(workshop, TextWorkshop)
    references = {
        key: {
            "title": reference.title,
            "passes": reference.passes,
            **workshop.measure(workshop.reference(key), workshop.folder / "references" / key),
        }
        for key, reference in REFERENCES.items()
    }
    rows, stale = [], 0
    for cell in plan.cells:
        row = valid_result(workshop, cell)
        if row is not None:
            rows.append(row)
        stale += row is None and (workshop.folder_of(cell) / "result.json").exists()
    if stale:
        print(f"{stale} results in {workshop.folder} come from other settings, teachers or features and are left out")
    against = {setting.name: found for setting in _settings(plan) if (found := _difference(workshop, rows, setting))}
    record = {
        "machine": machine(),
        "quick": quick,
        "budget": {key: getattr(workshop.budget, key) for key in ("trajectories", "updates", "batch_size", "learning_rate")},
        "prompts": {split: workshop.prompts.splits.count(split) for split in SPLITS},
        "guidance": workshop.subject.cfg_scale,
        "features": {"name": workshop.subject.features.name, "fingerprint": workshop.subject.features.fingerprint},
        "references": references,
        "against": {key: {"other": other.name, **found.to_json()} for key, (other, found) in against.items()},
        "cells": rows,
    }
    write_text(results / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_text(results / f"{name}.md", _document(plan, record, against, name))
    _draw(workshop, record, results / f"{name}.png")
    print((results / f"{name}.md").read_text(encoding="utf-8"))
    print(f"Picture: {results / f'{name}.png'}. All numbers: {results / f'{name}.json'}.")


def _settings(plan: Plan) -> list[Setting]:
    return list({cell.setting.name: cell.setting for cell in plan.cells}.values())


def other_of(setting: Setting) -> Setting | None:
    """The setting that a setting is compared with: the same without a history in the main table, else the one it varies."""
    if setting.factor != "main":
        return START
    return None if setting.layers == "0" else corner(setting.train, "0")


def _difference(workshop: TextWorkshop, rows: Sequence[Row], setting: Setting) -> tuple[Setting, Interval] | None:
    """What a setting changes about the share of prompts followed, of combinations that training showed."""
    other = other_of(setting)
    if other is None:
        return None
    seeds = sorted(_seeds(rows, setting) & _seeds(rows, other))
    if not seeds:
        return None
    seen = np.array(workshop.prompts.splits) == "train"
    mine, theirs = (
        [np.load(workshop.folder_of(Cell(TEXT, each, seed)) / FOLLOWED_NAME)[seen] for seed in seeds]
        for each in (setting, other)
    )
    return other, paired_difference(mine, theirs)


def _seeds(rows: Sequence[Row], setting: Setting) -> set[int]:
    return {row["seed"] for row in rows if row["setting"] == setting.name}


def _document(plan: Plan, record: Row, against: dict[str, tuple[Setting, Interval]], name: str) -> str:
    lines = [f"`pyard bench quality --subjects '[{TEXT}]'`: {machine_sentence(record['machine'])}", ""]
    if record["quick"]:
        lines += ["A quick run with next to no training: the numbers mean nothing.", ""]
    budget, prompts = record["budget"], record["prompts"]
    what = (
        f"{budget['updates']} updates of {budget['batch_size']} from {budget['trajectories']} trajectories each, guidance "
        f"{record['guidance']:g}; {sum(prompts.values())} prompts a row, {prompts['train']} of combinations that training "
        f"showed and {prompts['unseen pair']} of each kind that it never did. Shares in percent, mean over the seeds, with "
        "Wilson's 95 % interval for the prompts of one seed: all seeds draw the same prompts. ±: standard deviation over the "
        "seeds. Change: of the share followed, in percentage points, for the same seeds and prompts, with a bootstrap's 95 % "
        f"interval. Fréchet distance in the features of the {record['features']['name']}; error: root mean square to the "
        "teacher's pictures from the same noise. TFLOP: of the whole training."
    )
    lines += [what, ""]
    main = [setting for setting in MAIN if any(row["setting"] == setting.name for row in record["cells"])]
    others = [each for each in _settings(plan) if each.factor != "main" and _rows(record, each)]
    tables = {"the main table, S = 4": (main, True), f"one thing at a time from {START.title}": (others, False)}
    for title, (settings, with_teacher) in tables.items():
        if not settings:
            continue
        change = "change from N = 0" if with_teacher else f"change from {START.title}"
        lines += [f"## {title}", "", *_overall(record, settings, against, change, with_teacher), ""]
        lines += ["By category, of combinations that training showed:", "", *_categories(record, settings, with_teacher), ""]
    return "\n".join([*lines, f"![Prompts down, samplers across]({name}.png)"]) + "\n"


def _rows(record: Row, setting: Setting) -> list[Row]:
    return [row for row in record["cells"] if row["setting"] == setting.name]


def _named(record: Row, settings: Sequence[Setting], with_teacher: bool) -> list[tuple[str, Setting | None, list[Row]]]:
    """Title, setting and results of each line of a table."""
    teacher = [(found["title"], None, [found]) for found in record["references"].values()] if with_teacher else []
    return [*teacher, *((setting.title, setting, _rows(record, setting)) for setting in settings)]


def _overall(
    record: Row, settings: Sequence[Setting], against: dict[str, tuple[Setting, Interval]], change: str, with_teacher: bool
) -> list[str]:
    head = ("", "seeds", "passes", "followed", "of the teacher's", change, "unseen pairs", "unseen relations", "Fréchet, data")
    lines = [f"| {' | '.join([*head, 'error', 'TFLOP'])} |", "|---" * (len(head) + 2) + "|"]
    best = record["references"]["teacher"]["by_category"]["all"]["share"]
    for title, setting, rows in _named(record, settings, with_teacher):
        followed = [row["by_category"]["all"] for row in rows]
        share = statistics.mean(each["share"] for each in followed)
        found = None if setting is None else against.get(setting.name)
        cells = [
            "" if setting is None else str(len(rows)),
            str(rows[0]["passes"] if setting is None else rows[0]["num_steps"]),
            _share(followed),
            f"{100 * share / best:.1f} %" if best else "-",
            "" if found is None else _points(found[1]),
            *(_share([row["by_split"][split] for row in rows if split in row["by_split"]]) for split in SPLITS[1:]),
            _number([row["frechet_to_data"] for row in rows]),
            _number([row["error"] for row in rows]),
            "" if setting is None else f"{rows[0]['training_flops'] / 1e12:.1f}",
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _categories(record: Row, settings: Sequence[Setting], with_teacher: bool) -> list[str]:
    lines = [f"| | {' | '.join(CATEGORIES)} |", "|---" * (1 + len(CATEGORIES)) + "|"]
    for title, _, rows in _named(record, settings, with_teacher):
        cells = [_share([row["by_category"][c] for row in rows if c in row["by_category"]]) for c in CATEGORIES]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _share(found: Sequence[Row]) -> str:
    if not found:
        return "-"
    low, high = Proportion(round(statistics.mean(each["yes"] for each in found)), found[0]["total"]).interval
    return f"{_number([100 * each['share'] for each in found], lambda x: f'{x:.1f}')} ({100 * low:.1f} – {100 * high:.1f})"


def _number(values: Sequence[float], write: Callable[[float], str] = lambda value: f"{value:.3f}") -> str:
    mean = write(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {write(statistics.stdev(values))}"


def _points(found: Interval) -> str:
    value, low, high = (100 * x for x in (found.value, found.low, found.high))
    return f"{value:+.1f} ({low:+.1f} – {high:+.1f})"


def _draw(workshop: TextWorkshop, record: Row, path: Path) -> None:
    """Prompts down; the teacher's own samplers and the main table's students across, of the first seed."""
    texts = workshop.prompts.examples(PICTURED)
    pictures: dict[str, np.ndarray] = {}
    facts: dict[str, str] = {}
    for key, found in record["references"].items():
        pictures[found["title"]] = np.load(workshop.folder / "references" / key / PICTURES_NAME)
        facts[found["title"]] = _facts(found["passes"], found)
    for title, setting in _PICTURED.items():
        row = next((row for row in _rows(record, setting) if row["seed"] == 0), None)
        if row is not None:
            heading = title.replace(" = ", "=")  # or it would be broken there
            pictures[heading] = np.load(workshop.folder_of(Cell(TEXT, setting, 0)) / PICTURES_NAME)
            facts[heading] = _facts(row["num_steps"], row)
    draw_prompts(dict(enumerate(texts.values())), pictures, facts, path)


def _facts(passes: int, found: Row) -> str:
    return f"{passes} passes · {100 * found['by_category']['all']['share']:.0f} %"
