"""What the models' sections run: DiT-XL/2 as student and as teacher, random throughout, and the student written the usual way.

B batch, S num_steps, T tokens_per_step, D hidden size, H heads, Dh head size, L depth.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.measure import Setting
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import Block, DiT, Head, Trunk
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig
from pyard.teachers.network_teacher import NetworkTeacher

M = TypeVar("M", bound=nn.Module)


def network_sizes(smoke: bool, out_channels: int | None = None) -> DiTConfig:
    """DiT-XL/2 at 256 pixels."""
    return DiTConfig(
        input_size=8 if smoke else 32,
        in_channels=4,
        out_channels=out_channels,
        patch_size=2,
        hidden_size=64 if smoke else 1152,
        depth=3 if smoke else 28,
        num_heads=2 if smoke else 16,
        num_classes=1000,
    )


def new_student(setting: Setting, dtype: torch.dtype) -> Student:
    """The paper's N, all else as `pyard.train` makes it; every parameter random: zeros would be quicker than life."""
    schedule = NoiseSchedule()
    config = StudentConfig(
        network_sizes(setting.smoke),
        TimeGrid.build(schedule, 4, 25),
        schedule,
        history_layers=2 if setting.smoke else 6,
        target="state",
        output="jump",
        history_bias=0.0,  # drawn at random below, as all else: what costs time is that there is one
    )
    with torch.device(setting.device):  # 675 million random numbers are the work of seconds on a CPU
        student = Student(config)
    return randomise(student).to(setting.device, dtype)


def new_teacher(setting: Setting, dtype: torch.dtype) -> NetworkTeacher:
    """DiT-XL/2 with a predicted variance, as published."""
    with torch.device(setting.device):
        network = DiT(network_sizes(setting.smoke, out_channels=8))
    teacher = NetworkTeacher(randomise(network).to(setting.device, dtype), NoiseSchedule())
    teacher.fingerprint = "random weights"  # hashing 2.7 GB takes seconds
    return teacher


def randomise(module: M) -> M:
    """Draws all parameters anew; returns the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module


def pass_flops(student: Student) -> float:
    """Of one sample's S forward passes: the blocks' linear layers and attentions, a multiply-add counted as two."""
    steps, history = student.num_steps, student.config.history_layers
    network = sizes_of(student)
    attention = 4 * network.tokens_per_step**2 * network.hidden_size
    return steps * _network_flops(network) + history * (steps * (steps + 1) / 2 - steps) * attention


def teacher_flops(teacher: NetworkTeacher) -> float:
    """Of one sample's forward pass; guidance takes two."""
    network = teacher.network.config
    assert isinstance(network, DiTConfig)
    return _network_flops(network)


def sizes_of(student: Student) -> DiTConfig:
    """Of the student's network."""
    network = student.config.network
    assert isinstance(network, DiTConfig)
    return network


def _network_flops(network: DiTConfig) -> float:
    T, D, L = network.tokens_per_step, network.hidden_size, network.depth
    return L * (T * 2 * (4 + 2 * network.mlp_ratio) * D * D + 2 * 6 * D * D + 4 * T * T * D)


def weight_bytes(student: Student) -> int:
    """Of the trunk, which every pass reads."""
    return sum(parameter.numel() * parameter.element_size() for parameter in student.trunk.parameters())


def checkpoint_blocks(blocks: nn.ModuleList) -> None:
    """Keeps only the inputs of the blocks and computes the rest again in the backward pass, as `pyard.train` can."""
    for block in blocks:
        forward = block.forward

        def recomputed(*inputs: object, forward: object = forward) -> Tensor:
            return checkpoint(forward, *inputs, use_reentrant=False)

        block.forward = recomputed


class NaiveStudent(nn.Module):
    """The same student written the usual way: one sequence of S T tokens, a dense mask in every layer, adaLN for every token.

    Sampling passes the whole sequence so far at every step. In its favour, the mask is built once and kept on the device.

    Args:
        student: whose weights it takes.
        recomputes: whether blocks keep only their inputs for the backward pass.
    """

    masks: Tensor

    def __init__(self, student: Student, recomputes: bool = False):
        super().__init__()
        self.student, self.recomputes = student, recomputes
        T = sizes_of(student).tokens_per_step
        step = torch.arange(student.num_steps * T) // T
        causal, diagonal = step[:, None] >= step[None, :], step[:, None] == step[None, :]
        masks = torch.stack([causal, diagonal])  # of the lower and of the upper layers
        weight = next(student.parameters())
        self.register_buffer("masks", torch.where(masks, 0.0, -torch.inf).to(weight), persistent=False)

    def forward(self, history: Tensor, labels: Tensor) -> Tensor:  # [B, s, C, H, W], [B] -> [B, s, C, H, W]
        """The first s steps; s = S in training."""
        trunk, history_layers = self.student.trunk, self.student.config.history_layers
        assert isinstance(trunk, Trunk)
        T, steps = sizes_of(self.student).tokens_per_step, history.shape[1]
        x = trunk.embed(history.to(next(trunk.parameters()).dtype)).flatten(1, 2)  # [B, s T, D]
        condition = trunk.step_vectors(self.student.embed_times[None, :steps], labels).repeat_interleave(T, dim=1)
        for layer, block in enumerate(trunk.dit_blocks):
            inputs = block, x, condition, self.masks[int(layer >= history_layers), : steps * T, : steps * T]
            x = checkpoint(_naive_block, *inputs, use_reentrant=False) if self.recomputes else _naive_block(*inputs)
        pieces = zip(self.student.heads, x.split(T, dim=1), condition.split(T, dim=1), strict=False)
        tokens = torch.stack([_naive_head(cast(Head, head), *rest) for head, *rest in pieces], dim=1)
        out = trunk.unembed(tokens, self.student.sample_shape)
        jumps = self.student.jumps[:steps]
        return torch.stack([a * history[:, s].float() + b * out[:, s].float() for s, (a, b) in enumerate(jumps)], dim=1)

    def rollout(self, noise: Tensor, labels: Tensor) -> Tensor:  # [B, C, H, W]
        """The sample, from the whole sequence at every step."""
        history = noise[:, None]
        for _ in range(self.student.num_steps):
            latest = self(history, labels)[:, -1:]
            history = torch.cat([history, latest.to(history)], dim=1)
        return history[:, -1]


def _naive_block(block: Block, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:  # [B, s T, D] twice
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition).chunk(6, dim=-1)
    D = (x.shape[-1],)
    normal = F.layer_norm(x, D, eps=block.eps) * (1 + scale1) + shift1
    attention = block.attention
    q, k, v = attention.qkv(normal).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
    x = x + gate1 * attention.proj(out.transpose(1, 2).flatten(2))
    normal = F.layer_norm(x, D, eps=block.mlp_eps) * (1 + scale2) + shift2
    return x + gate2 * block.fc2(F.gelu(block.fc1(normal), approximate="tanh"))


def _naive_head(head: Head, x: Tensor, condition: Tensor) -> Tensor:  # [B, T, D] twice -> [B, T, P P C]
    shift, scale = head.modulation(condition).chunk(2, dim=-1)
    return head.linear(F.layer_norm(x, (x.shape[-1],), eps=head.eps) * (1 + scale) + shift)
