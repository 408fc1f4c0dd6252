"""A whole training step of a DiT-S/2 student: pyard's, the same in plain PyTorch, and the way it is usually written.

The usual way gives every layer a dense additive mask over all S * T tokens and evaluates adaLN for every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Measurement
from pyard.cost.flops import update_flops
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import Block, Head, Trunk, unpatchify
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig
from pyard.ops import Backend, use_backend, visible_steps

B, S, N = 4, 4, 6
DIT_S_2 = DiTConfig(input_size=32, in_channels=4, patch_size=2, hidden_size=384, depth=12, num_heads=6, num_classes=1000)


def new_student() -> Student:
    """A DiT-S/2 student whose every parameter was drawn: gates of zero would make work that is no work."""
    schedule = NoiseSchedule()
    # Not the defaults: the usual way below has no history bias, and its outputs are the predictions themselves.
    student = Student(
        StudentConfig(
            DIT_S_2, TimeGrid.build(schedule, S, 25), schedule, history_layers=N, mask="causal", history_bias=None,
            heads="per_step", target="denoised", output="direct",
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return student


class NaiveStudent(nn.Module):
    """The same function of the same parameters, written the usual way."""

    history_mask: Tensor
    own_mask: Tensor

    def __init__(self, student: Student):
        super().__init__()
        self.student = student
        assert isinstance(student.trunk, Trunk)
        T = student.trunk.tokens_per_step()
        for name, mask in (("history_mask", student.config.mask), ("own_mask", "diagonal")):
            dense = torch.full((S, T, S, T), -math.inf)
            for step in range(S):
                dense[step, :, visible_steps(mask, step)] = 0
            self.register_buffer(name, dense.view(S * T, S * T))

    def forward(self, history: Tensor, labels: Tensor) -> Tensor:  # [B, S, C, H, W], [B] -> [B, S, C, H, W]
        student, config = self.student, DIT_S_2
        assert isinstance(student.trunk, Trunk)
        T = config.tokens_per_step
        condition = student.trunk.step_vectors(student.embed_times[None], labels).repeat_interleave(T, dim=1)  # [B, S*T, D]
        x = student.trunk.embed(history).flatten(1, 2)  # [B, S*T, D]
        for layer, block in enumerate(student.trunk.dit_blocks):
            x = self._block(block, x, condition, self.history_mask if layer < N else self.own_mask)
        tokens = [
            self._head(cast(Head, head), x[:, s * T : (s + 1) * T], condition[:, s * T : (s + 1) * T])
            for s, head in enumerate(student.heads)
        ]
        return unpatchify(torch.stack(tokens, dim=1), config.patch_size, config.in_channels)

    def _block(self, block: Block, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition).chunk(6, dim=-1)
        qkv = block.attention.qkv(self._norm(x, shift1, scale1, block.eps))
        q, k, v = qkv.unflatten(-1, (3, block.attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + gate1 * block.attention.proj(heads.transpose(1, 2).flatten(2))
        hidden = F.gelu(block.fc1(self._norm(x, shift2, scale2, block.eps)), approximate="tanh")
        return x + gate2 * block.fc2(hidden)

    def _head(self, head: Head, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = head.modulation(condition).chunk(2, dim=-1)
        return head.linear(self._norm(x, shift, scale, head.eps))

    @staticmethod
    def _norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def training_step() -> tuple[Measurement, dict[str, Callable[[], object]]]:
    """Forward, backward and AdamW, for every rival on its own copy."""
    history, target = torch.randn(2, B, S, 4, 32, 32).unbind(0)
    labels = torch.randint(1000, (B,))
    first = new_student()
    with torch.no_grad():
        difference = (first(history, labels) - NaiveStudent(first)(history, labels)).abs().max().item()
    assert difference < 1e-3, f"the rivals compute different things: {difference}"

    def step(model: nn.Module, backend: Backend) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)

        def run() -> None:
            with use_backend(backend):
                loss = F.mse_loss(model(history, labels), target)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    rivals = {
        "pyard": step(new_student(), "auto"),
        "pyard, plain PyTorch": step(new_student(), "reference"),
        "naive": step(NaiveStudent(new_student()), "reference"),
    }
    # Useful ones: no masked-out logit, and adaLN once per (sample, step).
    flops = update_flops(first, B)
    return Measurement("training step, DiT-S/2 student, batch 4", "pyard", flops=flops, aim={"naive": 2.2}), rivals
