"""The student: the teacher's transformer, run on S noise levels at once, with a history in its lowest N attentions.

Everything but those N attentions sees B*S independent samples, so any pass, parallel (training) or cached (sampling), is the
same few lines with another number of steps.

    B batch · S steps · T tokens per step · D hidden · C channels · N history layers
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from pyard import ops
from pyard.errors import InputError
from pyard.models.checkpoint import without_variance
from pyard.models.dit import Attend, DiT, DiTConfig, Head, Trunk
from pyard.models.folder import load_folder, save_folder
from pyard.models.history import HistoryCache, PreallocatedCache
from pyard.models.hub import local_folder, push_folder
from pyard.models.latents import LatentCodec
from pyard.noise_schedule import NoiseSchedule
from pyard.ops.masks import Mask, check_mask
from pyard.time_grid import Target, TimeGrid

if TYPE_CHECKING:
    from pyard.teachers.dit import DiTTeacher

Output = Literal["direct", "jump"]
Heads = Literal["per_step", "shared"]


@dataclass(frozen=True)
class StudentConfig:
    """What a student is; stored beside its weights.

    Args:
        network: sizes of the transformer; its `out_channels` are the C that the student predicts.
        grid: the jumps, and the times that the embedding sees.
        schedule: the teacher's forward process.
        history_layers: N, how many of the lowest attentions see earlier steps; 0 is step distillation.
        mask: which earlier steps they see: `diagonal` none, `window` the last `window` (own one included), `anchor` the first
            (pure noise), `causal` all (figure 1b of the paper).
        window: steps of the `window` mask, own one included; None for the other masks.
        target: what a step predicts: the ODE `state` at the next grid time, or the teacher's `denoised` prediction.
        output: `direct`, the head's output is the prediction, as in the authors' code: the head is the teacher's, though it now
            has to say something else; it suits `denoised` targets, whose inputs carry no noise to start from. `jump`, it
            enters the teacher's own update a_s u_s + b_s F, so that the untrained student with N = 0 is the teacher's unguided
            DDIM/Euler sampler: training begins from a sampler, not from noise, and needs `state` targets.
        heads: one head `per_step`, or one `shared` by all.
        history_bias: start value of a learned bias per head on the logits of earlier steps' keys, which the teacher never saw:
            strongly negative, it keeps the start of `jump` with N > 0 too; None: no bias.
        teacher_fingerprint: of the teacher that it was made from.
        class_names: of the classes, in order, where the teacher knows them; synonyms are separated by commas.
    """

    network: DiTConfig
    grid: TimeGrid
    schedule: NoiseSchedule
    history_layers: int
    mask: Mask = "causal"
    window: int | None = None
    target: Target = "denoised"
    output: Output = "direct"
    heads: Heads = "per_step"
    history_bias: float | None = None
    teacher_fingerprint: str = ""
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
        for name, kinds in (("target", Target), ("output", Output), ("heads", Heads)):
            if getattr(self, name) not in get_args(kinds):
                raise InputError(f"student: {name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(kinds))}")
        if not 0 <= self.history_layers <= self.network.depth:
            raise InputError(f"student: history_layers is {self.history_layers}; the network has {self.network.depth} layers")
        check_mask(self.mask, self.window)
        if self.output == "jump" and self.target == "denoised":
            raise InputError("student: output 'jump' starts from a state, so it needs target 'state', not 'denoised'")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_json` turns back into an equal configuration."""
        flat = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: value.to_json() if hasattr(value, "to_json") else value for key, value in flat.items()}

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> StudentConfig:
        """The configuration of a `to_json` dictionary."""
        try:
            nested = {
                "network": DiTConfig(**config["network"]),
                "grid": TimeGrid.from_json(config["grid"]),
                "schedule": NoiseSchedule.from_json(config["schedule"]),
            }
            return cls(**{**config, **nested})
        except (KeyError, TypeError) as error:
            raise InputError(f"student: its config.json does not fit this version of pyard: {error}") from None


def default_output(target: Target, num_steps: int) -> Output:
    """`jump` for state targets and three steps or more, else `direct`.

    A student of `jump` starts as the teacher's own sampler of S steps, and ends far closer to the teacher where that sampler is
    any good: measured on the built-in digits, for S = 1, 2 and 4, in `docs/quality.md`.
    """
    return "jump" if target == "state" and num_steps >= 3 else "direct"


class StepConditions(NamedTuple):
    """What conditions the S steps of a rollout, computed at once: see `Student.step_conditions`."""

    vectors: torch.Tensor  # [B, S, D]
    modulations: tuple[torch.Tensor, ...]  # L times [B, S, 6D]

    def of(self, step: int) -> StepConditions:
        """Those of one step."""
        one = slice(step, step + 1)
        return StepConditions(self.vectors[:, one], tuple(modulation[:, one] for modulation in self.modulations))


