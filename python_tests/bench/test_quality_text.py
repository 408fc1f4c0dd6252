"""The quality benchmark on captioned scenes, in miniature: a teacher of two updates, its students, the report."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from pyard.bench.quality import bench_quality
from pyard.bench.quality.cell import open_workshop, run_cell, train_settings, valid_result
from pyard.bench.quality.intervals import paired_difference
from pyard.bench.quality.plan import (
    MAIN,
    PAPERS_TEXT,
    QUICK_TEXT,
    STRONG,
    TEXT,
    Cell,
    adversarial,
    corner,
    full_plan,
    one_factor_of_text,
    quick_plan,
)
from pyard.bench.quality.schedule import Schedule, needs_of, tasks_of
from pyard.bench.quality.text_report import other_of, write_text_report
from pyard.bench.quality.text_workshop import REFERENCES
from pyard.data.captioned_scenes import scene_batch
from pyard.evaluation.captioned_scenes import PROMPT_SEED
from pyard.training.config import TrainConfig


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return open_workshop(TEXT, QUICK_TEXT, tmp_path_factory.mktemp("quality"), quick=True)


def test_the_plan_has_the_main_table_of_every_seed_and_one_thing_at_a_time(tmp_path, workshop):
    plan = full_plan([TEXT], 3)
    assert plan.cells[:24] == tuple(Cell(TEXT, setting, seed) for seed in range(3) for setting in MAIN)
    further = plan.cells[24:]
    assert {cell.seed for cell in further} == {0}
    assert max(Counter(cell.name for cell in plan.cells).values()) == 1
    assert {cell.setting.name.removeprefix("state-jump-") for cell in further} == {
        "N0-S2", "N0-S1", "N-quarter-lora", "N-quarter-unguided", "N-quarter-gan", "N-quarter-further",
    }  # fmt: skip
    for cell in plan.cells:
        chosen = train_settings(cell, plan.budgets[TEXT], workshop)
        config = TrainConfig.of({"teacher": "", "out": tmp_path, **chosen})  # refuses what it does not know or cannot be
        assert config.num_steps == cell.setting.num_steps
    assert plan.budgets[TEXT].samples >= 4000  # half of them of combinations that training showed


def test_settings_are_compared_with_the_one_they_differ_from_in_one_thing():
    names = {setting.name: other_of(setting) for setting in (*MAIN, *one_factor_of_text())}
    found = {name: None if other is None else other.name for name, other in names.items()}
    assert found["denoised-direct-N0"] is found["state-direct-N0"] is found["state-jump-N0"] is None
    assert found["state-direct-N-all"] == "state-direct-N0"
    assert found["denoised-direct-N-quarter"] == "denoised-direct-N0"
    assert found["state-jump-N0-S2"] == found["state-jump-N-quarter-gan"] == "state-jump-N-quarter"


def test_work_is_begun_in_order_when_all_that_it_needs_is_there():
    plan = full_plan(["digits", TEXT], 2)
    cells = [cell for cell in plan.cells if cell.subject == TEXT]
    tasks = tasks_of(cells)
    needs = needs_of(tasks)
    first = cells[0].name
    names = list(tasks)
    assert names[:3] == [f"{TEXT} reference teacher", f"{TEXT} store 4 0 True", first]
    assert needs[first] == set(names[:2])
    assert needs[f"{TEXT}/state-jump-N-quarter-gan/seed-0"] == needs[first] | {f"{TEXT}/state-jump-N-quarter/seed-0"}
    assert needs[f"{TEXT}/state-jump-N-quarter-unguided/seed-0"] == {names[0], f"{TEXT} store 4 0 False"}
    assert names[-2:] == [f"{TEXT} reference teacher-S4", f"{TEXT} reference teacher-unguided"]
    schedule = Schedule(needs)
    assert [schedule.take(), schedule.take()] == names[:2]
    # Nothing else waits for nothing but other trajectories: a second process makes those meanwhile.
    assert schedule.take() == f"{TEXT} store 4 1 True"
    schedule.done(names[0])
    schedule.done(names[1])
    assert schedule.take() == first
    of_digits = tasks_of([cell for cell in plan.cells if cell.subject == "digits"])
    assert next(iter(of_digits)) == "digits"
    broken = Schedule({"digits": [], "a": ["digits"], "b": ["a"]})
    assert broken.take() == "digits"
    assert broken.take() is None
    assert broken.left == {"a": "digits", "b": "a"}


def test_scenes_follow_their_own_prompts_and_the_teachers_pictures_are_its_own(tmp_path, workshop):
    splits = (("train", 24), ("unseen pair", 12), ("unseen relation", 12))
    scenes = [scene_batch(PROMPT_SEED + i, range(n), workshop.setting, split).pictures for i, (split, n) in enumerate(splits)]
    found = workshop.measure(np.concatenate(scenes), tmp_path)
    assert found["by_category"]["all"]["share"] > 0.9
    assert [found["by_split"][split]["total"] for split, _ in splits] == [24, 12, 12]
    assert found["error"] > 0.1
    followed = np.load(tmp_path / "followed.npy")
    assert (followed.shape, followed.dtype) == ((48,), bool)
    assert followed[:24].sum() == found["by_category"]["all"]["yes"]
    drawn = {name: workshop.reference(name) for name in REFERENCES}
    assert workshop.measure(drawn["teacher"])["error"] == 0
    assert workshop.measure(drawn["teacher"])["frechet_to_data"] > 2 * found["frechet_to_data"]
    errors = [np.abs(drawn["teacher"] - drawn[name]).mean() for name in ("teacher-S4", "teacher-unguided")]
    assert min(errors) > 1e-4


@pytest.mark.slow
def test_every_setting_is_trained_measured_and_kept(workshop):
    cells = quick_plan([TEXT]).cells
    found = {cell.setting.name: run_cell(workshop, cell) for cell in cells}
    assert len({row["error"] for row in found.values()}) == len(found)
    assert found["state-jump-N-quarter"]["history_layers"] == 1
    assert found["state-jump-N0-S2"]["num_steps"] == 2
    for cell in cells:
        files = {path: path.stat().st_mtime_ns for path in workshop.folder_of(cell).rglob("*")}
        assert run_cell(workshop, cell) == found[cell.setting.name]
        assert {path: path.stat().st_mtime_ns for path in files} == files
    unguided = workshop.store(4, 0, guided=False)
    assert (unguided.manifest.cfg_scale, workshop.store(4, 0).manifest.cfg_scale) == (1.0, 2.0)
    assert unguided.conditions.prompts[:2] == list(scene_batch(0, range(2), workshop.setting).captions)
    # It begins as the teacher's own sampler of four steps.
    assert found["state-jump-N0"]["error"] < found["denoised-direct-N0"]["error"]


@pytest.mark.slow
def test_a_copied_folder_goes_on_elsewhere(tmp_path, workshop):
    cells = [
        Cell(TEXT, corner(STRONG, "L/4"), 0),
        Cell(TEXT, adversarial(corner(STRONG, "L/4")), 0),
    ]
    made = [run_cell(workshop, cell) for cell in cells]
    shutil.copytree(workshop.folder.parent, tmp_path / "there")
    there = open_workshop(TEXT, QUICK_TEXT, tmp_path / "there", quick=True)
    assert there.folder != workshop.folder
    assert [valid_result(there, cell) for cell in cells] == made
    further = Cell(TEXT, corner(PAPERS_TEXT, "0"), 0)
    assert valid_result(there, further) is None
    assert run_cell(there, further)["error"] > 0
    larger = dataclasses.replace(there, budget=dataclasses.replace(QUICK_TEXT, samples=52))
    assert valid_result(larger, cells[0]) is None
    assert larger.reference("teacher").shape == (52, 3, 16, 16)


def test_the_report_has_tables_intervals_and_a_picture(tmp_path, workshop, capsys):
    plan = quick_plan([TEXT])
    for cell in plan.cells:
        run_cell(workshop, cell)
    write_text_report(plan, workshop.folder.parent, tmp_path, "report", quick=True)
    record = json.loads((tmp_path / "report.json").read_text())
    assert len(record["cells"]) == len(plan.cells)
    assert list(record["references"]) == list(REFERENCES)
    assert record["prompts"] == {"train": 24, "unseen pair": 12, "unseen relation": 12}
    assert record["against"]["state-jump-N-quarter"]["other"] == "state-jump-N0"
    assert record["against"]["state-jump-N-quarter-lora"]["other"] == "state-jump-N-quarter"
    flops = {row["setting"]: row["training_flops"] for row in record["cells"]}
    assert flops["state-jump-N-quarter-gan"] > 1.2 * flops["state-jump-N-quarter"]
    assert flops["state-jump-N0-S2"] == pytest.approx(flops["state-jump-N0"] / 2)
    text = (tmp_path / "report.md").read_text()
    assert text == capsys.readouterr().out.split("Picture: ")[0].rstrip("\n") + "\n"
    lines = text.splitlines()
    assert sum(line.startswith("| teacher, 4 steps |") for line in lines) == 2
    for cell in plan.cells:
        assert sum(line.startswith(f"| {cell.setting.title} | ") for line in lines) == 2
    for head, line in pairwise(lines):
        assert line.count("|") == head.count("|") or not (head.startswith("|") and line.startswith("|"))
    picture = np.asarray(Image.open(tmp_path / "report.png"))
    assert picture.std() > 20


def test_a_difference_of_known_size_lies_in_its_interval():
    random = np.random.default_rng(0)
    theirs = [random.random(2000) < 0.7 for _ in range(3)]
    ours = [each | (random.random(2000) < 0.2) for each in theirs]  # 0.3 * 0.2 more
    found = paired_difference(ours, theirs)
    assert found.low < 0.06 < found.high
    assert found.high - found.low < 0.04  # pairs: independent answers would give 0.06 or more
    assert paired_difference(theirs, theirs).high == 0
    assert paired_difference(theirs, ours).value == pytest.approx(-found.value)


@pytest.mark.slow
def test_the_command_runs_reports_and_resumes(tmp_path):
    settings = {"results": tmp_path, "quick": True, "subjects": [TEXT], "progress": False}
    bench_quality(tmp_path / "runs", **settings)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("result.json")}
    assert len(written) == len(quick_plan([TEXT]).cells)
    bench_quality(tmp_path / "runs", **settings)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert {path.name for path in tmp_path.glob("quality*")} == {f"quality-{TEXT}-quick.{end}" for end in ("json", "md", "png")}
