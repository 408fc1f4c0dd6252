"""The quality benchmark: its plan, its cells on real (tiny) subjects, its statistics."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from pyard.bench.quality import bench_quality, chosen_cells
from pyard.bench.quality.cell import open_workshop, run_cell, train_settings, valid_result
from pyard.bench.quality.intervals import degradation_ratio
from pyard.bench.quality.plan import (
    AUTHORS_CODE,
    MAIN,
    QUICK,
    STRONG,
    SUBJECTS,
    TEXT,
    Cell,
    adversarial,
    corner,
    full_plan,
    further_ways,
    longer,
    longer_by_other_histories,
    one_factor_at_a_time,
    own_rollouts,
    switched_off,
    varied,
    ways_for_fast_students,
)
from pyard.bench.quality.report import history_changes
from pyard.errors import InputError
from pyard.training.config import TrainConfig

CLASSES = [subject for subject in SUBJECTS["cpu"] if subject != TEXT]
# A sample is one token, over which a wider kernel would wrap around more than once.
BUDGET = dataclasses.replace(
    QUICK, trajectories=64, updates=6, samples=40, held_out=16, adversarial={"warmup_steps": 2, "kernel_size": 1}
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return open_workshop("mixture-2d", BUDGET, tmp_path_factory.mktemp("quality"), quick=True)


def test_the_main_table_has_every_corner_on_every_subject_and_seed():
    plan = full_plan(CLASSES, 3)
    main = [cell for cell in plan.cells if cell.setting.factor == "main"]
    assert len(main) == 3 * 3 * 8 == len({cell.name for cell in main})
    assert plan.cells[: len(main)] == tuple(main)
    corners = {(s.train["target"], s.train["output"], s.layers) for s in MAIN}
    own = {(*pair, n) for pair in (("denoised", "direct"), ("state", "jump")) for n in ("0", "L/4", "L")}
    assert corners == own | {("state", "direct", n) for n in ("0", "L")}


def test_names_tell_settings_apart_and_every_setting_is_one_of_train(tmp_path, workshop):
    ways = [*own_rollouts(), *switched_off(), *longer(), *longer_by_other_histories()]
    settings = [*MAIN, *ways, *further_ways(), *ways_for_fast_students(), *one_factor_at_a_time()]
    assert max(Counter(setting.name for setting in settings).values()) == 1
    assert max(Counter(setting.title for setting in settings).values()) == 1
    for setting in settings:
        chosen = train_settings(Cell("mixture-2d", setting, 0), BUDGET, workshop)
        TrainConfig.of({"teacher": "", "out": tmp_path, **chosen})  # refuses what it does not know or cannot be


def test_settings_of_a_factor_differ_from_the_main_table_in_what_they_say(workshop):
    def of(setting):
        return train_settings(Cell("mixture-2d", setting, 0), BUDGET, workshop)

    start = of(corner(STRONG, "L"))
    for suffix, more in (("a", {"mask": "anchor"}), ("b", {"num_steps": 2}), ("c", {"loss": "pseudo_huber"})):
        changed = of(varied(STRONG, "L", "x", suffix, suffix, **more))
        assert {**start, **more} == changed
    own = of(varied(STRONG, "L", "x", "d", "d", rollout_probability=1.0))
    assert own == {**start, "rollout_probability": 1.0, "rollout_start": 3}
    assert of(varied(STRONG, "0", "x", "e", "e", updates=4.0))["max_steps"] == 4 * start["max_steps"]


def test_a_cell_is_made_once_and_made_anew_when_its_settings_change(workshop):
    cell = Cell("mixture-2d", corner(STRONG, "L"), 0)
    first = run_cell(workshop, cell)
    result = workshop.folder / cell.setting.name / "seed-0" / "result.json"
    assert json.loads(result.read_text()) == first
    before = result.stat().st_mtime_ns
    assert run_cell(workshop, cell) == first
    assert result.stat().st_mtime_ns == before
    assert first["endpoint_mse"] > 0
    assert len(first["exposure_bias"]["rollout"]) == first["num_steps"] == 4
    # The first step reads the noise, whoever's history it is.
    assert first["exposure_bias"]["rollout"][0] == pytest.approx(first["exposure_bias"]["teacher_forced"][0], rel=1e-4)
    longer = dataclasses.replace(workshop, budget=dataclasses.replace(BUDGET, updates=9))
    again = run_cell(longer, cell)
    assert again["updates"] == 9
    assert again["endpoint_mse"] != first["endpoint_mse"]


def test_seeds_and_settings_make_different_students(workshop):
    found = {
        (setting.name, seed): run_cell(workshop, Cell("mixture-2d", setting, seed))["endpoint_mse"]
        for setting in (corner(AUTHORS_CODE, "0"), corner(AUTHORS_CODE, "L"))
        for seed in (0, 1)
    }
    assert len(set(found.values())) == 4


def test_the_adversarial_stage_goes_on_from_its_base(workshop):
    base = corner(AUTHORS_CODE, "L")
    started = run_cell(workshop, Cell("mixture-2d", base, 0))
    found = run_cell(workshop, Cell("mixture-2d", adversarial(base), 0))
    assert found["history_layers"] == started["history_layers"] > 0
    assert found["endpoint_mse"] != started["endpoint_mse"]


def test_the_teacher_is_at_its_own_endpoints(workshop):
    found = workshop.measure(workshop.teacher_samples()["ends"])
    assert found["endpoint_mse"] == 0
    assert found["label_accuracy"] > 0.9  # the score is exact and the classes hardly overlap; 25 steps leave a little


def test_the_degradation_ratio_of_known_gaussians():
    random = np.random.default_rng(0)
    data = random.standard_normal((4000, 3))
    teacher = random.standard_normal((4000, 3))
    # Shifts add their squares to the Fréchet distance: the ratio of losses is (1 / 0.5)^2.
    pairs = [(teacher + np.array([1.0, 0, 0]), teacher + np.array([0.5, 0, 0])) for _ in range(3)]
    ratio = degradation_ratio(data, teacher, pairs, resamples=100)
    assert ratio.low < 4 < ratio.high
    assert ratio.high - ratio.low < 2
    swapped = degradation_ratio(data, teacher, [pair[::-1] for pair in pairs], resamples=100)
    assert swapped.value == pytest.approx(1 / ratio.value)


def test_a_history_is_compared_with_the_student_without_one_of_the_same_seed():
    plan = full_plan(CLASSES, 3)
    settings = {cell.setting.name: cell.setting for cell in plan.cells}
    errors = {"N0": (2.0, 4.0, 8.0), "N-all": (3.0, 5.0, 8.8), "N0-rollout": (1.0,), "N-all-anchor-rollout": (1.5,)}
    rows = [
        {"subject": "digits", "setting": f"state-jump-{name}", "seed": seed, "endpoint_mse": value}
        for name, values in errors.items()
        for seed, value in enumerate(values)
    ]

    def changes(name):
        return history_changes(plan, rows, "digits", settings[name])

    assert changes("state-jump-N-all") == pytest.approx([0.5, 0.25, 0.1])
    assert changes("state-jump-N-all-anchor-rollout") == pytest.approx([0.5])
    assert changes("state-jump-N0") == changes("state-jump-N-quarter") == changes("denoised-direct-N-all") == []
    # Nearly every student with a history has one to compare with.
    plain = [setting.but_for_its_history for setting in settings.values() if setting.layers == "0"]
    alone = {s.name for s in settings.values() if s.layers != "0" and s.but_for_its_history not in plain}
    assert alone == {
        *(f"denoised-direct-N-all-{more}" for more in ("gan", "further", "shared", "lr0.002", "long")),
        "state-jump-N-all-shared",
    }


def test_settings_are_chosen_by_name_with_those_they_go_on_from():
    plan = full_plan(CLASSES, 1)
    assert {cell.setting.name for cell in chosen_cells(plan, "denoised-direct-N-all")} == {"denoised-direct-N-all"}
    assert {cell.setting.name for cell in chosen_cells(plan, "*-further")} == {
        "denoised-direct-N-all", "denoised-direct-N-all-further",
    }  # fmt: skip
    assert len(chosen_cells(plan, None)) == len(plan.cells)
    with pytest.raises(InputError, match="no setting matches 'gan'; expected some of denoised-direct-N0, "):
        chosen_cells(plan, "gan")


def test_results_of_another_teacher_or_budget_are_not_reported(workshop):
    cell = Cell("mixture-2d", corner(STRONG, "0"), 0)
    assert valid_result(workshop, cell) is None
    made = run_cell(workshop, cell)
    assert valid_result(workshop, cell) == made
    assert valid_result(dataclasses.replace(workshop, budget=dataclasses.replace(BUDGET, samples=41)), cell) is None
    more = dataclasses.replace(workshop, budget=dataclasses.replace(BUDGET, samples=50))
    assert len(more.teacher_samples()["ends"]) == 50  # not those that were there
    assert len(workshop.teacher_samples()["ends"]) == 40


def test_unknown_subjects_are_named():
    with pytest.raises(InputError, match="unknown subject 'cats'; expected some of digits"):
        bench_quality(subjects=["cats"])


@pytest.mark.slow
def test_the_quick_benchmark_runs_reports_and_resumes(tmp_path, capsys):
    bench_quality(tmp_path / "runs", results=tmp_path, quick=True, progress=False)
    written = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.suffix in (".json", ".safetensors")
    }
    assert len(written) > 20
    bench_quality(tmp_path / "runs", results=tmp_path, quick=True, progress=False)
    assert {path: path.stat().st_mtime_ns for path in written} == written  # nothing was made again
    report = (tmp_path / "quality-quick.md").read_text()
    assert report.count("| the authors' code (x̂0 targets, direct), N = L") == 2  # the main table, and the adversarial stage
    assert "Degradation ratio" in report
    for kind in ("steps", "layers", "exposure", "samples"):
        assert (tmp_path / f"quality-quick-{kind}.png").stat().st_size > 1000
    record = json.loads((tmp_path / "quality-quick.json").read_text())
    assert len(record["cells"]) == 6
    flops = {row["setting"]: row["training_flops"] for row in record["cells"]}
    assert flops["denoised-direct-N-all-gan"] > 1.2 * flops["denoised-direct-N-all"]  # the discriminators are counted
