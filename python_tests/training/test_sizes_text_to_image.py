"""One student of several sizes whose times differ, as the shift of FLUX.1 and Qwen-Image depends on the size."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converted_students import code_of, relative
from tiny_pipelines import tiny_pipeline
from torch import nn
from torch.nn.functional import pixel_unshuffle
from training_runs import assert_same_run, signal_at, start, train_in, wait

import pyard
from pyard.cli.command_line import main
from pyard.diffusion.noise import standard_normal
from pyard.errors import InputError
from pyard.export.pipeline import export_pipeline
from pyard.models.student import Student
from pyard.runtime import OnnxPipeline
from pyard.sampling.prompts import condition_of_prompts
from pyard.storage.log import read_log
from pyard.trajectories import TrajectoryStore, generate_trajectories

PROMPTS = ["a red circle", "two small blue squares above a cross", "a dog"]
SIZES = {"square": (32, 32), "wide": (32, 64)}
SHAPES = {"square": (4, 8, 8), "wide": (4, 8, 16)}
SETTINGS: dict[str, Any] = dict(
    num_steps=2, history_layers=2, max_steps=8, batch_size=4, learning_rate=1e-3, save_every=2, log_every=1, heads="shared",
    output="jump", trackers="none", progress=False, history_bias=-1.0, evaluate_every=8, evaluation_trajectories=2,
    step_weights="min_snr",
)  # fmt: skip


@pytest.fixture(scope="module", params=[pytest.param("flux", marks=pytest.mark.slow), "qwen_image"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher/` with a steep shift by size, `square/` and `wide/`."""
    place = tmp_path_factory.mktemp(request.param)
    settings = tiny_pipeline(request.param, place / "teacher") / "scheduler" / "scheduler_config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**config, "base_image_seq_len": 8, "max_image_seq_len": 40}), encoding="utf-8")
    for name, (height, width) in SIZES.items():
        generate_trajectories(
            place / "teacher", place / name, 8, num_steps=2, teacher_steps=4, height=height, width=width, prompts=PROMPTS,
            batch_size=4, keep="state", progress=False,
        )  # fmt: skip
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    # In a process of its own, as the run that is killed is: sums on a CPU are rounded as memory happens to be aligned.
    assert set(wait(start(folder, "run", 1, None, **_settings(folder)))) == {0}
    return folder / "run"


def _settings(folder: Path) -> dict[str, Any]:
    return {**SETTINGS, "store": [folder / name for name in SIZES]}


def test_each_size_has_the_grid_of_its_store(folder: Path, run: Path) -> None:
    student = Student.from_pretrained(run)
    grids = {name: TrajectoryStore.open(folder / name).manifest.grid for name in SIZES}
    assert abs(grids["square"].times[1] - grids["wide"].times[1]) > 0.01
    for name, shape in SHAPES.items():
        own = student.config.grid_of(shape)
        assert own.times == grids[name].times
        assert student.times.embed_times(shape).tolist() == pytest.approx(own.embed_times)
        assert student.of_size(shape).embed_times.tolist() == pytest.approx(own.embed_times)
        assert student.of_size(shape).jumps == student.times.jumps(shape)
    assert student.times.jumps(SHAPES["square"]) != student.times.jumps(SHAPES["wide"])
    half = Student.from_pretrained(run).bfloat16()
    assert half.times.told.dtype == torch.float32
    assert torch.equal(half.times.told, student.times.told)
    with pytest.raises(InputError, match=r"trained on \(4, 8, 8\), \(4, 8, 16\)"):
        student.config.grid_of((4, 16, 16))
    logged = read_log(run / "log.jsonl")
    assert len(logged) == 8
    assert len(read_log(run / "exposure_bias.jsonl")) == 1
    # Held-out trajectories share the embeddings of those that are trained on.
    shards = [folder / place / "conditions" / "shards" for place in ("square", "run/held-out-0", "run/held-out-1")]
    files = [sorted((path.name, path.stat().st_ino) for path in place.iterdir()) for place in shards]
    assert files[0] == files[1] == files[2] != []


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_drawn_at_its_own_times(name: str, folder: Path, run: Path) -> None:
    """The cached rollout equals the parallel pass on its own history, and a student of that size alone."""
    student = Student.from_pretrained(run)
    noise = torch.from_numpy(standard_normal(3, np.arange(2), SHAPES[name]))
    condition = condition_of_prompts(student, PROMPTS[:2])
    with torch.no_grad():
        rolled = torch.stack(list(student.rollout(noise, condition)), dim=1)
        history = torch.cat([noise[:, None], rolled[:, :-1]], dim=1)
        assert relative(student(history, condition), rolled) < 1e-5
        assert torch.equal(student.of_size(SHAPES[name])(history, condition), student(history, condition))
        other = student.of_size(next(shape for shape in SHAPES.values() if shape != SHAPES[name]))
        assert other.embed_times.tolist() != student.times.embed_times(SHAPES[name]).tolist()
    height, width = SIZES[name]
    drawn = pyard.sample(student, prompts=PROMPTS[:2], seed=3, height=height, width=width, latents=True)
    assert relative(drawn, rolled[:, -1]) < 1e-5
    told: list[float] = []
    pipe = pyard.ARDPipeline.from_pretrained(run)
    images = pipe(
        PROMPTS[0], height=height, width=width, callback_on_step_end=lambda p, s, time, kept: told.append(time)
    ).images  # fmt: skip
    assert images[0].size == (width, height)
    assert tuple(told) == student.config.grid_of(SHAPES[name]).embed_times
    with pytest.raises(InputError, match=r"trained on \(4, 8, 8\), \(4, 8, 16\)"):
        pipe(PROMPTS[0], height=64, width=64)


