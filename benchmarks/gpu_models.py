"""The whole DiT-XL/2 student on a GPU: a training step and 4-step sampling, with torch.compile and CUDA graphs.

B batch, S num_steps, T tokens_per_step, D hidden size, L depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_operators import dtype_of
from benchmarks.gpu_timing import Results, median_ms, options
from pyard import ops
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.models.dit.network import DiTConfig
from pyard.models.student import Student, StudentConfig


def new_student(device: str, smoke: bool) -> Student:
    """The paper's N, all else as `pyard.train` makes it; every parameter random: zeros would be quicker than life."""
    network = DiTConfig(
        input_size=8 if smoke else 32,
        in_channels=4,
        patch_size=2,
        hidden_size=64 if smoke else 1152,
        depth=3 if smoke else 28,
        num_heads=2 if smoke else 16,
        num_classes=1000,
    )
    schedule = NoiseSchedule()
    config = StudentConfig(
        network,
        TimeGrid.build(schedule, 4, 25),
        schedule,
        history_layers=2 if smoke else 6,
        target="state",
        output="jump",
        history_bias=0.0,  # drawn at random below, as all else: what costs time is that there is one
    )
    with torch.device(device):  # 675 million random numbers are the work of seconds on a CPU
        student = Student(config)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.normal_(std=0.02)
    return student.to(device, dtype_of(smoke))


def pass_flops(student: Student) -> float:
    """Of one sample's S forward passes: linear layers and attention, a multiply-add counted as two."""
    network, S = student.config.network, student.num_steps
    T, D, L = network.tokens_per_step, network.hidden_size, network.depth
    linear = S * T * L * 2 * (4 + 2 * network.mlp_ratio) * D * D
    modulation = S * L * 2 * 6 * D * D
    history = student.config.history_layers
    blocks_seen = history * S * (S + 1) / 2 + (L - history) * S
    return linear + modulation + blocks_seen * 4 * T * T * D


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """Fills in `peak_memory_gb`, of all that torch allocates inside the block and what was there before."""
    peak: dict[str, float] = {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield peak
    if device == "cuda":
        peak["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9


def compile_blocks(student: Student, first: int) -> None:
    """All blocks from `first` on are one function to the compiler, so it is compiled once, not L times."""
    for block in student.trunk.blocks[first:]:
        block.compile(dynamic=False)


def training(results: Results, device: str, smoke: bool) -> None:
    """Forward, backward and AdamW in bfloat16, teacher-forced, without gradient checkpointing."""
    B = 2 if smoke else 16

    def run(backend: ops.Backend, compiled: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        student = new_student(device, smoke).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0, fused=device == "cuda")
        history, target = (
            torch.randn(B, student.num_steps, *student.sample_shape, device=device, dtype=dtype_of(smoke)) for _ in range(2)
        )
        labels = torch.randint(student.num_classes, (B,), device=device)
        if compiled:
            # Blocks with a history get a new closure each pass, which the compiler would take for a new function.
            compile_blocks(student, student.config.history_layers)

        def step() -> None:
            loss = (student(history, labels).float() - target.float()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        with ops.use_backend(backend), peak_memory(device) as peak:
            ms = median_ms(step, device, budget_s=2.0)
        return {"batch": B, "ms": ms, "gflop": 3 * B * pass_flops(student) / 1e9, **peak}

    for name, backend, compiled in _ways(smoke):
        results.measure(name, partial(run, backend, compiled))


def sampling(results: Results, device: str, smoke: bool) -> None:
    """The S cached passes of a batch, queued by Python and replayed as one CUDA graph."""

    def run(backend: ops.Backend, compiled: bool, B: int, graph: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        student = new_student(device, smoke).eval()
        noise = torch.randn(B, *student.sample_shape, device=device, dtype=dtype_of(smoke))
        labels = torch.randint(student.num_classes, (B,), device=device)
        cache = student.new_cache(B)
        if compiled:
            compile_blocks(student, student.config.history_layers)

        def rollout() -> torch.Tensor:
            *_, sample = student.rollout(noise, labels, cache)
            return sample

        with torch.no_grad(), ops.use_backend(backend), peak_memory(device) as peak:
            call: Callable[[], object] = rollout
            if graph and device == "cuda":
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(3):
                        rollout()
                torch.cuda.current_stream().wait_stream(stream)
                recorded = torch.cuda.CUDAGraph()
                with torch.cuda.graph(recorded):
                    rollout()
                call = recorded.replay
            ms = median_ms(call, device)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in student.trunk.parameters())
        return {
            "batch": B,
            "ms": ms,
            "gflop": B * pass_flops(student) / 1e9,
            "gb": student.num_steps * weights / 1e9,  # every pass reads them
            "images_per_s": B / ms * 1e3,
            **peak,
        }

    for B in (1, 2) if smoke else (1, 64):
        for name, backend, compiled in _ways(smoke):
            for graph in (False, True):
                label = f"batch {B} {name}" + (", CUDA graph" if graph else "")
                results.measure(label, partial(run, backend, compiled, B, graph))


def _ways(smoke: bool) -> list[tuple[str, ops.Backend, bool]]:
    ways: list[tuple[str, ops.Backend, bool]] = [("plain", "reference", False), ("native", "native", False)]
    if not smoke:
        ways += [("plain, compiled blocks", "reference", True), ("native, compiled blocks", "native", True)]
    return ways


def main() -> None:
    """Runs both parts."""
    arguments = options(__doc__ or "")
    for step, part in (("sampling", sampling), ("training", training)):
        path = arguments.out.with_name(f"{arguments.out.stem}_{step}.json")
        part(Results(path, step), arguments.device, arguments.smoke)


if __name__ == "__main__":
    main()
