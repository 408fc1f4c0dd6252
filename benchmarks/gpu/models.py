"""The whole DiT-XL/2 student: a training step, 4-step sampling, and the teacher's 25 guided steps that these replace.

B batch, S num_steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.backends import attention_backends
from benchmarks.gpu.kernels_taken import attentions_of
from benchmarks.gpu.measure import Results, Setting, peak_memory, time_call
from benchmarks.gpu.students import (
    NaiveStudent,
    checkpoint_blocks,
    new_student,
    new_teacher,
    pass_flops,
    teacher_flops,
    weight_bytes,
)
from pyard import ops
from pyard.diffusion.solvers import integrate
from pyard.models.student import Student
from pyard.teachers.guidance import guided_prediction


def training(results: Results, setting: Setting) -> None:
    """Forward, backward and AdamW as the recipes train: float32 weights under bfloat16 autocast, teacher-forced."""
    for B, recomputes in _training_sizes(setting):
        for backend in attention_backends():
            _measure_training(results, setting, B, recomputes, backend)
        results.measure(
            f"batch {B}{_recomputed(recomputes)}, naive",
            partial(_train, setting, B, recomputes, "reference", "naive"),
            needs_s=4.0,
        )


def training_compiled(results: Results, setting: Setting) -> None:
    """The same with compiled blocks."""
    for B, recomputes in _training_sizes(setting):
        for backend in reversed(attention_backends()):
            _measure_training(results, setting, B, recomputes, backend, compiled=True)


def _training_sizes(setting: Setting) -> list[tuple[int, bool]]:
    return [(2, False), (2, True)] if setting.smoke else [(16, False), (64, True)]


def _recomputed(recomputes: bool) -> str:
    return " with activation checkpointing" if recomputes else ""


def _measure_training(
    results: Results, setting: Setting, B: int, recomputes: bool, backend: ops.Backend, compiled: bool = False
) -> None:
    name = f"batch {B}{_recomputed(recomputes)}, {backend}{', compiled blocks' if compiled else ''}"
    way = "compiled" if compiled else "eager"
    results.measure(
        name, partial(_train, setting, B, recomputes, backend, way), needs_s=20.0 if compiled else 4.0 if B < 64 else 8.0
    )


def _train(setting: Setting, B: int, recomputes: bool, backend: ops.Backend, way: str) -> dict[str, Any]:
    torch.manual_seed(0)
    device = setting.device
    student = new_student(setting, torch.float32).train()
    network: nn.Module = student
    if way == "naive":
        network = NaiveStudent(student, recomputes)
    else:
        if way == "compiled":
            compile_blocks(student, setting)
        if recomputes:
            checkpoint_blocks(student.trunk.blocks)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    history, target = (torch.randn(B, student.num_steps, *student.sample_shape, device=device) for _ in range(2))
    labels = torch.randint(student.num_conditions, (B,), device=device)
    condition = labels if way == "naive" else student.as_condition(labels)

    def forward() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return (network(history, condition).float() - target).square().mean()

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with ops.use_backend(backend), peak_memory(device) as peak:
        taken = attentions_of(forward) if way == "eager" else ""
        time = time_call(step, device, graph=False, budget_s=1.5)
    return {
        "batch": B,
        **time.row(),
        # What activation checkpointing computes again does not count.
        "gflop": 3 * B * pass_flops(student) / 1e9,
        "samples_per_s": B / time.ms * 1e3,
        **peak,
        "kernels": taken,
    }


def compile_blocks(student: Student, setting: Setting) -> None:
    """Compiles the blocks without a history: one function to the compiler, so it is compiled once, not L times.

    Blocks with a history get a new closure each pass, which the compiler would take for a new function.
    """
    if not setting.smoke:
        torch.compiler.reset()  # else the variants of earlier rows count towards the compiler's limit for one function
        for block in student.trunk.blocks[student.config.history_layers :]:
            block.forward = torch.compile(block.forward, dynamic=False)


def sampling(results: Results, setting: Setting) -> None:
    """The S cached passes of a batch in bfloat16, launched by Python or replayed as one CUDA graph, and the naive student."""
    for B in _sampling_sizes(setting):
        for backend in attention_backends():
            for graph in (True, False):
                _measure_sampling(results, setting, B, backend, graph)
        results.measure(f"batch {B}, naive", partial(_sample_naive, setting, B), needs_s=3.0)


def sampling_compiled(results: Results, setting: Setting) -> None:
    """The same with compiled blocks."""
    for B in _sampling_sizes(setting):
        for backend in reversed(attention_backends()):
            for graph in (True, False):
                _measure_sampling(results, setting, B, backend, graph, compiled=True)


def _sampling_sizes(setting: Setting) -> tuple[int, ...]:
    return (1, 2) if setting.smoke else (1, 64)


def _measure_sampling(
    results: Results, setting: Setting, B: int, backend: ops.Backend, graph: bool, compiled: bool = False
) -> None:
    name = f"batch {B}, {backend}{', compiled blocks' if compiled else ''}{', CUDA graph' if graph else ''}"
    results.measure(name, partial(_sample, setting, B, backend, graph, compiled), needs_s=10.0 if compiled else 2.5)


def _sample(setting: Setting, B: int, backend: ops.Backend, graph: bool, compiled: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    student = new_student(setting, setting.half).eval()
    noise, labels = _inputs(student, B, setting)
    condition = student.as_condition(labels)
    cache = student.new_cache(B)
    if compiled:
        compile_blocks(student, setting)

    def rollout() -> Tensor:
        *_, sample = student.rollout(noise, condition, cache)
        return sample

    with torch.no_grad(), ops.use_backend(backend), peak_memory(setting.device) as peak:
        taken = "" if compiled else attentions_of(rollout)
        time = time_call(rollout, setting.device, graph=graph)
    return {**_sampling_row(student, B, time.row(), time.ms), **peak, "kernels": taken}


def _sample_naive(setting: Setting, B: int) -> dict[str, Any]:
    student = new_student(setting, setting.half).eval()
    naive = NaiveStudent(student)
    noise, labels = _inputs(student, B, setting)
    with torch.no_grad(), peak_memory(setting.device) as peak:
        time = time_call(lambda: naive.rollout(noise, labels), setting.device, graph=False)
    return {**_sampling_row(student, B, time.row(), time.ms), **peak}


def _inputs(student: Student, B: int, setting: Setting) -> tuple[Tensor, Tensor]:
    noise = torch.randn(B, *student.sample_shape, device=setting.device, dtype=setting.half)
    return noise, torch.randint(student.num_conditions, (B,), device=setting.device)


def _sampling_row(student: Student, B: int, time: dict[str, Any], ms: float) -> dict[str, Any]:
    return {
        "batch": B,
        **time,
        "gflop": B * pass_flops(student) / 1e9,
        "gb": student.num_steps * weight_bytes(student) / 1e9,  # every pass reads them
        "images_per_s": B / ms * 1e3,
    }


def teacher(results: Results, setting: Setting) -> None:
    """DDIM with 25 steps and guidance, two passes a step, in bfloat16: what the student's 4 passes replace."""
    steps = 3 if setting.smoke else 25

    def run(B: int, graph: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        who = new_teacher(setting, setting.half)
        noise = torch.randn(B, *who.sample_shape, device=setting.device, dtype=setting.half)
        numbers = torch.randint(who.conditions.count, (B,), device=setting.device)
        condition, null = who.conditions.take(numbers), who.conditions.take(who.conditions.null(numbers))

        def predict(x: Tensor, time: float) -> Tensor:
            return guided_prediction(who, x.to(setting.half), time, condition, null, 1.5)  # the solver's states are float32

        def walk() -> Tensor:
            *_, (sample, _) = integrate(predict, who.schedule, noise, steps)
            return sample

        with torch.no_grad():
            time = time_call(walk, setting.device, graph=graph)
        flops = 2 * steps * B * teacher_flops(who)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in who.network.parameters())
        return {"batch": B, **time.row(), "gflop": flops / 1e9, "gb": steps * weights / 1e9, "images_per_s": B / time.ms * 1e3}

    for B in _sampling_sizes(setting):
        for graph in (True, False):
            results.measure(
                f"batch {B}{', CUDA graph' if graph else ''}", partial(run, B, graph), needs_s=3.0 if B < 64 else 10.0
            )
