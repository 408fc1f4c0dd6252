"""The cost of a student: parameters, FLOPs and cache, and how much of them the history adds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from pyard.conditions import Condition
from pyard.cost.flops import flops_per_pass, update_flops, without_weights
from pyard.errors import InputError
from pyard.estimate.disk import manifest_of
from pyard.estimate.recipe_cost import one_condition, passes_of, student_of, text_shape, trajectory_flops
from pyard.models.backbone import Backbone
from pyard.models.student import Student
from pyard.models.student_config import TextSource
from pyard.models.wrapped.config import WrappedConfig
from pyard.teachers.published import is_teacher, outline_of
from pyard.teachers.text_to_image.pipelines import PIPELINES
from pyard.teachers.text_to_image.published import PUBLISHED
from pyard.training.config import TrainConfig


@dataclass(frozen=True)
class Description:
    """The cost of a student for one image; a multiply-add counts as two FLOPs.

    Args:
        num_steps: S, the number of steps.
        history_layers: N, the number of layers with a history.
        parameters: number of parameters of the whole student.
        trainable_parameters: number of parameters that training changes.
        flops_per_pass: FLOPs of each of the S passes; later passes see more history.
        flops_without_history: FLOPs of all S passes with N = 0.
        flops_per_update: FLOPs of an update on one trajectory, forward and backward.
        cache_bytes: bytes of the keys and values that are kept between the passes, in the dtype of the weights.
        teacher: the cost of the teacher, if `describe` was given a teacher; None: it was given a student.
    """

    num_steps: int
    history_layers: int
    parameters: int
    trainable_parameters: int
    flops_per_pass: tuple[int, ...]
    flops_without_history: int
    flops_per_update: int
    cache_bytes: int
    teacher: TeacherDescription | None = None

    @property
    def flops_per_image(self) -> int:
        """FLOPs of all S passes."""
        return sum(self.flops_per_pass)

    @property
    def history_percent(self) -> float:
        """By how many percent the history increases the FLOPs, compared with the same student with N = 0."""
        return 100 * (self.flops_per_image / self.flops_without_history - 1)

    def __str__(self) -> str:
        passes = ", ".join(_short(flops, "FLOPs") for flops in self.flops_per_pass)
        trained = "" if self.trainable_parameters == self.parameters else f", {_short(self.trainable_parameters, '')} trained"
        whose = "" if self.teacher is None else "student "
        rows = [
            ("steps", f"{self.num_steps}, history in the lowest {self.history_layers} layers"),
            ("parameters", f"{_short(self.parameters, '')}{trained}"),
            ("per pass", passes),
            ("per image", _short(self.flops_per_image, "FLOPs")),
            ("per update", f"{_short(self.flops_per_update, 'FLOPs')} a trajectory"),
        ]
        return "\n".join([
            *([] if self.teacher is None else [str(self.teacher)]),
            *(f"{whose + name:<18} {text}" for name, text in rows),
            f"cache per image    {_short(self.cache_bytes, 'B')}",
            f"cost of history    +{self.history_percent:.2f} % of the FLOPs without",
        ])  # fmt: skip


@dataclass(frozen=True)
class TeacherDescription:
    """The cost of a teacher for one image.

    Args:
        parameters: number of parameters of its network.
        steps: number of solver steps that `pyard.generate_trajectories` takes by default.
        passes: number of network passes, including those for guidance.
        flops_per_image: FLOPs of all passes.
    """

    parameters: int
    steps: int
    passes: int
    flops_per_image: float

    def __str__(self) -> str:
        image = f"{self.steps} steps, {self.passes} passes, {_short(self.flops_per_image, 'FLOPs')} an image"
        return f"teacher            {_short(self.parameters, '')} parameters; {image}"


def describe(
    student: Student | str | Path,
    *,
    network: type[Backbone] | str | None = None,
    num_steps: int | None = None,
    history_layers: int | None = None,
    steps_per_update: int | None = None,
) -> Description:
    """Print what a student costs.

    For a teacher, print what its student would cost; only the configuration is read, no weights.

    Example: pyard describe runs/digits

    Args:
        student: a run folder or a student folder; or a teacher: its folder, or a published name such as
            `DiT-XL/2`, `sd3.5-medium` or `black-forest-labs/FLUX.1-dev`.
        network: package.module:Class of the student's backbone, if it is not one of pyard's. In Python also the class itself.
        num_steps: S of a teacher's student; none: 4.
        history_layers: N of a teacher's student; none: a quarter of the layers, rounded up.
        steps_per_update: steps that each training update learns, for the cost of an update; none: all.

    Returns:
        The numbers, for one image.
    """
    if isinstance(student, str | Path) and not Path(student).exists() and "/" not in str(student) and not is_teacher(student):
        raise InputError(
            f"describe: {str(student)!r} is neither an existing path nor a published name; expected a folder, or a name such "
            f"as DiT-XL/2, {', '.join(pipeline.name for pipeline in PUBLISHED)}"
        )
    if not isinstance(student, Student) and is_teacher(student):
        description = _of_teacher(student, network, num_steps, history_layers, steps_per_update)
    else:
        for name, value in (("num_steps", num_steps), ("history_layers", history_layers)):
            if value is not None:
                raise InputError(
                    f"describe: {name} is {value}, but {student!s:.80} is a student, which has its own; leave it out"
                )
        student = student if isinstance(student, Student) else Student.from_pretrained(student, network=network)
        description = count(student, steps_per_update=steps_per_update)
    print(description)
    return description


def _of_teacher(
    source: str | Path,
    network: type[Backbone] | str | None,
    num_steps: int | None,
    history_layers: int | None,
    steps_per_update: int | None,
) -> Description:
    teacher = outline_of(source, network)
    config = TrainConfig(
        teacher=str(source),
        out=Path(),
        num_steps=4 if num_steps is None else num_steps,
        history_layers=history_layers,
        heads="per_step" if teacher.pipeline is None else "shared",
    )
    config, student = student_of(config, teacher)
    condition = one_condition(config, teacher, student, text_shape(teacher, None))
    manifest = manifest_of(config, teacher, 1)
    return dataclasses.replace(
        count(student, condition, steps_per_update),
        teacher=TeacherDescription(
            parameters=sum(p.numel() for p in teacher.network.parameters()),
            steps=manifest.grid.teacher_steps,
            passes=passes_of(manifest),
            flops_per_image=trajectory_flops(manifest, 1, teacher, condition),
        ),
    )


def count(student: Student, condition: Condition | None = None, steps_per_update: int | None = None) -> Description:
    """The numbers of `describe`, counted while the student runs without data (on the meta device).

    Args:
        student: the student, on any device.
        condition: condition of one sample; None: the first row of the student's table, or for a text-to-image student a prompt
            of the greatest length.
        steps_per_update: number of steps that an update learns; None: all steps.

    Raises:
        InputError: more steps than the student has, or none.
    """
    config = student.config
    if steps_per_update is not None and not 1 <= steps_per_update <= student.num_steps:
        raise InputError(f"describe: steps_per_update is {steps_per_update}; expected 1 to {student.num_steps}, or none")
    if condition is None and student.conditions is None and config.text is not None:
        condition = _longest_text(config.text, student)
    shapes = student.trunk.attention_shapes(config.history_layers, student.sample_shape)
    kept = 2 * student.num_steps * sum(math.prod(shape) for shape in shapes)
    weightless = without_weights(student)
    plain = Student(dataclasses.replace(config, history_layers=0, history_bias=None), weightless.trunk, weightless.heads[0])
    plain.conditions = student.conditions
    return Description(
        num_steps=student.num_steps,
        history_layers=config.history_layers,
        parameters=sum(p.numel() for p in student.parameters()),
        trainable_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
        flops_per_pass=flops_per_pass(student, condition),
        flops_without_history=sum(flops_per_pass(plain, condition)),
        flops_per_update=int(update_flops(student, 1, condition, steps_per_update)),
        cache_bytes=kept * next(student.trunk.parameters()).element_size(),
    )


def _longest_text(text: TextSource, student: Student) -> Condition:
    family = PIPELINES[text.pipeline]
    assert isinstance(student.config.network, WrappedConfig)
    limit = text.max_sequence_length or family.max_sequence_length
    return family.encode.shape(student.config.network.transformer, limit).condition(text.constants)


def _short(value: float, unit: str) -> str:
    if value < 1000:
        return f"{value:.0f} {unit}".rstrip()
    power = min(5, int(math.log10(value) / 3))
    return f"{value / 1000**power:.3g} {' kMGTP'[power]}{unit}"
