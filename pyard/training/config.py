"""Everything about a training run in one frozen dataclass: from Python, YAML or flags; stored beside the checkpoints."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from pyard.diffusion.solvers import Solver
from pyard.diffusion.time_grid import Target
from pyard.errors import InputError
from pyard.models.student_config import (
    Heads,
    LoraHeads,
    Output,
    default_history_bias,
    default_history_layers,
    default_output,
)
from pyard.ops.masks import Mask
from pyard.storage.reading import as_object, read_yaml
from pyard.storage.typed import conform, read_settings
from pyard.training.adversarial_config import AdversarialConfig
from pyard.training.checks import DEFAULTS, check_ranges
from pyard.trajectories.manifest import DType, Keep, Precision

T = TypeVar("T")

RECIPES = Path(__file__).parents[1] / "recipes"
SETTINGS_NAME = "settings.yaml"

LRSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Loss = Literal["mse", "pseudo_huber"]
Stage = Literal["regression", "adversarial"]
Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. The defaults suit the built-in digits; `recipes/` has the paper's.

    Args:
        teacher: a built-in teacher (`digits`, `scenes-text`), a teacher folder that pyard wrote, a diffusers folder, or a `.pt`
            or `.safetensors` checkpoint of DiT, SiT, REPA or LightningDiT.
        out: the run folder.
        trajectories: a store that `generate_trajectories` wrote with this teacher, or a list of stores, one for each sample
            shape (each batch comes from one store); none: generated in `out`/trajectories.

        stage: `regression`, or `adversarial`: continue from `student`, with discriminators beside the regression.
        student: run folder or student folder to start from, in either stage. It determines all settings of the student;
            those that are given must agree with it.
        network: package.module:Class of the teacher's backbone, if it is not one of pyard's.

        num_steps: S, network passes of the student; none: the number of jumps in a given store, else 4.
        history_layers: N, how many of the lowest attentions see earlier steps; 0 is step distillation; none: a quarter of
            the teacher's layers, rounded up.
        mask: which earlier steps the lowest history_layers attentions see: diagonal | window | anchor | causal; none: causal,
            or a given student's.
        window: steps seen with the `window` mask, including the current one; required by that mask, and only allowed with it.
        target: what a step predicts: the ODE `state`, or the teacher's `denoised` prediction (the authors' code); none:
            `state`, or the only one that a given store has.
        output: `direct` as in the authors' code, or `jump` (needs `state` targets): start as the teacher's own unguided
            sampler; none: `jump` for `state` targets and three steps or more, else `direct`. `docs/quality.md` compares
            them.
        heads: an output head `per_step`, or one `shared`; none: `per_step`, or a given student's.
        history_bias: initial value of a learned bias on the attention to earlier steps; none: no bias; auto: -4 for `jump`
            outputs, so that the untrained student nearly ignores its history, and no bias for `direct` ones.
        lora_rank: train low-rank additions to the blocks (PEFT) and the heads, not all weights. The folder of a text-to-image
            student then holds only the trained weights and names its base; in any other student the additions are merged into
            the weights. none: train everything.
        lora_heads: with lora_rank, which part of the heads is trained: `whole`, low-rank additions (`lora`), or nothing
            (`frozen`). A stock LoRA can express the latter two. none: `lora` where a stock pipeline could draw with the student
            (text-to-image, history_layers 0, `jump`, a `shared` head), else `whole`.

        num_trajectories: how many to generate if there is no store; none: 8192. If there is a store, the settings of this group
            come from it, and those that are given must agree with it.
        teacher_steps: steps of the teacher's solver; none: 25, or about as many as a text-to-image pipeline takes.
        solver: the teacher's solver: ddim | euler | heun | dpm++2m; none: ddim or euler, or a text-to-image pipeline's own.
        cfg_scale: guidance weight; 1: no guidance; none: 1.5, or that of a text-to-image pipeline.
        cfg_channels: number of leading channels to guide (3 of 4 in DiT's public code); none: all.
        trajectory_dtype: dtype of stored trajectories: float32 | float16 | bfloat16; none: float32.
        trajectory_keep: what is stored: state | denoised | both; none: both.
        trajectory_precision: precision that the teacher computes in: float32 | bfloat16; none: float32.
        trajectory_batch_size: samples that the teacher computes together; none: 64, or fewer for large text-to-image samples.

        prompts: for a text-to-image pipeline: a `.txt` or `.jsonl` file, or a folder with `metadata.jsonl`.
        height: height of a text-to-image pipeline's pictures, in pixels; none: the pipeline's own.
        width: width of a text-to-image pipeline's pictures, in pixels; none: the pipeline's own.
        embedded_guidance: guidance scale that a pipeline such as FLUX.1-dev passes to its transformer; none: its default.
        variant: variant of a text-to-image pipeline's weights, such as fp16.
        transformer: a fine-tuned transformer in place of the pipeline's, folder or single file.
        lora: a LoRA that is added to the pipeline's transformer.

        max_steps: number of updates. With `constant` and `constant_with_warmup`, a larger number extends an existing run.
        batch_size: trajectories per update, over all processes and accumulated micro-batches.
        gradient_accumulation: micro-batches that each process's share of an update is split into; saves memory, not time.
        learning_rate: AdamW's learning rate.
        lr_schedule: schedule, by diffusers' names; `cosine` and `linear` fall to zero at max_steps.
        warmup_steps: updates over which the learning rate rises from zero; must be 0 with `constant`.
        weight_decay: AdamW's weight decay.
        adam_betas: AdamW's betas.
        grad_clip: gradients with a larger norm are scaled down to this norm.
        ema_decay: decay of the averaged weights, which are the result. Of several decays, the first gives the result, and the
            others are kept in `student-ema-DECAY/`. The decay at update n is at most (1 + n) / (10 + n).
        mixed_precision: no | bf16 | fp16 (on a GPU only).
        steps_per_update: learn only k of the S steps in each update, drawn at random. All S run through the lowest
            history_layers layers, but only these k through the others and the loss. Saves memory and time; the gradient is
            the full one on average, with more noise. none: all S.
        activation_checkpointing: keep only the inputs of blocks and recompute the rest: less memory, a third more time.
        compile: compile the student with torch.compile; its results differ in the last bits.
        parallel: with several processes: `ddp`, each holds all weights; `fsdp`, the weights are split (FSDP2). The results are
            the same up to rounding.
        seed: random seed for the order of the trajectories and everything else that is random.

        loss: loss of a step's prediction: `mse`, or `pseudo_huber`, sqrt(|d|^2 + c^2) - c of the whole sample (Song & Dhariwal
            2024, section 3.3).
        huber_c: c of `pseudo_huber`; none: 0.00054 sqrt(numbers in a sample), as in that paper.
        step_weights: `uniform`; `min_snr`, min(SNR, min_snr_gamma) at the time that a step arrives at (after Hang et al. 2023);
            or S numbers. All are scaled to a mean of 1.
        min_snr_gamma: upper limit of the SNR in `min_snr` weights.
        rollout_probability: share of updates in which the student learns on its own history instead of the teacher's.
        rollout_start: number of initial updates that only use the teacher's history, before rollout_probability applies.
        rollout_gradient: `detach`: its own history is a constant input; `backprop`: gradients also flow through the
            predictions, keys and values that it was computed from (S times the memory).

        save_every: updates between checkpoints.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keep checkpoints at multiples of this many updates; none: no others.
        log_every: updates between lines of the log.
        evaluate_every: updates between sample grids and exposure-bias curves; 0: none.
        evaluation_trajectories: trajectories for these curves, generated from a separate seed.
        max_skipped_in_a_row: updates with a non-finite loss or gradient are skipped; this many in a row end the run.
        trackers: `auto`: TensorBoard if it is installed and `evaluate_every` is not 0; `none`; or tensorboard | wandb.
        peak_tflops: the device's peak TFLOP/s in the precision used, for the model FLOPs utilisation; none: looked up for
            common GPUs.
        progress: show a progress bar.

        adversarial: settings of the adversarial stage.
    """

    teacher: str
    out: Path
    trajectories: str | list[str] | None = None
    stage: Stage = "regression"
    student: str | None = None
    network: str | None = None

    num_steps: int | None = None
    history_layers: int | None = None
    mask: Mask | None = None
    window: int | None = None
    target: Target | None = None
    output: Output | None = None
    heads: Heads | None = None
    history_bias: float | Literal["auto"] | None = "auto"
    lora_rank: int | None = None
    lora_heads: LoraHeads | None = None

    num_trajectories: int | None = None
    teacher_steps: int | None = None
    solver: Solver | None = None
    cfg_scale: float | None = None
    cfg_channels: int | None = None
    trajectory_dtype: DType | None = None
    trajectory_keep: Keep | None = None
    trajectory_precision: Precision | None = None
    trajectory_batch_size: int | None = None

    prompts: str | None = None
    height: int | None = None
    width: int | None = None
    embedded_guidance: float | None = None
    variant: str | None = None
    transformer: str | None = None
    lora: str | None = None

    max_steps: int = 2000
    batch_size: int = 64
    gradient_accumulation: int = 1
    learning_rate: float = 5e-4
    lr_schedule: LRSchedule = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    ema_decay: float | tuple[float, ...] = 0.999
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    steps_per_update: int | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    parallel: Parallel = "ddp"
    seed: int = 0

    loss: Loss = "mse"
    huber_c: float | None = None
    step_weights: Literal["uniform", "min_snr"] | tuple[float, ...] = "uniform"
    min_snr_gamma: float = 5.0
    rollout_probability: float = 0.0
    rollout_start: int = 0
    rollout_gradient: Literal["detach", "backprop"] = "detach"

    save_every: int = 500
    keep_last: int = 2
    keep_every: int | None = None
    log_every: int = 10
    evaluate_every: int = 0
    evaluation_trajectories: int = 64
    max_skipped_in_a_row: int = 10
    trackers: Literal["auto", "none", "tensorboard", "wandb"] = "auto"
    peak_tflops: float | None = None
    progress: bool = True

    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)

    # Headings of the command's help, each with the field that it begins with.
    GROUPS: ClassVar[dict[str, str]] = {
        "teacher, trajectories and run folder": "teacher",
        "stage": "stage",
        "student": "num_steps",
        "trajectories, if none are given": "num_trajectories",
        "optimisation": "max_steps",
        "memory and speed": "mixed_precision",
        "loss": "loss",
        "checkpoints, log and evaluation": "save_every",
    }

    def __post_init__(self) -> None:
        conform(self, "training")
        check_ranges(self)

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """All decays; the first is the result's."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> TrainConfig:
        """The configuration of settings by name; a name that is none is an InputError that names the nearest."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise InputError(f"training: no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        adversarial = settings.get("adversarial")
        if adversarial is not None:
            settings = {"stage": "adversarial", **settings}
        if isinstance(adversarial, dict):
            settings = {**settings, "adversarial": AdversarialConfig.of(adversarial)}
        return cls(**settings)

    @classmethod
    def read(cls, path: str | Path) -> TrainConfig:
        """The configuration of a recipe, as `pyard train --config` reads it; without one, `out` is the current folder.

        Args:
            path: a YAML file, or the name of one of pyard's recipes, such as `digits`.
        """
        file = recipe_file(path)
        settings = as_object(read_yaml(file, as_written=True), f"recipe {path}", "a mapping of settings")
        found = read_settings(cls, settings, f"recipe {path}")
        if "teacher" not in found:
            raise InputError(f"recipe {path} names no teacher")
        return cls(**{"out": Path(), **found})

    def resolved(self, teacher_depth: int) -> TrainConfig:
        """The configuration with what it leaves open decided, for a teacher of so many layers."""
        layers = default_history_layers(teacher_depth) if self.history_layers is None else self.history_layers
        decided = {name: value for name, value in DEFAULTS.items() if getattr(self, name) is None}
        steps, target = self.num_steps or DEFAULTS["num_steps"], self.target or DEFAULTS["target"]
        output = self.output or default_output(target, steps)
        bias = self.history_bias
        if bias == "auto":
            bias = default_history_bias(output, layers)
        if layers > teacher_depth:
            raise InputError(f"training: history_layers is {layers}; the teacher has {teacher_depth} layers")
        return dataclasses.replace(self, **decided, history_layers=layers, output=output, history_bias=bias)

    def to_yaml(self) -> str:
        """YAML that `pyard train --config` reads back as the same configuration."""
        return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(self), default=str)), sort_keys=False)


def known(value: T | None) -> T:
    """A setting of a resolved configuration, which is not None."""
    assert value is not None
    return value


def recipe_file(name: str | Path) -> Path:
    """The file of a recipe by path, or by the name of one of pyard's own.

    Raises:
        InputError: neither; it lists the names.
    """
    own = {file.stem: file for file in RECIPES.glob("*.yaml")}
    # `recipes/digits.yaml` is the same one wherever the command is given.
    stem = Path(name).stem if str(name) in (Path(name).stem, f"recipes/{Path(name).stem}.yaml") else ""
    if Path(name).is_file() or stem not in own:
        if not Path(name).is_file():
            what = "that is a folder" if Path(name).is_dir() else "no such file"
            raise InputError(
                f"recipe {name}: {what}; expected a YAML file, or one of {', '.join(sorted(own))}; "
                "`pyard train ... --print_config > FILE` writes the settings of any other run to a file"
            )
        return Path(name)
    return own[stem]