class Student(nn.Module):
    """A few-step student of a diffusion transformer.

    Args:
        config: what it is. The weights are fresh; `from_teacher` copies a teacher's, `from_pretrained` reads a folder.
        network: the transformer whose trunk it takes and whose head it copies: None, a fresh `DiT`; one of your own needs
            what `docs/own-teacher.md` says.

    Attributes:
        codec: the VAE that turns its samples into images, if the teacher had one.
    """

    embed_times: torch.Tensor

    def __init__(self, config: StudentConfig, network: nn.Module | None = None):
        super().__init__()
        self.config = config
        source: Any = DiT(config.network) if network is None else network
        self.trunk: Any = source.trunk
        num_heads = config.grid.num_steps if config.heads == "per_step" else 1
        self.heads = nn.ModuleList(copy.deepcopy(source.head) for _ in range(num_heads))
        self.register_buffer("embed_times", torch.tensor(config.grid.embed_times, device="cpu"), persistent=False)
        self.codec: LatentCodec | None = None
        if config.history_bias is None:
            self.history_bias = None
        else:
            start = torch.full((config.history_layers, config.network.num_heads), float(config.history_bias))
            self.history_bias = nn.Parameter(start)
        pairs = itertools.pairwise(config.grid.times)
        # (a_s, b_s), Python floats: a is large (157 at S = 1), so the jump is computed in float32 at least.
        self.jumps = [config.schedule.jump_coefficients(*pair) for pair in pairs] if config.output == "jump" else []

    @property
    def num_steps(self) -> int:
        """S."""
        return self.config.grid.num_steps

    @property
    def num_classes(self) -> int:
        """Labels are 0 ... num_classes - 1."""
        return self.config.network.num_classes

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        return self.config.network.sample_shape

    def forward(
        self,
        history: torch.Tensor,  # [B, S, C, H, W], the S inputs
        labels: torch.Tensor,  # [B] int64
    ) -> torch.Tensor:  # [B, S, C, H, W], the S predictions
        """The parallel pass: all steps at once on a given history (teacher forcing)."""
        if history.shape[1:] != (self.num_steps, *self.sample_shape):
            raise InputError(
                f"history of shape {tuple(history.shape)}; expected [B, {self.num_steps}, "
                f"{', '.join(map(str, self.sample_shape))}]"
            )
        return self._run(history, labels, first=0, cache=None)

    def step(
        self,
        latest: torch.Tensor,  # [B, C, H, W]: the noise, or the previous step's prediction
        step: int,
        labels: torch.Tensor,  # [B] int64
        cache: HistoryCache,
        conditions: StepConditions | None = None,  # from `step_conditions(labels)`; None: computed for this step alone
    ) -> tuple[torch.Tensor, HistoryCache]:  # [B, C, H, W]
        """The cached pass: one step on the history in `cache`. Returns the prediction and the cache for the next step."""
        known = None if conditions is None else conditions.of(step)
        prediction = self._run(latest[:, None], labels, first=step, cache=cache, known=known)[:, 0]
        return prediction, cache.advance(self.config.network.tokens_per_step)

    def rollout(
        self,
        noise: torch.Tensor,  # [B, C, H, W]
        labels: torch.Tensor,  # [B] int64
        cache: HistoryCache | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the S successive predictions, each made from the history of its predecessors; the last one is the sample."""
        cache = self.new_cache(len(noise)) if cache is None else cache
        conditions = self.step_conditions(labels)
        latest = noise
        for step in range(self.num_steps):
            latest, cache = self.step(latest, step, labels, cache, conditions)
            yield latest

    def step_conditions(self, labels: torch.Tensor) -> StepConditions | None:  # [B] int64
        """The conditioning vectors and modulations of all S steps, one product for each layer.

        Returns:
            None where a gradient is wanted, so that blocks stay what is recomputed; where weights are sharded, since a block
            gathers its own; and for a trunk that is not pyard's DiT.
        """
        sharded = any(hasattr(weight, "device_mesh") for weight in self.trunk.parameters())  # FSDP2's DTensors
        if torch.is_grad_enabled() or sharded or not isinstance(self.trunk, Trunk):
            return None
        vectors = self.trunk.condition(self.embed_times[None], labels)
        return StepConditions(vectors, self.trunk.modulations(vectors))

    def new_cache(self, batch_size: int) -> PreallocatedCache:
        """An empty cache for `batch_size` samples: keys and values [N, B, H, S*T, Dh] of the parameters' dtype and device."""
        network = self.config.network
        weight = next(self.trunk.parameters())
        size = (
            self.config.history_layers,
            batch_size,
            network.num_heads,
            self.num_steps * network.tokens_per_step,
            network.head_dim,
        )
        keys, values = weight.new_empty(size), weight.new_empty(size)
        return PreallocatedCache(keys, values)

    def _run(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        first: int,
        cache: HistoryCache | None,
        known: StepConditions | None = None,
    ) -> torch.Tensor:
        # inputs [B, steps, C, H, W] are the steps first ... first + steps - 1.
        steps = inputs.shape[1]
        if known is None:
            known = StepConditions(self.trunk.condition(self.embed_times[None, first : first + steps], labels), ())
        condition, modulations = known
        attends = tuple(self._attend(layer, cache) for layer in range(self.config.history_layers))
        tokens = self.trunk.embed(inputs.to(next(self.trunk.parameters()).dtype))
        x = self.trunk(tokens, condition, attends, *([modulations] if modulations else []))
        if len(self.heads) == 1:
            tokens = self.heads[0](x, condition)
        else:
            # Steps first, so that every head multiplies contiguous slices: BLAS rounds strided ones by their address, and a
            # resumed run must repeat every bit.
            x, condition = x.transpose(0, 1).contiguous(), condition.transpose(0, 1).contiguous()
            heads = self.heads[first : first + steps]
            per_step = [head(x[s].unsqueeze(1), condition[s].unsqueeze(1)).squeeze(1) for s, head in enumerate(heads)]
            tokens = torch.stack(per_step).transpose(0, 1)  # [B, steps, T, P*P*C]
        output = self.trunk.unembed(tokens, self.config.network.in_channels)
        if not self.jumps:
            return output
        jumps = self.jumps[first : first + steps]
        exact = torch.promote_types(output.dtype, torch.float32)
        updates = [a * inputs[:, s].to(exact) + b * output[:, s].to(exact) for s, (a, b) in enumerate(jumps)]
        return torch.stack(updates, dim=1)

    def _apply(self, fn: Any, recurse: bool = True) -> Student:
        super()._apply(fn, recurse)
        if self.embed_times.dtype in (torch.bfloat16, torch.float16):
            # 749.25 has no bfloat16: times stay float32 when the weights do not.
            self.embed_times = torch.tensor(self.config.grid.embed_times, device=self.embed_times.device)
        return self

    def _attend(self, layer: int, cache: HistoryCache | None) -> Attend:
        config = self.config
        bias = None if self.history_bias is None else self.history_bias[layer]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if cache is not None:
                k, v = cache.extend(layer, k, v)
            tokens = config.network.tokens_per_step
            return ops.block_attention(q, k, v, tokens, mask=config.mask, window=config.window, bias=bias)

        return attend

    @classmethod
    def from_teacher(
        cls,
        teacher: DiTTeacher,
        grid: TimeGrid,
        *,
        history_layers: int,
        mask: Mask = "causal",
        window: int | None = None,
        target: Target = "state",
        output: Output | None = None,
        heads: Heads = "per_step",
        history_bias: float | None = None,
    ) -> Student:
        """A student with the teacher's weights; heads are copies of the teacher's, less its predicted-variance channels.

        Args:
            teacher: a teacher whose network is a DiT.
            grid: where it jumps; `embed_times` are set for the target (`TimeGrid.for_target`).
            history_layers, mask, window, target, heads, history_bias: see `StudentConfig`.
            output: None: `default_output`; with `target`, better than the published pair that `StudentConfig` stands at.
        """
        sizes = teacher.network.config
        config = StudentConfig(
            network=dataclasses.replace(sizes, out_channels=sizes.in_channels),
            grid=grid.for_target(target),
            schedule=teacher.schedule,
            history_layers=history_layers,
            mask=mask,
            window=window,
            target=target,
            output=output or default_output(target, grid.num_steps),
            heads=heads,
            history_bias=history_bias,
            teacher_fingerprint=teacher.fingerprint,
            class_names=teacher.class_names,
        )
        network = copy.deepcopy(teacher.network).requires_grad_(True)
        if sizes.out_channels != sizes.in_channels:
            with torch.device(teacher.device):
                head = Head(config.network)
            head.load_state_dict(without_variance(network.head.state_dict(), sizes))
            network.head = head
        student = cls(config, network).to(teacher.device)
        student.codec = teacher.codec
        return student

    def save_pretrained(self, path: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and, with a codec, `vae/`; an interrupted write leaves the old folder."""
        save_folder(Path(path), self.config.to_json(), self.state_dict(), kind="Student", codec=self.codec)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the student's folder to the Hugging Face hub; returns the address of the commit.

        Args:
            repo_id: `owner/name`; made if there is none.
            private: of a new repository; None: the owner's default.
            token: of the hub; None: that of `hf auth login`.
        """
        return push_folder(self.save_pretrained, repo_id, private=private, token=token)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, network: Callable[[DiTConfig], nn.Module] | None = None) -> Student:
        """Read a student's folder, or a run's or a pipeline's folder with one in `student/`.

        Args:
            path: the folder, or `owner/name` of one on the Hugging Face hub.
            network: makes the network of a student that is not made of pyard's own DiT (`docs/own-teacher.md`).

        Raises:
            InputError: no student there, or files that do not fit.
        """
        path = local_folder(path)
        folder = path / "student" if (path / "student").is_dir() else path
        loaded, tensors = load_folder(folder, kind="Student")
        config = StudentConfig.from_json(loaded)
        try:
            if network is None:
                with torch.device("meta"):
                    student = cls(config)
            else:
                student = cls(config, network(config.network))
            student.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise InputError(f"{folder}: the weights do not fit config.json: {error}") from None
        student.codec = LatentCodec.beside(folder, path)
        return student.eval()
