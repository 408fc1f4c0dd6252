"""The adversarial stage of ARD: regression goes on, and discriminators compare the student's last prediction with real data.

They look at both through a frozen teacher, at a random noise level. Generator and discriminators change together, by gradients
taken at the same weights.

    B batch of this process · S steps · [C, ...] sample shape · T tokens · D hidden · K blocks looked at
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pyard.conditions import Condition, Conditions, as_condition
from pyard.data.real_data import RealReader
from pyard.errors import InputError
from pyard.models.discriminator import Discriminator
from pyard.models.student import Student
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.training.adversarial_config import AdversarialConfig
from pyard.training.adversarial_cost import adversarial_flops, looked_at
from pyard.training.config import TrainConfig
from pyard.training.processes import Processes, seed_of
from pyard.training.regression import Measured, Regression
from pyard.trajectories import TrajectoryBatch

_LEVELS, _WEIGHTS = 1, 2  # what is drawn, as a part of its seed


class Features:
    """What a frozen teacher makes of noised samples.

    Args:
        teacher: on its device.
        config: noise levels and blocks.
    """

    def __init__(self, teacher: NetworkTeacher, config: AdversarialConfig):
        self.blocks = looked_at(teacher.network, config)
        self.teacher, self.range = teacher, config.noise_levels

    def draw_times(self, count: int, random: torch.Generator) -> list[float]:
        """`count` times of the teacher's schedule, uniform in the range of noise levels."""
        low, high = self.range
        shares = (low + (high - low) * torch.rand(count, generator=random, dtype=torch.float64)).tolist()
        schedule = self.teacher.schedule
        if schedule.kind == "flow":
            return shares
        return [float(round(share * schedule.noisiest_time)) for share in shares]

    def __call__(
        self,
        clean: torch.Tensor,  # [B, C, ...]
        noise: torch.Tensor,  # [B, C, ...]
        times: list[float],  # B
        condition: Condition | torch.Tensor,  # B rows, or class labels
    ) -> tuple[list[torch.Tensor], torch.Tensor]:  # K times [B, T, D] and the conditioning [B, E]
        condition = as_condition(condition)
        schedule, network = self.teacher.schedule, self.teacher.network
        alpha, sigma = (
            torch.tensor([f(time) for time in times], device=clean.device).view(-1, *[1] * (clean.ndim - 1))
            for f in (schedule.alpha, schedule.sigma)
        )
        at = torch.tensor(times, device=clean.device)
        vectors = network.trunk.conditioning(at, condition)
        seen = network.trunk.features(alpha * clean + sigma * noise, at, condition, network.head, self.blocks)
        return [x.float() for x in seen], vectors.float()


@dataclass(frozen=True)
class _Sides:
    """What the discriminators are shown in an update, this process's share."""

    times: list[float]
    fake_noise: torch.Tensor
    real_noise: torch.Tensor


