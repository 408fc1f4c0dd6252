"""Text-to-image students over diffusers' PixArt transformer: the network of PixArt-XL/2 at 512 pixels, random throughout.

diffusers is the machine's, or what `make gpu-carry` has put into `build/gpu-carry/site`. B batch, S num_steps.
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import NotTakenError, Results, Setting, peak_memory, time_call
from benchmarks.gpu.students import randomise, weight_bytes
from pyard.conditions import Condition
from pyard.cost.flops import student_flops
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig

CARRIED = Path("build/gpu-carry/site")
TEXT_TOKENS = 300  # of PixArt-Sigma's T5


def text_to_image(results: Results, setting: Setting) -> None:
    """A tiny student against the CPU; then a training step and 4-step sampling at full size."""
    sys.path.append(str(CARRIED.resolve()))
    results.measure("a tiny student, forward and backward, against the CPU", partial(_equals_the_cpu, setting), needs_s=2.0)
    for B, recomputes in ((1, False),) if setting.smoke else ((4, False), (16, True)):
        name = f"training, batch {B}{' with activation checkpointing' if recomputes else ''}"
        results.measure(name, partial(_train, setting, B, recomputes), needs_s=6.0)
    for B in (1,) if setting.smoke else (1, 16):
        for graph in (True, False):
            name = f"4 steps, batch {B}{', CUDA graph' if graph else ''}"
            results.measure(name, partial(_sample, setting, B, graph), needs_s=4.0)


def _student(device: str, tiny: bool) -> Student:
    try:
        from diffusers import PixArtTransformer2DModel
    except ImportError as error:
        raise NotTakenError(f"no diffusers here: {error}") from error
    from pyard.models.pixart.network import PixArt

    with torch.device(device):
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2 if tiny else 16,
            attention_head_dim=16 if tiny else 72,
            num_layers=3 if tiny else 28,
            cross_attention_dim=32 if tiny else 1152,
            caption_channels=24 if tiny else 4096,
            sample_size=8 if tiny else 64,
            in_channels=4,
            out_channels=4,
            use_additional_conditions=False,
        )
    schedule = NoiseSchedule()
    network = PixArt.wrap(transformer, (4, 8, 8) if tiny else (4, 64, 64), time_scale=1.0)
    config = StudentConfig(
        network.config, TimeGrid.build(schedule, 4, 20), schedule, history_layers=2 if tiny else 7, output="jump",
        heads="shared", history_bias=0.0, family="pixart",
    )  # fmt: skip
    return randomise(Student(config, network.trunk, network.head)).to(device)


def _condition(student: Student, B: int, device: str) -> Condition:
    transformer: Any = student.trunk.transformer
    width = int(transformer.config.caption_channels)
    lengths = torch.arange(B, device=device) * 17 % (TEXT_TOKENS // 2) + TEXT_TOKENS // 2
    mask = torch.arange(TEXT_TOKENS, device=device) < lengths[:, None]
    return Condition({"tokens": torch.randn(B, TEXT_TOKENS, width, device=device), "mask": mask})


def _equals_the_cpu(setting: Setting) -> dict[str, Any]:
    torch.manual_seed(0)
    expected = _student("cpu", tiny=True)
    history, condition = torch.randn(2, 4, *expected.sample_shape), _condition(expected, 2, "cpu")
    found = copy.deepcopy(expected).to(setting.device)
    outputs = []
    for student in (expected, found):
        device = student.embed_times.device
        output = student(history.to(device), Condition({name: tensor.to(device) for name, tensor in condition.items()}))
        output.square().mean().backward()
        gradient = torch.cat([p.grad.flatten().cpu() for p in student.trunk.parameters() if p.grad is not None])
        outputs.append((output.detach().cpu(), gradient))
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(*outputs, strict=True)]
    return {"forward_error": errors[0], "gradient_error": errors[1]}


def _train(setting: Setting, B: int, recomputes: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    device = setting.device
    student = _student(device, setting.smoke).train()
    if recomputes:
        from pyard.training.regression import checkpoint_activations

        checkpoint_activations(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    history, target = (torch.randn(B, student.num_steps, *student.sample_shape, device=device) for _ in range(2))
    condition = _condition(student, B, device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = (student(history, condition).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with peak_memory(device) as peak:
        time = time_call(step, device, graph=False, budget_s=1.5)
    # What activation checkpointing computes again does not count.
    return {"batch": B, **time.row(), "gflop": 3 * B * _pass_flops(student) / 1e9, "samples_per_s": B / time.ms * 1e3, **peak}


def _sample(setting: Setting, B: int, graph: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    student = _student(setting.device, setting.smoke).eval().to(setting.half)
    noise = torch.randn(B, *student.sample_shape, device=setting.device, dtype=setting.half)
    condition = _condition(student, B, setting.device)
    cache = student.new_cache(B)

    def rollout() -> Tensor:
        *_, sample = student.rollout(noise, condition, cache)
        return sample

    with torch.no_grad(), peak_memory(setting.device) as peak:
        time = time_call(rollout, setting.device, graph=graph)
    gigabytes = student.num_steps * weight_bytes(student) / 1e9
    flops = B * _pass_flops(student) / 1e9
    return {"batch": B, **time.row(), "gflop": flops, "gb": gigabytes, "images_per_s": B / time.ms * 1e3, **peak}


def _pass_flops(student: Student) -> float:
    """Of one sample's S forward passes, counted on the meta device."""
    return float(student_flops(student, _condition(student, 1, "cpu")))
