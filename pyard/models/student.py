"""The student: the teacher's transformer, run on S noise levels at once, with a history in its lowest N attentions.

Everything except those N attentions sees B*S independent samples, so the parallel pass (training) and the cached pass
(sampling) are the same few lines with a different number of steps.

    B batch · S steps · T tokens per step · D hidden · C channels · N history layers
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from pyard.conditions import ClassConditions, Condition, Conditions, load_conditions, save_conditions
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import Target, TimeGrid
from pyard.errors import InputError
from pyard.models.backbone import Backbone, Denoiser, StepHeads
from pyard.models.base import read_base
from pyard.models.card import SCORES_NAME, Scores, drop_foreign_scores, read_scores, write_card
from pyard.models.codec import Codec, LatentCodec
from pyard.models.families import backbone_class
from pyard.models.fingerprint import weights_digest
from pyard.models.folder import load_folder, require_sizes, save_folder
from pyard.models.history import History, HistoryCache, PreallocatedCache
from pyard.models.hub import local_folder, push_folder
from pyard.models.lora import LoraSettings, add_lora, merged
from pyard.models.step_times import StepTimes
from pyard.models.student_config import Heads, Output, StudentConfig, TextSource, usual_shape
from pyard.ops.masks import Mask
from pyard.storage.reading import reading
from pyard.storage.trained import load_trained, sharing, tensors_of


class Source(Protocol):
    """What a student can be made from: a teacher with a network."""

    schedule: NoiseSchedule
    codec: Codec | None

    @property
    def network(self) -> Denoiser: ...

    @property
    def conditions(self) -> Conditions: ...

    @property
    def class_names(self) -> tuple[str, ...] | None: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def device(self) -> torch.device: ...


class Student(nn.Module):
    """A few-step student of a diffusion transformer.

    Args:
        config: its configuration. The weights are newly initialised; `from_teacher` copies a teacher's, and `from_pretrained`
            reads a folder.
        trunk: its backbone; None: a new one of the configuration's family.
        head: output layers, copied for every step that has its own; None: new ones.

    Attributes:
        codec: the VAE that decodes its samples to images, if the teacher had one.
        conditions: its table of conditions; None: it only takes conditions as tensors.
        lora: its low-rank additions (`pyard.models.lora.add_lora`); None: it has none.
        scores: the results of `pyard.evaluate` for these weights, for the model card; None: not measured.
    """

    def __init__(self, config: StudentConfig, trunk: Backbone | None = None, head: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.trunk: Backbone = backbone_class(config.family, None, "the student")(config.network) if trunk is None else trunk
        head = self.trunk.new_head() if head is None else head
        self.heads = StepHeads(head, config.grid.num_steps if config.heads == "per_step" else 1)
        self.times = StepTimes(config)
        self.codec: Codec | None = None
        self.conditions: Conditions | None = None
        self.lora: LoraSettings | None = None
        self.scores: Scores | None = None
        if self.trunk.num_classes is not None:
            classes = self.trunk.num_classes
            self.conditions = ClassConditions(classes, config.class_names, has_null=self.trunk.has_null_class)
        self.history_bias: nn.Parameter | None = None
        if config.history_bias is not None:
            remembering = len(self.trunk.attention_shapes(config.history_layers, self.sample_shape))
            start = torch.full((remembering, config.network.num_heads), float(config.history_bias))
            self.history_bias = nn.Parameter(start)

    @property
    def num_steps(self) -> int:
        """S."""
        return self.config.grid.num_steps

    @property
    def num_conditions(self) -> int:
        """The number of condition numbers, 0 ... num_conditions - 1; for a class-conditional student, the number of classes.

        Raises:
            InputError: the student has no table of conditions.
        """
        return self.require_conditions().count

    @property
    def num_classes(self) -> int | None:
        """Number of classes of a class-conditional student; None: it has other conditions."""
        return self.trunk.num_classes

    @property
    def embed_times(self) -> torch.Tensor:
        """[S], float32: the times given to the network; with several sizes, those of the usual size."""
        return self.times.embed_times()

    @property
    def jumps(self) -> list[tuple[float, float]]:
        """(a_s, b_s) of the updates a_s u_s + b_s F, for the usual size; empty for `direct` outputs."""
        return self.times.jumps()

    @property
    def sample_shapes(self) -> tuple[tuple[int, ...], ...]:
        """[C, ...] of the samples that it was trained on."""
        return self.config.shapes

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """[C, ...] of one sample; with several sizes, the usual one."""
        return self.config.usual_shape

    def trained_shape(self, sample_shape: Sequence[int] | None) -> tuple[int, ...]:
        """A shape that the student was trained on; None: the usual one.

        Raises:
            InputError: another shape; the message has the list.
        """
        return self.config.trained_shape(sample_shape)

    def of_size(self, sample_shape: Sequence[int]) -> Student:
        """The student restricted to one of its sizes: it shares the weights, and has that size's grid and shape."""
        shape = self.trained_shape(sample_shape)
        grid = self.config.grid_of(shape)
        one = copy.copy(self)
        one.config = dataclasses.replace(self.config, sample_shapes=(shape,), grid=grid, grids=None)
        one._modules = {**self._modules, "times": StepTimes(one.config).to(self.embed_times.device)}
        return one

    def require_conditions(self) -> Conditions:
        """The table of conditions; an InputError where there is none."""
        if self.conditions is None:
            raise InputError("this student has no table of conditions; give it a pyard.conditions.Condition")
        return self.conditions

    def as_condition(self, condition: Condition | torch.Tensor) -> Condition:
        """Return a condition unchanged, or look up condition numbers, such as class labels, int64 [B]."""
        return condition if isinstance(condition, Condition) else self.require_conditions().take(condition)

    def forward(
        self,
        history: torch.Tensor,  # [B, S, C, ...], the S inputs
        condition: Condition | torch.Tensor,  # B rows, or their numbers, int64 [B]
    ) -> torch.Tensor:  # [B, S, C, ...], the S predictions
        """The parallel pass: all steps at once on a given history (teacher forcing)."""
        if history.ndim < 3 or history.shape[1] != self.num_steps:
            raise InputError(f"history of shape {tuple(history.shape)}; {self._expected()}")
        self._check(history.shape[2:], history.shape)
        return self._run(history, self.as_condition(condition), first=0, cache=None)

    def step(
        self,
        latest: torch.Tensor,  # [B, C, ...]: the noise, or the previous step's prediction
        step: int,
        condition: Condition | torch.Tensor,  # B rows, or their numbers
        cache: HistoryCache,
    ) -> tuple[torch.Tensor, HistoryCache]:  # [B, C, ...]
        """The cached pass: one step, given the history in `cache`. Returns the prediction and the cache for the next step."""
        prediction = self._run(latest[:, None], self.as_condition(condition), first=step, cache=cache)[:, 0]
        return prediction, cache.advance()

    def rollout(
        self,
        noise: torch.Tensor,  # [B, C, ...]
        condition: Condition | torch.Tensor,  # B rows, or their numbers
        cache: HistoryCache | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the S successive predictions, each made from the history of its predecessors; the last one is the sample."""
        cache = self.new_cache(len(noise), tuple(noise.shape[1:])) if cache is None else cache
        conditions = self._prepared(self.as_condition(condition), tuple(noise.shape[1:]))
        latest = noise
        for step in range(self.num_steps):
            latest, cache = self.step(latest, step, conditions[step], cache)
            yield latest

    def _prepared(self, condition: Condition, sample_shape: tuple[int, ...]) -> Sequence[Condition]:
        # Not if gradients are needed, so that recomputation still works on blocks, nor if a block gathers its own weights.
        if torch.is_grad_enabled() or any(hasattr(weight, "device_mesh") for weight in self.trunk.parameters()):  # DTensors
            return [condition] * self.num_steps
        return self.trunk.prepare(self.times.embed_times(sample_shape)[None], condition)

    def new_cache(self, batch_size: int, sample_shape: tuple[int, ...] | None = None) -> PreallocatedCache:
        """An empty cache for `batch_size` samples, with the dtype and device of the parameters."""
        weight = next(self.trunk.parameters())
        shapes = self.trunk.attention_shapes(self.config.history_layers, sample_shape or self.sample_shape)
        sizes = [(batch_size, shape.heads, self.num_steps * shape.tokens, shape.head_dim) for shape in shapes]
        keys, values = ([weight.new_empty(size) for size in sizes] for _ in range(2))
        return PreallocatedCache(keys, values, self.num_steps)

    def history(self, steps: int, cache: HistoryCache | None) -> History | None:
        """The history for the lowest layers' attention in a pass of `steps` steps; None: no layer has a history."""
        config = self.config
        if not config.history_layers:
            return None
        return History(config.history_layers, steps, config.mask, config.window, self.history_bias, cache)

    def _run(self, inputs: torch.Tensor, condition: Condition, first: int, cache: HistoryCache | None) -> torch.Tensor:
        # inputs [B, steps, C, ...] are the steps first ... first + steps - 1.
        steps, sample_shape = inputs.shape[1], inputs.shape[2:]
        times = self.times.embed_times(sample_shape)[None, first : first + steps]
        output = self.trunk(inputs, times, condition, self.heads.steps(first, steps), self.history(steps, cache))
        jumps = self.times.jumps(sample_shape)[first : first + steps]
        if not jumps:
            return output
        exact = torch.promote_types(output.dtype, torch.float32)
        updates = [a * inputs[:, s].to(exact) + b * output[:, s].to(exact) for s, (a, b) in enumerate(jumps)]
        return torch.stack(updates, dim=1)

    def _check(self, sample_shape: torch.Size, shape: torch.Size) -> None:
        try:
            self.trunk.check_sample(tuple(sample_shape))
        except InputError as error:
            raise InputError(f"history of shape {tuple(shape)}; {self._expected()} ({error})") from None

    def _expected(self) -> str:
        return f"expected [B, {self.num_steps}, {', '.join(map(str, self.sample_shape))}]"

    @classmethod
    def from_teacher(
        cls,
        teacher: Source,
        grid: TimeGrid | Sequence[TimeGrid],
        *,
        history_layers: int | None = None,
        mask: Mask = "causal",
        window: int | None = None,
        target: Target = "state",
        output: Output | None = None,
        heads: Heads = "per_step",
        history_bias: float | Literal["auto"] | None = "auto",
        sample_shapes: Sequence[tuple[int, ...]] | None = None,
        text: TextSource | None = None,
        share: bool = False,
    ) -> Student:
        """Make a student from the teacher's weights; its heads are copies of the teacher's, without predicted-variance
        channels.

        Args:
            teacher: a teacher with a network, such as `load_teacher` returns.
            grid: the times of its jumps, or a list with a grid for each of `sample_shapes`; `embed_times` are set to suit the
                target (`TimeGrid.for_target`).
            history_layers, mask, window, target, output, heads, history_bias, sample_shapes, text: as in `StudentConfig`.
            share: use the teacher's own tensors as the trunk's weights, for `add_lora` to freeze; False: copy them.
        """
        network = teacher.network
        shared = [*network.trunk.parameters(), *network.trunk.buffers()] if share else []
        with sharing(shared):
            trunk, head = network.trunk.for_student(network.head)
        grids = tuple(one.for_target(target) for one in ([grid] if isinstance(grid, TimeGrid) else grid))
        shapes = (trunk.config.sample_shape,) if sample_shapes is None else tuple(sample_shapes)
        config = StudentConfig(
            network=trunk.config,
            grid=grids[0 if len(grids) == 1 else shapes.index(usual_shape(shapes, trunk.config))],
            schedule=teacher.schedule,
            history_layers=history_layers,  # type: ignore[arg-type]
            mask=mask,
            window=window,
            target=target,
            output=output,  # type: ignore[arg-type]
            heads=heads,
            history_bias=history_bias,  # type: ignore[arg-type]
            teacher_fingerprint=teacher.fingerprint,
            class_names=teacher.class_names,
            family=trunk.family(),
            sample_shapes=None if sample_shapes is None else shapes,
            grids=None if len(grids) == 1 else grids,
            text=text,
        )
        student = cls(config, trunk.requires_grad_(not share), head.requires_grad_(True)).to(teacher.device)
        student.codec, student.conditions = teacher.codec, student.conditions or teacher.conditions
        return student

    def save_pretrained(self, path: str | Path, *, merge: bool = False) -> None:
        """Write `config.json`, `model.safetensors`, a model card and, with a codec, `vae/`.

        If writing is interrupted, the old folder stays as it was. A README.md that pyard did not write is kept.

        Low-rank additions are merged into the weights, unless the student names a base (`StudentConfig.base`). In that case
        only the trained tensors are written, and `from_pretrained` reads the base from its own path.

        Args:
            path: the folder.
            merge: also merge the additions of a student that names a base, and write all weights.
        """
        self.save_named(path, merge=merge)

    def save_named(self, path: str | Path, name: str | None = None, *, merge: bool = False, card: bool = True) -> None:
        """Like `save_pretrained`, with code in the card that loads `name`, a repository on the hub; without `card`, no card."""
        drop_foreign_scores(self)
        if self.lora is None:
            self.write_folder(path, self.state_dict(), name=name, card=card)
        elif self.config.base is not None and not merge:
            self.write_folder(path, tensors_of(self), name=name, card=card)
        else:
            whole = merged(self)
            whole.config = dataclasses.replace(self.config, base=None)
            if whole.scores is not None:
                whole.scores = {**whole.scores, "weights": weights_digest(whole)}  # the same function
            whole.write_folder(path, whole.state_dict(), name=name, card=card)

    def write_folder(
        self, path: str | Path, tensors: dict[str, torch.Tensor], *, name: str | None = None, card: bool = True
    ) -> None:
        """Write this student's folder with the given tensors, such as trained ones gathered from shards."""
        path = Path(path)

        def beside(folder: Path) -> None:
            if self.codec is not None:
                self.codec.save(folder)
            if self.conditions is not None and self.config.text is None:  # which finds any prompt's embedding itself
                save_conditions(self.conditions, folder)
            write_card(self, folder, path if card else None, name)

        save_folder(path, self.config.to_json(), tensors, kind="Student", beside=beside, also_owned=[SCORES_NAME])

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the student's folder to the Hugging Face hub; returns the address of the commit.

        Args:
            repo_id: `owner/name`; created if it does not exist. A README.md there that pyard did not write is kept.
            private: whether a new repository is private; None: the owner's default.
            token: access token of the hub; None: that of `hf auth login`.
        """
        return push_folder(self.save_named, repo_id, private=private, token=token)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        network: type[Backbone] | str | None = None,
        base: str | Path | Denoiser | None = None,
    ) -> Student:
        """Read a student's folder, or the folder of a run or pipeline, which has a student in `student/`.

        Args:
            path: the folder, or `owner/name` of a repository on the Hugging Face hub.
            network: class of the student's backbone, if it is not one of pyard's families, or "package.module:Class" to
                import it from (`docs/own-teacher.md`).
            base: for a LoRA student, where its base is now: the pipeline's folder, or a transformer (folder or file); or the
                teacher's network, whose weights are then shared; None: the base's path during training.

        Raises:
            InputError: there is no student, its files do not match each other, or the base is missing or has changed.
        """
        path = local_folder(path)
        folder = path / "student" if (path / "student").is_dir() else path
        loaded, tensors = load_folder(folder, kind="Student")
        backbone = backbone_class(str(loaded.get("family", "dit")), network, folder)
        with reading(folder, "config.json and weights do not match", RuntimeError):
            config = StudentConfig.from_json(loaded, backbone)
            if config.base is not None:
                config, trunk, head = read_base(config, backbone, base, folder)
                student = cls(config, trunk, head)
                add_lora(student, config.base.rank, config.base.heads)  # type: ignore[union-attr]
                load_trained(student, tensors)
            else:
                num_heads = config.grid.num_steps if config.heads == "per_step" else 1
                require_sizes(folder, config.network.depth, tensors, num_heads)
                with backbone.without_weights():
                    student = cls(config, backbone(config.network))
                student.load_state_dict(tensors, assign=True)
        student.codec = LatentCodec.beside(folder, path)
        student.conditions = student.conditions or load_conditions(folder, path)
        student.scores = read_scores(folder)
        return student.eval()