class Adversarial(Regression):
    """Regression and the adversarial loss (implements `Stage`).

    Args:
        config: settings; those of the stage are `config.adversarial`.
        student: on its device, as the regression stage left it.
        processes: who trains.
        teacher: on the same device; frozen.
        real: real data, whose position is kept in the checkpoint.
        conditions: that the labels of the real data are numbers of; None: the teacher's.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Student,
        processes: Processes,
        teacher: NetworkTeacher,
        real: RealReader,
        conditions: Conditions | None = None,
    ):
        super().__init__(config, student, processes)
        settings = self.settings = config.adversarial
        share = config.batch_size // processes.world
        if share % settings.virtual_batch:
            raise InputError(
                f"adversarial: a process's share of a batch is {share}; expected a multiple of virtual_batch "
                f"{settings.virtual_batch}, so that virtual batches are the same on any number of processes"
            )
        trunk = teacher.network.trunk
        tokens = trunk.tokens_per_step(tuple(real.data.shards[0]["images"].shape[1:]))
        if settings.depth and settings.kernel_size // 2 > tokens:
            raise InputError(
                f"adversarial: kernel_size {settings.kernel_size} reaches {settings.kernel_size // 2} tokens to each side, "
                f"more than once around the teacher's {tokens}; lower adversarial.kernel_size to at most {2 * tokens + 1}"
            )
        self.real, self.conditions = real, conditions or teacher.conditions
        self.features = Features(teacher, settings)
        one = teacher.conditions.take([0])
        self.flops += config.batch_size * adversarial_flops(teacher.network, one, settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(config.seed, _WEIGHTS))
            self.discriminator = Discriminator(
                len(self.features.blocks),
                trunk.hidden_size,
                condition_size=trunk.conditioning_size(one),
                width=settings.width,
                depth=settings.depth,
                kernel_size=settings.kernel_size,
                group=settings.virtual_batch,
            ).to(processes.device)
        self.discriminator_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(),
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            weight_decay=0.0,
            fused=True,
        )
        self.parts |= {
            "discriminator": self.discriminator,
            "discriminator-optimizer": self.discriminator_optimizer,
            "real": real,
        }
        self._seen_by_last_linear: torch.Tensor | None = None
        student.trunk.last_linear(student.heads[-1]).register_forward_pre_hook(self._remember)

    def compute(self, step: int, batch: TrajectoryBatch) -> Measured:
        """Gradients of the student and of the discriminators on this process's share of a batch."""
        settings, processes = self.settings, self.processes
        batch = batch.to(processes.device)
        with processes.autocast():
            prediction = self.model(batch.history, batch.condition)  # [B, S, C, ...]
        leaf = prediction.detach().float().requires_grad_()
        regression = self.losses[tuple(leaf.shape[2:])]
        per_step = regression.per_step(leaf, batch.target)
        loss = regression.total(per_step)
        (by_regression,) = torch.autograd.grad(loss, leaf)

        clean = leaf[:, -1].detach().requires_grad_()
        real, labels = (tensor.to(processes.device) for tensor in next(self.real))
        condition = self.conditions.take(labels)
        sides = self._draw(step, clean)
        with processes.autocast():
            fake_seen, fake_condition = self.features(clean, sides.fake_noise, sides.times, batch.condition)
        with torch.no_grad(), processes.autocast():
            real_seen, real_condition = self.features(real, sides.real_noise, sides.times, condition)

        generator, distance = self._generator_loss(fake_seen, fake_condition, real_seen, real_condition)
        # Through a float16 teacher, gradients of single tokens would be too small to be anything but 0 without a scale.
        scale = processes.scaler.get_scale()
        (by_discriminators,) = torch.autograd.grad((generator + settings.feature_matching * distance) * scale, clean)
        by_discriminators = by_discriminators / scale
        ratio = self._ratio(by_regression, by_discriminators)
        weight = settings.weight * ratio if step > settings.warmup_steps else torch.zeros_like(ratio)
        total = by_regression
        total[:, -1] += weight * by_discriminators
        prediction.backward(processes.scaler.scale(total).to(prediction.dtype))

        hinge, penalty, gradients = self._discriminate(
            [x.detach() for x in fake_seen], fake_condition.detach(), real_seen, real_condition
        )
        reduced = processes.mean(torch.stack([loss, generator, distance, hinge, penalty, *per_step]).detach())
        names = ("generator", "feature_distance", "discriminator", "r1")
        more = {**dict(zip(names, reduced[1:5], strict=True)), "generator_weight": weight}
        more["discriminator_grad_norm"] = nn.utils.get_total_norm(gradients)
        return Measured(reduced[0], reduced[5:], self._clip(), more)

    def apply(self) -> None:
        """Update the student, its averages and the discriminators."""
        super().apply()
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()

    def skip(self) -> None:
        """Drop all gradients."""
        super().skip()
        self.discriminator_optimizer.zero_grad()

    def _draw(self, step: int, like: torch.Tensor) -> _Sides:
        # Drawn for the samples of all processes, of which each takes its own: how many there are does not matter.
        random = torch.Generator().manual_seed(seed_of(self.config.seed, step, _LEVELS))
        share, rank = len(like), self.processes.rank
        mine = slice(rank * share, (rank + 1) * share)
        count = share * self.processes.world
        times = self.features.draw_times(count, random)[mine]
        fake, real = (torch.randn(count, *like.shape[1:], generator=random)[mine].to(like.device) for _ in range(2))
        return _Sides(times, fake, real)

    def _generator_loss(
        self,
        fake: list[torch.Tensor],
        fake_condition: torch.Tensor,
        real: list[torch.Tensor],
        real_condition: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """- mean D(fake), and the squared distance between the mean hidden features of virtual batches."""
        logits, hidden = self.discriminator(fake, fake_condition)
        if not self.settings.feature_matching:
            return -logits.mean(), torch.zeros((), device=logits.device)
        with torch.no_grad():
            _, hidden_real = self.discriminator(real, real_condition)
        group = self.settings.virtual_batch
        distances = [
            (a.unflatten(0, (-1, group)).mean(dim=(1, 3)) - b.unflatten(0, (-1, group)).mean(dim=(1, 3))).square().mean()
            for a, b in zip(hidden, hidden_real, strict=True)
        ]
        return -logits.mean(), torch.stack(distances).mean()

    def _discriminate(
        self,
        fake: list[torch.Tensor],
        fake_condition: torch.Tensor,
        real: list[torch.Tensor],
        real_condition: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Gradients of the hinge loss (Lim & Ye 2017) and of R1, averaged over the processes; returns both losses and them."""
        penalised = self.settings.r1 > 0
        real = [x.requires_grad_(penalised) for x in real]
        logits_fake, _ = self.discriminator(fake, fake_condition)
        logits_real, _ = self.discriminator(real, real_condition)
        hinge = F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()
        penalty = torch.zeros((), device=hinge.device)
        if penalised:
            slopes = torch.autograd.grad(logits_real.sum(), real, create_graph=True)
            penalty = torch.stack([slope.square().sum(dim=(1, 2)).mean() for slope in slopes]).mean()
        self.discriminator_optimizer.zero_grad()
        weights = list(self.discriminator.parameters())
        gradients = torch.autograd.grad(hinge + self.settings.r1 * penalty, weights)
        flat = self.processes.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for weight, gradient in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
            weight.grad = gradient.view_as(weight).clone()
        return hinge, penalty, [weight.grad for weight in weights if weight.grad is not None]

    def _remember(self, linear: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._seen_by_last_linear = inputs[0].detach()

    def _ratio(self, by_regression: torch.Tensor, by_discriminators: torch.Tensor) -> torch.Tensor:
        """|grad MSE| / (|grad GAN| + 1e-4) at the last head's linear weight, at most `max_ratio`.

        A linear layer's weight gradient is the product of the gradient at its output and its input: neither needs the weight,
        which may be sharded, nor a backward pass of its own.
        """
        student = self.student
        seen = self._seen_by_last_linear
        assert seen is not None
        first = 0 if len(student.heads) == 1 else student.num_steps - 1  # a shared head makes all predictions
        regression = by_regression[:, first:]
        adversarial = torch.zeros_like(regression)
        adversarial[:, -1] = by_discriminators
        norms = []
        for gradient in (regression, adversarial):
            at_output = self._at_output(gradient, first).flatten(0, -2)  # [rows, out]
            local = at_output.T @ seen.flatten(0, -2).float()
            norms.append(self.processes.mean(local).norm())
        return (norms[0] / (norms[1] + 1e-4)).clamp(max=self.settings.max_ratio)

    def _at_output(self, gradient: torch.Tensor, first: int) -> torch.Tensor:
        """A gradient at predictions [B, s, C, ...] of the steps from `first` on, at the last linear layer: [B, s, T, out]."""
        student = self.student
        trunk, sample_shape = student.trunk, tuple(gradient.shape[2:])
        if jumps := student.times.jumps(sample_shape):
            factors = torch.tensor([b for _, b in jumps[first:]], device=gradient.device)
            gradient = gradient * factors.view(1, -1, *[1] * len(sample_shape))
        width = trunk.last_linear(student.heads[-1]).out_features
        rows = gradient.shape[0] * gradient.shape[1]
        tokens = torch.zeros(rows, trunk.tokens_per_step(sample_shape), width, device=gradient.device)
        with torch.enable_grad():
            samples = trunk.unembed(tokens.requires_grad_(), sample_shape)
            (at_tokens,) = torch.autograd.grad(samples, tokens, gradient.flatten(0, 1))
        return at_tokens.unflatten(0, gradient.shape[:2])
