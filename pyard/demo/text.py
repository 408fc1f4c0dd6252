"""The text-to-image path in a few minutes: teacher, prompts, trajectories, students, and how well they follow prompts."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyard.conditions import PromptTable
from pyard.conditions.prompt_file import PromptLine
from pyard.data.captioned_scenes import SceneSetting, scene_batch
from pyard.demo.students import train_side_by_side
from pyard.diffusion.noise import standard_normal
from pyard.diffusion.scheduler_times import Visits
from pyard.evaluation.captioned_scenes import PromptSet, TextQuality, judge, quality_table
from pyard.evaluation.prompt_pictures import draw_prompts
from pyard.models.student import Student
from pyard.models.wrapped.backbone import WrappedBackbone
from pyard.storage.files import write_text
from pyard.teachers import load_teacher
from pyard.teachers.guidance import endpoints
from pyard.teachers.text_to_image.teacher import PipelineTeacher
from pyard.training import train
from pyard.trajectories import generate_trajectories

NUM_STEPS, TEACHER_STEPS, CFG_SCALE = 4, 20, 3.0
TEACHER = "scenes-text"
NOISE_SEED = 1000
_AT_ONCE = 250  # pictures that are drawn together


@dataclass(frozen=True)
class TextBudget:
    """What the demo spends; all students get the same.

    Args:
        trajectories: of the teacher, a prompt each.
        updates: of each student.
        batch_size: trajectories an update.
        learning_rate: of each student.
        prompts: that every sampler is measured with.
        pictured: of those, how many are in the picture.
    """

    trajectories: int
    updates: int
    batch_size: int
    learning_rate: float
    prompts: int
    pictured: int = 8


FULL = TextBudget(trajectories=1536, updates=160, batch_size=32, learning_rate=5e-4, prompts=800)
QUICK = TextBudget(trajectories=64, updates=4, batch_size=16, learning_rate=5e-4, prompts=40)

_AUTHORS_CODE = dict(target="denoised", output="direct", heads="per_step")
# Folder, title, and fields of `TrainConfig`; None for the history: as many layers as by default.
STUDENTS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "step distillation": ("step-distillation", "none", _AUTHORS_CODE),
    "ARD": ("ard", "all", _AUTHORS_CODE),
    "ARD, defaults": ("ard-defaults", None, {}),
    "jump, no history": ("stock", "none", dict(target="state", output="jump", heads="shared")),
}
_STOCK = "jump, no history"  # what a stock pipeline can draw with

Draw = Callable[[torch.Tensor, np.ndarray], torch.Tensor]  # noise [B, C, h, w] and prompt rows [B] to pictures


def demo_text(
    out: Path = Path("demo-text"), *, quick: bool = False, fresh: bool = False, seed: int = 0, progress: bool = True
) -> list[TextQuality]:
    """Distil the built-in text-to-image teacher, and measure exactly how well its students follow prompts.

    Args:
        out: folder of the results.
        quick: a minute's run that shows that everything works.
        fresh: remove the results of earlier runs first.
        seed: of trajectories and training.
        progress: show progress bars.

    Returns:
        The rows of the table.
    """
    budget = QUICK if quick else FULL
    out = Path(out) / "quick" if quick else Path(out)
    if fresh:
        for name in ("trajectories", "prompts", "stock-transformer", *(folder for folder, *_ in STUDENTS.values())):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with _stage("1/4  teacher and prompts", seconds):
        teacher = load_teacher(TEACHER)
        assert isinstance(teacher, PipelineTeacher)
        setting = SceneSetting()
        captions = scene_batch(seed, range(budget.trajectories), setting).captions
        prompts = PromptSet.draw(budget.prompts, setting)
    with _stage(f"2/4  {budget.trajectories} trajectories of {TEACHER_STEPS} steps, guidance {CFG_SCALE:g}", seconds):
        store = generate_trajectories(
            teacher,
            out / "trajectories",
            budget.trajectories,
            num_steps=NUM_STEPS,
            teacher_steps=TEACHER_STEPS,
            cfg_scale=CFG_SCALE,
            prompts=list(captions),
            seed=seed,
            batch_size=min(128, budget.trajectories),
            progress=progress,
        )
    runs = {name: _run_of(name, budget, out, teacher.backbone.config.depth, seed) for name in STUDENTS}
    with _stage(f"3/4  {len(runs)} students, {budget.updates} updates each", seconds):
        if not quick and teacher.device.type == "cpu":
            train_side_by_side(TEACHER, store.path, runs, progress)
        students = {name: train(TEACHER, store, **run, progress=progress) for name, run in runs.items()}
    with _stage(f"4/4  {len(prompts.captions)} prompts, drawn and read back", seconds):
        lines = [PromptLine(caption) for caption in prompts.captions]
        table = PromptTable.build(teacher.text_encoder, lines, out / "prompts", progress=False)
        rows, pictures = _measure(teacher.with_prompts(table), students, table, prompts, out)
    told = {"budget": asdict(budget), "cfg_scale": CFG_SCALE, "teacher_steps": TEACHER_STEPS, "seconds_per_stage": seconds}
    write_text(out / "adherence.json", json.dumps({**told, "rows": [row.to_json() for row in rows]}, indent=2) + "\n")
    facts = {row.name: f"{row.passes} passes · {100 * row.by_category['all'].value:.0f} %" for row in rows}
    draw_prompts(prompts.examples(budget.pictured), pictures, facts, out / "prompts.png")
    print(f"\n{quality_table(rows)}\n")
    print(f"Picture: {out / 'prompts.png'}. Numbers, with 95 % intervals: {out / 'adherence.json'}.")
    return rows


def _run_of(name: str, budget: TextBudget, out: Path, depth: int, seed: int) -> dict[str, Any]:
    folder, history, settings = STUDENTS[name]
    run: dict[str, Any] = dict(
        out=out / folder,
        num_steps=NUM_STEPS,
        max_steps=budget.updates,
        batch_size=budget.batch_size,
        learning_rate=budget.learning_rate,
        save_every=max(1, budget.updates // 2),
        seed=seed,
        ema_decay=0.99,
        trackers="none",
    )
    if history is not None:
        run["history_layers"] = depth if history == "all" else 0
    return run | settings


def _measure(
    teacher: PipelineTeacher, students: dict[str, Student], table: PromptTable, prompts: PromptSet, out: Path
) -> tuple[list[TextQuality], dict[str, np.ndarray]]:
    shape = teacher.sample_shape
    solver = teacher.solver

    def of_teacher(steps: int) -> Draw:
        visits: Visits = teacher.visits(steps, shape)

        def draw(noise: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
            return endpoints(teacher, noise, torch.from_numpy(rows), visits, cfg_scale=CFG_SCALE, solver=solver)

        return draw

    def of_student(student: Student) -> Draw:
        def draw(noise: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
            *_, last = student.rollout(noise, table.take(rows))
            return last

        return draw

    samplers: dict[str, tuple[Draw, int]] = {
        f"teacher, {TEACHER_STEPS} steps": (of_teacher(TEACHER_STEPS), 2 * TEACHER_STEPS),
        f"teacher, {NUM_STEPS} steps": (of_teacher(NUM_STEPS), 2 * NUM_STEPS),
        **{name: (of_student(student), NUM_STEPS) for name, student in students.items()},
        "the same, stock diffusers": (stock_sampler(teacher, students[_STOCK], table), NUM_STEPS),
    }
    rows: list[TextQuality] = []
    pictures: dict[str, np.ndarray] = {}
    for name, (draw, passes) in samplers.items():
        drawn, milliseconds = _drawn(draw, len(prompts.captions), shape)
        of_the_teacher = next(iter(pictures.values()), None)
        rows.append(judge(name, drawn, prompts, passes=passes, milliseconds=milliseconds, teacher=of_the_teacher))
        pictures[name] = drawn
    return rows, pictures


@torch.inference_mode()
def _drawn(draw: Draw, count: int, shape: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """Pictures of prompts 0 ... count - 1, and milliseconds a picture."""
    parts, begin = [], time.perf_counter()
    for first in range(0, count, _AT_ONCE):
        rows = np.arange(first, min(first + _AT_ONCE, count))
        parts.append(draw(torch.from_numpy(standard_normal(NOISE_SEED, rows, shape)), rows).float().numpy())
    return np.concatenate(parts), 1000 * (time.perf_counter() - begin) / count


def stock_sampler(teacher: PipelineTeacher, student: Student, table: PromptTable) -> Draw:
    """The student drawn by diffusers' own pipeline: the stock transformer with its weights, S steps, no guidance."""
    import diffusers

    assert isinstance(student.trunk, WrappedBackbone)
    transformer = student.trunk.stock(student.heads[0])
    scheduler = type(teacher.scheduler).from_config({**teacher.scheduler.config, "solver_order": 1})
    kind = getattr(diffusers, teacher.family.pipeline)
    pipe = kind(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def draw(noise: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        condition = table.take(rows)
        pictures: torch.Tensor = pipe(
            prompt=None,
            prompt_embeds=condition["tokens"],
            prompt_attention_mask=condition["mask"],
            negative_prompt=None,
            latents=noise,
            height=noise.shape[2],
            width=noise.shape[3],
            num_inference_steps=student.num_steps,
            guidance_scale=1.0,
            output_type="latent",
            use_resolution_binning=False,
        ).images
        return pictures

    return draw


@contextmanager
def _stage(title: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a stage and note how long it took."""
    print(f"[{title}]", flush=True)
    begin = time.perf_counter()
    yield
    seconds[title] = round(time.perf_counter() - begin, 2)
    print(f"    {seconds[title]:.1f} s", flush=True)