def test_an_untrained_student_draws_what_its_teacher_draws_in_as_many_steps(folder: Path) -> None:
    """With jumps and no history, each size is the pipeline's Euler sampler of that size."""
    teacher: Any = pyard.load_teacher(folder / "teacher")
    grids = [TrajectoryStore.open(folder / name).manifest.grid for name in SIZES]
    text = dataclasses.replace(teacher.text_source(), constants=teacher.constants(None))
    shared = dict(history_layers=0, output="jump", heads="shared", text=text)
    both = Student.from_teacher(teacher, grids, sample_shapes=list(SHAPES.values()), **shared).eval()
    condition = condition_of_prompts(both, PROMPTS[:1])
    for grid, shape in zip(grids, SHAPES.values(), strict=True):
        alone = Student.from_teacher(teacher, grid, sample_shapes=[shape], **shared).eval()
        noise = torch.from_numpy(standard_normal(3, np.arange(1), shape))
        with torch.no_grad():
            pairs = zip(both.rollout(noise, condition), alone.rollout(noise, condition), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(folder: Path, run: Path) -> None:
    processes = start(folder, "killed", 1, None, **_settings(folder))
    assert signal_at(processes, folder / "killed" / "log.jsonl", 3) >= 3
    wait(processes)
    assert not (folder / "killed" / "student").exists()
    assert set(wait(start(folder, "killed", 1, None, **_settings(folder)))) == {0}
    assert_same_run(run, folder / "killed")


def test_errors_are_measured_at_each_size(folder: Path, run: Path) -> None:
    from pyard.evaluation.evaluate_students import measured_exposure_bias

    student = Student.from_pretrained(run)
    for name, shape in SHAPES.items():
        bias = measured_exposure_bias(student, TrajectoryStore.open(folder / name), 4)
        assert bias.times == student.config.grid_of(shape).times[1:]
    wide = TrajectoryStore.open(folder / "wide")
    grid = student.config.grid_of(SHAPES["square"])
    student.config = dataclasses.replace(student.config, sample_shapes=(SHAPES["wide"],), grid=grid, grids=None)
    with pytest.raises(InputError, match="the student has"):
        measured_exposure_bias(student, wide, 4)


def test_another_stage_goes_on_with_both_sizes(folder: Path, run: Path) -> None:
    changes = {name: value for name, value in _settings(folder).items() if name not in ("output", "history_bias")}
    train_in(folder, "second", **{**changes, "student": run, "max_steps": 2, "evaluate_every": 0})
    again = Student.from_pretrained(folder / "second")
    assert again.config.grids == Student.from_pretrained(run).config.grids
    # Of one of the sizes alone, too.
    train_in(folder, "third", **{**changes, "store": folder / "wide", "student": run, "max_steps": 2, "evaluate_every": 0})


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["qwen_image"], indirect=True)
def test_an_exported_folder_draws_both_sizes(folder: Path, run: Path, tmp_path: Path) -> None:
    student = Student.from_pretrained(run)
    parity = export_pipeline(student, tmp_path / "onnx", form="sampler")
    assert all(0 <= error < 1e-4 for name, error in parity.items() if name != "picture")
    pipeline = OnnxPipeline.from_folder(tmp_path / "onnx", providers=["CPUExecutionProvider"])
    condition = condition_of_prompts(student, PROMPTS[:2])
    arrays = {item["name"]: condition[item["name"]].numpy() for item in pipeline.config["conditions"]}
    for name, (height, width) in SIZES.items():
        noise = standard_normal(3, np.arange(2), SHAPES[name])
        with torch.no_grad():
            *_, expected = student.rollout(torch.from_numpy(noise), condition)
        found = pipeline.latents(arrays, noise, height=height, width=width)
        assert relative(torch.from_numpy(found), expected) < 1e-4


