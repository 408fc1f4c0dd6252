"""Does it work, and what of it matters? Students of equal budget, side by side: `pyard bench quality`."""

from __future__ import annotations

import os
import shutil
import signal
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pyard.bench.machine import cores
from pyard.bench.quality.cell import open_workshop, read_result, run_cell
from pyard.bench.quality.plan import SUBJECTS, TEXT, Budget, Cell, Plan, Scale, full_plan, quick_plan
from pyard.bench.quality.report import write_report
from pyard.bench.quality.schedule import Errand, Schedule, base_of, needs_of, tasks_of
from pyard.bench.quality.text_report import write_text_report
from pyard.bench.quality.workshop import Workshop
from pyard.errors import InputError
from pyard.storage.log import read_log
from pyard.storage.typed import checked
from pyard.training.processes import PREEMPTED_STATUS, Preempted

_SEEDS = 3


@checked("bench")
def bench_quality(
    out: Path = Path("runs/quality"),
    *,
    results: Path | None = None,
    quick: bool = False,
    scale: Scale = "cpu",
    subjects: list[str] | None = None,
    seeds: int = _SEEDS,
    only: str | None = None,
    workers: int | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> None:
    """Train students that differ in one thing at a time, and say how much it matters.

    On `--scale cpu`: the built-in digits, two Gaussian mixtures whose score is exact, so that every error is the student's, and
    captioned scenes (`scenes-text`), a text-to-image teacher whose prompts can be read back out of the pixels.
    On `--scale gpu`: drawn scenes of 32 x 32 pixels. The main table has step distillation and ARD as in the authors'
    code (denoised targets, direct outputs), as in the paper's text (state targets, direct outputs) and in the strong setting
    (state targets, jump outputs), several seeds each; then come masks, steps, heads, losses, rollouts and the adversarial
    stage, one at a time. Everything gets the same budget.

    Every student is a process with one CPU thread, or a GPU, of its own. The same command resumes: finished students are
    kept, and an unfinished one continues from its last checkpoint.

    Example: pyard bench quality --subjects '[digits]' --seeds 1

    Args:
        out: folder for teachers, trajectories and students.
        results: folder for `quality-SCALE.json`, the tables `quality-SCALE.md` and the figures, and for
            `quality-scenes-text.*`; none: `benchmarks/results` for a whole table, else `out`.
        quick: a minute's run with next to no training: it shows that everything works, and nothing more.
        scale: `cpu`: the digits, two Gaussian mixtures and captioned scenes; `gpu`: drawn scenes of 32 x 32 pixels.
        subjects: some of digits, mixture-2d, mixture-16, scenes-text (cpu), scenes (gpu); the first one with classes has the
            one-factor tables. none: all.
        seeds: number of seeds in the main table.
        only: train only settings with this name, where `*` matches anything (`state-jump-*`), and those they continue from; the
            report has all results that exist.
        workers: number of processes; none: one per core, or one per GPU.
        fresh: remove the results of earlier runs first.
        progress: show a progress bar.

    Raises:
        InputError: an unknown subject, or students that failed, with their messages.
    """
    subjects = list(subjects or SUBJECTS[scale][: 1 if quick else None])
    known = [name for names in SUBJECTS.values() for name in names]
    for subject in subjects:
        if subject not in known:
            raise InputError(f"bench quality: unknown subject {subject!r}; expected some of {', '.join(known)}")
    if seeds < 1:
        raise InputError(f"bench quality: seeds is {seeds}; expected at least 1")
    out = out / "quick" if quick else out
    if fresh:
        for subject in subjects:
            shutil.rmtree(out / subject, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    plan = quick_plan(subjects) if quick else full_plan(subjects, seeds)
    cells = chosen_cells(plan, only)
    gpus = torch.cuda.device_count()
    failures = _train_all(plan, cells, out, quick, workers or gpus or cores(), gpus, progress)
    whole = not quick and only is None and seeds == _SEEDS
    classes = plan.of([subject for subject in subjects if subject != TEXT])
    with one_thread():  # as the students were measured: the classifiers that features come from are trained on the spot
        if any(cell.subject != TEXT for cell in cells):
            all_of_them = whole and set(SUBJECTS[scale]) - {TEXT} <= set(subjects)
            folder = results or (Path("benchmarks/results") if all_of_them else out)
            write_report(classes, out, folder, f"quality-{'quick' if quick else scale}", quick)
        if any(cell.subject == TEXT for cell in cells):
            folder = results or (Path("benchmarks/results") if whole else out)
            write_text_report(plan.of([TEXT]), out, folder, f"quality-{TEXT}{'-quick' if quick else ''}", quick)
    if failures:
        raise InputError(f"bench quality: {len(failures)} students failed: " + "; ".join(failures))


def chosen_cells(plan: Plan, only: str | None) -> list[Cell]:
    """The cells of settings whose names match, and those that they go on from; None: all.

    Raises:
        InputError: no setting matches.
    """
    if only is None:
        return list(plan.cells)
    names = {cell.name for cell in plan.cells if fnmatchcase(cell.setting.name, only)}
    if not names:
        settings = ", ".join(dict.fromkeys(cell.setting.name for cell in plan.cells))
        raise InputError(f"bench quality: no setting matches {only!r}; expected some of {settings}")
    names |= {base for cell in plan.cells if cell.name in names and (base := base_of(cell)) is not None}
    return [cell for cell in plan.cells if cell.name in names]


def _train_all(plan: Plan, cells: list[Cell], out: Path, quick: bool, workers: int, gpus: int, progress: bool) -> list[str]:
    """Make all cells, each after the one it goes on from; returns the messages of those that failed."""
    failures: list[str] = []
    tasks = tasks_of(cells)
    schedule = Schedule(needs_of(tasks))
    with (
        _pool(workers, gpus) as pool,
        tqdm(total=sum(_updates(plan, cell) for cell in cells), desc="students", unit="update", disable=not progress) as bar,
    ):
        pending: dict[Future[Any], str] = {}
        while True:
            # Only as many as there are workers, so that what becomes ready first does not overtake the plan's order.
            while len(pending) < workers and (taken := schedule.take()) is not None:
                task = tasks[taken]
                work = _run_errand if isinstance(task, Errand) else _make
                pending[pool.submit(work, plan.budgets[task.subject], task, out, quick)] = taken  # type: ignore[arg-type]
            if not pending:
                break
            done, _ = wait(pending, timeout=2.0, return_when=FIRST_COMPLETED)
            for future in done:
                name = pending.pop(future)
                error = future.exception()
                if error is None:
                    schedule.done(name)
                    continue
                failures.append(f"{name}: {error}")
                bar.write("".join(traceback.format_exception(error)))
            bar.update(sum(_updates_done(plan, cell, out) for cell in cells) - bar.n)
    return failures + [f"{name}: skipped, because {cause} failed" for name, cause in schedule.left.items()]


@contextmanager
def _pool(workers: int, gpus: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end when this one is asked to: each writes a checkpoint of what it trains, and starts nothing new."""
    context = get_context("spawn")
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)

    def end(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(numbers, gpus))
    try:
        yield pool
    except KeyboardInterrupt:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Results that depend on how many threads shared the work come from one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _begin(numbers: Any, gpus: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent passes it on as SIGTERM
    number = numbers.get()
    if gpus:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = given.split(",") if given else [str(index) for index in range(gpus)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % gpus]  # before this process first asks for one


_WORKSHOPS: dict[str, Workshop] = {}  # of this process, by subject


def _workshop(subject: str, budget: Budget, out: Path, quick: bool) -> Workshop:
    if subject not in _WORKSHOPS:
        _WORKSHOPS[subject] = open_workshop(subject, budget, out, quick)
    return _WORKSHOPS[subject]


def _run_errand(budget: Budget, errand: Errand, out: Path, quick: bool) -> None:
    getattr(_workshop(errand.subject, budget, out, quick), errand.method)(*errand.arguments)


def _make(budget: Budget, cell: Cell, out: Path, quick: bool) -> dict[str, Any]:
    try:
        return run_cell(_workshop(cell.subject, budget, out, quick), cell)
    except Preempted as ended:
        os._exit(
            ended.code if isinstance(ended.code, int) else PREEMPTED_STATUS
        )  # else the pool would hand this process the next student


def _updates(plan: Plan, cell: Cell) -> int:
    return max(1, round(plan.budgets[cell.subject].updates * cell.setting.updates))


def _updates_done(plan: Plan, cell: Cell, out: Path) -> int:
    if read_result(out / cell.name / "result.json") is not None:
        return _updates(plan, cell)
    log = read_log(out / cell.name / "run" / "log.jsonl")
    return int(log[-1]["step"]) if log else 0
