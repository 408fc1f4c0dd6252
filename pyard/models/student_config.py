"""The configuration of a student (sizes, grid, history, output), which is stored beside its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import Target, TimeGrid
from pyard.errors import InputError
from pyard.models.backbone import Backbone, BackboneConfig
from pyard.models.families import backbone_class
from pyard.ops.masks import Mask, check_mask
from pyard.storage.typed import conform

Output = Literal["direct", "jump"]
Heads = Literal["per_step", "shared"]
LoraHeads = Literal["whole", "lora", "frozen"]

# Of the teacher's settings, those that neither the grid nor the schedule has.
_OF_THE_TRAJECTORIES = ("cfg_scale", "cfg_channels", "cfg_interval", "solver")

MOST_STEPS = 1000  # far more than the few that students are for, and as many as most teachers have noise levels

HISTORY_SWITCHED_OFF = -4.0  # start of a learned history bias: `docs/quality.md` has what it is worth


@dataclass(frozen=True)
class TextSource:
    """Where a text-to-image student's text encoders and VAE are, and how texts are encoded for it.

    Args:
        pipeline: name of the diffusers class of its teacher's pipeline, such as `FluxPipeline`.
        folder: folder of that pipeline.
        max_sequence_length: largest number of text tokens; None: the pipeline's limit.
        constants: further conditions that are the same for every prompt, such as `{"guidance": 3.5}`.
        read_with: the arguments `dtype`, `variant`, `transformer` and `lora` of `load_teacher` with which the teacher was read,
            where they were given.
    """

    pipeline: str
    folder: str
    max_sequence_length: int | None = None
    constants: dict[str, float] = field(default_factory=dict)
    read_with: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {"dtype", "variant", "transformer", "lora"}
        if not known.issuperset(self.read_with) or not all(isinstance(value, str) for value in self.read_with.values()):
            raise InputError(
                f"student: read_with is {self.read_with!s:.80}; expected texts for some of {', '.join(sorted(known))}"
            )

    def to_json(self) -> dict[str, Any]:
        """The keyword arguments that make an equal one."""
        kept = dataclasses.asdict(self)
        if not self.read_with:
            del kept["read_with"]  # as in students of earlier versions
        return kept


@dataclass(frozen=True)
class BaseSource:
    """The frozen weights of a LoRA student, whose folder contains only the trained ones.

    They are the weights of the transformer in `TextSource.folder`, unless a fine-tuned one replaced it.

    Args:
        fingerprint: sha256 of the weights' values, see `pyard.models.fingerprint.weights_digest`.
        dtype: dtype in which they were read: float32 | bfloat16 | float16.
        rank: rank of the additions.
        heads: how the output layers were trained: whole | lora | frozen.
        transformer: a fine-tuned transformer that replaced the folder's: folder or single file.
        lora: a LoRA that was added to the transformer before training.
        variant: variant of the transformer's weights, such as `fp16`.
    """

    fingerprint: str
    dtype: str
    rank: int
    heads: LoraHeads = "whole"
    transformer: str | None = None
    lora: str | None = None
    variant: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The keyword arguments that make an equal one."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class StudentConfig:
    """The configuration of a student, which is stored beside its weights.

    Args:
        network: configuration of the backbone, whose output has the C channels that the student predicts.
        grid: the times of the jumps, and those given to the time embedding; with several sizes, the grid of the usual size.
        schedule: the teacher's forward process.
        history_layers: N, the number of lowest blocks that see earlier steps. 0 is step distillation; None: a quarter of the
            backbone's blocks, rounded up.
        mask: which steps those blocks see: `diagonal`, only the step itself; `window`, the last `window` steps including
            itself; `anchor`, itself and the first one (pure noise); `causal`, itself and all earlier ones (figure 1b of the
            paper).
        window: number of steps that the `window` mask shows, including the step itself; None for the other masks.
        target: what a step predicts: the ODE `state` at the next grid time, or the teacher's `denoised` prediction.
        output: with `direct`, the head's output is the prediction, as in the authors' code. The head starts from the teacher's
            weights but has to learn another quantity; this suits `denoised` targets, whose inputs contain no noise. With
            `jump`, the head's output F goes through the teacher's own update a_s u_s + b_s F, so the untrained student
            with N = 0 is the teacher's unguided DDIM/Euler sampler and training starts from a working sampler; this needs
            `state` targets. None: `jump` for `state` targets and three steps or more, else `direct`.
        heads: one head `per_step`, or one `shared` by all.
        history_bias: initial value of a learned bias per head, added to the logits of earlier steps' keys. The teacher has
            never seen these keys, so a strongly negative value lets a `jump` student with N > 0 also start as the teacher's
            sampler. None: no bias; `auto`: -4 for `jump`, else no bias.
        teacher_fingerprint: fingerprint of the teacher that it was made from.
        class_names: names of the classes, in order, if the teacher has them; synonyms are separated by commas.
        family: name of the backbone's family (`pyard.models.families`), or `package.module:Class` of the user's own.
        sample_shapes: all shapes [C, ...] that it was trained on; None: only `network.sample_shape`.
        grids: a grid for each of `sample_shapes`, if the times depend on the size; None: `grid` applies to all of them.
        text: for a student that draws from prompts, where its text encoders are; None: it is given condition numbers or
            tensors.
        base: for a student trained by LoRA on a text-to-image pipeline, the frozen weights, which its folder does not contain;
            None: its folder contains all weights.
        cfg_scale: guidance weight of the trajectories of its training; None: unknown, as are the next three.
        cfg_channels: number of channels that were guided; None: all.
        cfg_interval: lowest and highest teacher time that was guided; None: all.
        solver: the teacher's solver.
    """

    network: BackboneConfig
    grid: TimeGrid
    schedule: NoiseSchedule
    history_layers: int = None  # type: ignore[assignment]  # decided in __post_init__, as output is
    mask: Mask = "causal"
    window: int | None = None
    target: Target = "state"
    output: Output = None  # type: ignore[assignment]
    heads: Heads = "per_step"
    history_bias: float | None = "auto"  # type: ignore[assignment]
    teacher_fingerprint: str = ""
    class_names: tuple[str, ...] | None = None
    family: str = "dit"
    sample_shapes: tuple[tuple[int, ...], ...] | None = None
    grids: tuple[TimeGrid, ...] | None = None
    text: TextSource | None = None
    base: BaseSource | None = None
    cfg_scale: float | None = None
    cfg_channels: int | None = None
    cfg_interval: tuple[float, float] | None = None
    solver: str | None = None

    def __post_init__(self) -> None:
        conform(self, "student")
        if self.sample_shapes is not None:
            shapes = tuple(tuple(shape) for shape in self.sample_shapes)
            object.__setattr__(self, "sample_shapes", None if shapes == (tuple(self.network.sample_shape),) else shapes)
        if self.grids is not None:
            self._check_grids(self.grids)
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.history_layers is None:
            object.__setattr__(self, "history_layers", default_history_layers(self.network.depth))
        if self.output is None:
            object.__setattr__(self, "output", default_output(self.target, self.grid.num_steps))
        if cast(object, self.history_bias) == "auto":
            object.__setattr__(self, "history_bias", default_history_bias(self.output, self.history_layers))
        for name, kinds in (("target", Target), ("output", Output), ("heads", Heads)):
            if getattr(self, name) not in get_args(kinds):
                raise InputError(f"student: {name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(kinds))}")
        if not 0 <= self.history_layers <= self.network.depth:
            raise InputError(f"student: history_layers is {self.history_layers}; the network has {self.network.depth} layers")
        if self.grid.num_steps > MOST_STEPS:
            raise InputError(f"student: {self.grid.num_steps} steps; expected at most {MOST_STEPS}")
        check_mask(self.mask, self.window)
        if self.output == "jump" and self.target == "denoised":
            raise InputError("student: output 'jump' starts from a state, so it needs target 'state', not 'denoised'")

    def _check_grids(self, grids: tuple[TimeGrid, ...]) -> None:
        if len(grids) != len(self.shapes):
            raise InputError(f"student: {len(grids)} grids for {len(self.shapes)} sizes; expected one for each")
        counts = sorted({grid.num_steps for grid in grids})
        if len(counts) > 1:
            raise InputError(
                f"student: its grids have {' and '.join(map(str, counts))} steps; expected the same number for every size"
            )
        if self.grid_of(self.usual_shape) != self.grid:
            raise InputError(f"student: grid is not the one of its usual size, {self.usual_shape}")
        if all(grid == self.grid for grid in grids):
            object.__setattr__(self, "grids", None)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """All shapes [C, ...] that it was trained on, at least one."""
        return self.sample_shapes or (tuple(self.network.sample_shape),)

    @property
    def usual_shape(self) -> tuple[int, ...]:
        """The shape [C, ...] that it draws by default."""
        return usual_shape(self.shapes, self.network)

    def grid_of(self, sample_shape: Sequence[int]) -> TimeGrid:
        """The time grid for samples of a shape.

        Raises:
            InputError: the student was not trained on that shape. This is only checked if every shape has its own grid.
        """
        if self.grids is None:
            return self.grid
        return self.grids[self.shapes.index(self.trained_shape(sample_shape))]

    def trained_shape(self, sample_shape: Sequence[int] | None) -> tuple[int, ...]:
        """A shape that the student was trained on; None: the usual one.

        Raises:
            InputError: another shape; the message has the list.
        """
        shape = self.usual_shape if sample_shape is None else tuple(sample_shape)
        if shape not in self.shapes:
            known = ", ".join(map(str, self.shapes))
            pixels = getattr(self.network, "pixels", None)
            sizes = ", ".join(f"{one[-2] * pixels} x {one[-1] * pixels}" for one in self.shapes) if pixels else ""
            in_pixels = f" (height x width in pixels: {sizes})" if sizes else ""
            raise InputError(f"samples of shape {shape}; this student was trained on {known}{in_pixels}")
        return shape

    @property
    def teacher_settings(self) -> dict[str, Any] | None:
        """The settings, by name, with which the teacher sampled the trajectories of its training; None: unknown."""
        if self.cfg_scale is None:
            return None
        return {"teacher_steps": self.grid.teacher_steps, **{name: getattr(self, name) for name in _OF_THE_TRAJECTORIES}}

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_json` turns back into an equal configuration."""
        flat = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("sample_shapes", "grids", "text", "base"):
            if flat[name] is None:
                del flat[name]  # as in students of earlier versions
        for name in _OF_THE_TRAJECTORIES:
            del flat[name]
        flat |= self.teacher_settings or {}
        if self.grids is not None:
            flat["grids"] = [grid.to_json() for grid in self.grids]
        return {key: value.to_json() if hasattr(value, "to_json") else value for key, value in flat.items()}

    @classmethod
    def from_json(cls, config: dict[str, Any], network: type[Backbone] | str | None = None) -> StudentConfig:
        """The configuration of a `to_json` dictionary.

        Args:
            config: the dictionary.
            network: class of a backbone that is not one of pyard's, or "package.module:Class".
        """
        if not all(isinstance(config.get(name), Mapping) for name in ("network", "grid", "schedule")):
            raise InputError("student: its config.json has no network, grid or schedule; pyard did not write it")
        try:
            family = str(config.get("family", "dit"))
            nested: dict[str, Any] = {
                "network": backbone_class(family, network, "the student").config_class(**config["network"]),
                "grid": TimeGrid.from_json(config["grid"]),
                "schedule": NoiseSchedule.from_json(config["schedule"]),
            }
            if config.get("grids") is not None:
                nested["grids"] = tuple(TimeGrid.from_json(grid) for grid in config["grids"])
            if config.get("text") is not None:
                nested["text"] = TextSource(**config["text"])
            if config.get("base") is not None:
                nested["base"] = BaseSource(**config["base"])
            return cls(**{key: value for key, value in {**config, **nested}.items() if key != "teacher_steps"})  # the grid's
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"student: its config.json is not valid in this version of pyard: {error}") from None


def usual_shape(shapes: Sequence[tuple[int, ...]], network: BackboneConfig) -> tuple[int, ...]:
    """The shape that a student draws by default, among those that it was trained on."""
    usual = tuple(network.sample_shape)
    return usual if usual in shapes else shapes[0]


def default_output(target: Target, num_steps: int) -> Output:
    """`jump` for state targets and three steps or more, else `direct`.

    A `jump` student starts as the teacher's own sampler with S steps, and if that sampler is reasonable, ends far closer to the
    teacher. `docs/quality.md` has measurements on the built-in digits for S = 1, 2 and 4.
    """
    return "jump" if target == "state" and num_steps >= 3 else "direct"


def default_history_layers(depth: int) -> int:
    """N = L / 4, rounded up."""
    return math.ceil(depth / 4)


def default_history_bias(output: Output, history_layers: int) -> float | None:
    """A bias that switches the history of `jump` students off at first, so they start as the teacher's sampler; else None."""
    return HISTORY_SWITCHED_OFF if output == "jump" and history_layers > 0 else None