def test_a_stock_pipeline_draws_both_sizes(folder: Path, tmp_path: Path) -> None:
    settings = {**_settings(folder), "history_layers": 0, "max_steps": 2, "evaluate_every": 0, "history_bias": None}
    run = train_in(folder, "stock", **settings)
    assert main(["convert", str(run), "--to", "transformer", "--out", str(tmp_path / "out")]) == 0
    student = Student.from_pretrained(run)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "ComfyUI, 32 x 32" in card
    assert "ComfyUI, 32 x 64" in card
    condition = condition_of_prompts(student, PROMPTS[:1])
    for name, (height, width) in SIZES.items():
        shape = SHAPES[name]
        noise = torch.from_numpy(standard_normal(3, np.arange(1), shape))
        with torch.no_grad():
            *_, expected = student.rollout(noise, condition)
        code = code_of(tmp_path / "out").replace("a red circle above a blue square", PROMPTS[0])
        assert "height=32, width=32" in code
        code = code.replace("height=32, width=32", f"height={height}, width={width}")
        code = code.replace(").images[0]", ', latents=start, output_type="latent").images')
        listed = re.search(rf"(\[[^]]*\]) for {height} x {width}", card)
        assert ("sigmas=" in code) == (listed is not None)
        if listed is not None:
            code = re.sub(r"sigmas=\[[^]]*\]", f"sigmas={listed[1]}", code)
        names: dict[str, Any] = {"start": pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2)}
        exec(code, names)
        rows = names["image"].transpose(1, 2).unflatten(2, (shape[1] // 2, shape[2] // 2))
        assert relative(nn.functional.pixel_shuffle(rows, 2), expected) <= 1e-4


def test_a_student_without_sizes_says_nothing_of_grids(folder: Path) -> None:
    """A configuration as earlier versions wrote it."""
    alone = train_in(folder, "alone", **{**SETTINGS, "store": folder / "wide", "max_steps": 1, "evaluate_every": 0})
    config = json.loads((alone / "student" / "config.json").read_text(encoding="utf-8"))
    assert "grids" not in config
    both = json.loads((folder / "run" / "student" / "config.json").read_text(encoding="utf-8"))
    for broken, message in (
        ({"grids": both["grids"][:1]}, "1 grids for 2 sizes"),
        ({"grids": both["grids"][::-1]}, "not the one of its usual size"),
    ):
        target = folder / "broken" / "config.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps({**both, **broken}), encoding="utf-8")
        (target.parent / "model.safetensors").write_bytes((folder / "run" / "student" / "model.safetensors").read_bytes())
        with pytest.raises(InputError, match=message):
            Student.from_pretrained(target.parent)


def test_stores_that_were_cut_elsewhere_are_refused(folder: Path) -> None:
    other = generate_trajectories(
        folder / "teacher", folder / "other", 4, num_steps=2, teacher_steps=6, height=32, width=64, prompts=PROMPTS,
        batch_size=4, keep="state", progress=False,
    )  # fmt: skip
    assert other.manifest.grid.teacher_steps == 6
    with pytest.raises(InputError, match="do not belong together: teacher_steps is 4 in one, 6 in the other"):
        train_in(folder, "refused", **{**SETTINGS, "store": [folder / "square", folder / "other"]})


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["qwen_image"], indirect=True)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_both_sizes_as_one_does(parallel: str, folder: Path, run: Path) -> None:
    assert set(wait(start(folder, parallel, 2, None, **{**_settings(folder), "parallel": parallel}))) == {0}
    for one, two in zip(read_log(run / "log.jsonl"), read_log(folder / parallel / "log.jsonl"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    student = Student.from_pretrained(folder / parallel)
    assert student.config.grids == Student.from_pretrained(run).config.grids
