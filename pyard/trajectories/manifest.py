"""The manifest of a trajectory store: all settings that must agree before its numbers may be used."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pyard.diffusion.noise import uniform_labels
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.solvers import Solver, solver_of
from pyard.diffusion.time_grid import Target, TimeGrid
from pyard.errors import InputError

FORMAT_VERSION = 1

MOST_SAMPLES = 10**10 - 1  # shards are named by ten digits
MOST_SHARDS = 2**20
_MOST_SIDE = 2**24
MAX_RANK = 6  # of a sample: a video has 4

# Fingerprint and solver of trajectories that another program wrote, as far as nobody says what they are.
IMPORTED: Final = "unknown"

Keep = Literal["state", "denoised", "both"]
DType = Literal["float32", "float16", "bfloat16"]
Precision = Literal["float32", "bfloat16"]

# Names of safetensors' header, with bytes per number.
SAFETENSORS_DTYPES: dict[str, tuple[str, int]] = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
}


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of a shard: `dtype` is a key of SAFETENSORS_DTYPES."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the tensor's data in bytes."""
        return math.prod(self.shape) * SAFETENSORS_DTYPES[self.dtype][1]


@dataclass(frozen=True)
class TrajectoryManifest:
    """All settings that determine the numbers in a store; two stores that differ in any of them are different.

    Args:
        teacher_fingerprint: sha256 that changes whenever the teacher's predictions do.
        solver: `ddim` for diffusion schedules, `euler` or `heun` for flows, `dpm++2m` for both; `unknown` for imported
            trajectories.
        schedule: the teacher's noise schedule.
        grid: the times of the teacher's trajectory that are stored.
        cfg_scale: guidance weight; 1 means no guidance.
        cfg_channels: number of channels that are guided; None: all.
        cfg_interval: lowest and highest teacher time that is guided; None: all.
        precision: precision in which the teacher computed; `bfloat16` is autocast.
        compiled: whether the teacher was compiled, which changes the last bits.
        sample_shape: [C, ...] of one sample.
        num_classes: number of rows of the teacher's conditions; condition numbers, such as class labels, are 0 ... num_classes
            - 1.
        keep: which tensors are stored beside noise and labels: `state`, `denoised` or `both`.
        dtype: dtype in which `state` and `denoised` are stored; noise is always float32.
        seed: random seed; noise and label of sample i depend only on (seed, i).
        labels: condition numbers: `uniform` (drawn), `balanced` (i mod num_classes) or a tuple: sample i has item i mod its
            length.
        batch_size: number of samples (a fixed range of indices) that the teacher computes together; the states' last bits
            depend on it.
        shard_size: number of samples in a full shard, a multiple of batch_size.
        format_version: version of this format.
        conditions: fingerprint of the table of conditions; empty for classes.
    """

    teacher_fingerprint: str
    solver: Solver | Literal["unknown"]
    schedule: NoiseSchedule
    grid: TimeGrid
    cfg_scale: float
    cfg_channels: int | None
    cfg_interval: tuple[float, float] | None
    precision: Precision
    compiled: bool
    sample_shape: tuple[int, ...]
    num_classes: int
    keep: Keep
    dtype: DType
    seed: int
    labels: Literal["uniform", "balanced"] | tuple[int, ...]
    batch_size: int
    shard_size: int
    format_version: int = FORMAT_VERSION
    conditions: str = ""

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise InputError(f"trajectories: format version {self.format_version}; this pyard reads version {FORMAT_VERSION}")
        # 1 and 1.0 are one setting and must have one digest.
        object.__setattr__(self, "cfg_scale", float(self.cfg_scale))
        for name in ("teacher_fingerprint", "conditions"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"trajectories: {name} is {getattr(self, name)!r:.60}; expected a string")
        shape = self.sample_shape
        if not 1 <= len(shape) <= MAX_RANK or any(not _is_int(size) or not 1 <= size <= _MOST_SIDE for size in shape):
            raise InputError(f"trajectories: sample_shape is {shape}; expected (C, ...), such as (C, H, W), of at least 1 each")
        for name, choices in (("keep", get_args(Keep)), ("dtype", get_args(DType)), ("precision", get_args(Precision))):
            if getattr(self, name) not in choices:
                raise InputError(f"trajectories: {name} is {getattr(self, name)!r}; expected one of {choices}")
        if self.solver != IMPORTED:
            solver_of(self.schedule, self.solver)
        if not _is_int(self.seed) or not 0 <= self.seed < 2**64:
            raise InputError(f"trajectories: seed is {self.seed!r}; expected 0 to 2**64 - 1")
        if not _is_int(self.num_classes) or not 1 <= self.num_classes <= MOST_SAMPLES:
            raise InputError(f"trajectories: num_classes is {self.num_classes!r:.40}; expected 1 to {MOST_SAMPLES}")
        if not math.isfinite(self.cfg_scale):
            raise InputError(f"trajectories: cfg_scale is {self.cfg_scale}; expected a finite number, 1 for no guidance")
        if self.cfg_channels is not None and not (_is_int(self.cfg_channels) and 1 <= self.cfg_channels <= shape[0]):
            raise InputError(f"trajectories: cfg_channels is {self.cfg_channels!r}; expected 1 to {shape[0]}, or None for all")
        if self.cfg_interval is not None:
            interval = tuple(float(time) for time in self.cfg_interval)
            if len(interval) != 2 or not -math.inf < interval[0] <= interval[1] < math.inf:
                raise InputError(
                    f"trajectories: cfg_interval is {interval}; expected (lowest, highest) teacher time, both finite"
                )
            object.__setattr__(self, "cfg_interval", interval)
        if not isinstance(self.compiled, bool):
            raise InputError(f"trajectories: compiled is {self.compiled!r}; expected true or false")
        if not _is_int(self.batch_size) or not 1 <= self.batch_size <= MOST_SAMPLES:
            raise InputError(f"trajectories: batch_size is {self.batch_size!r:.40}; expected 1 to {MOST_SAMPLES}")
        if not _is_int(self.shard_size) or not 1 <= self.shard_size <= MOST_SAMPLES or self.shard_size % self.batch_size:
            raise InputError(
                f"trajectories: shard_size is {self.shard_size!r:.40}; expected a multiple of batch_size, {self.batch_size}"
            )
        self._check_labels()

    def _check_labels(self) -> None:
        if isinstance(self.labels, str):
            if self.labels not in ("uniform", "balanced"):
                raise InputError(
                    f"trajectories: labels is {self.labels!r}; expected 'uniform', 'balanced' or a list of classes"
                )
            return
        if not self.labels:
            raise InputError("trajectories: labels is an empty list; expected at least one class")
        wrong = [label for label in self.labels if not _is_int(label) or not 0 <= label < self.num_classes]
        if wrong:
            raise InputError(
                f"trajectories: label {wrong[0]!r} ({len(wrong)} of {len(self.labels)} are wrong); "
                f"the teacher's classes are 0 to {self.num_classes - 1}"
            )

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the manifest. It is stored in every shard, so that no shard can be read under another manifest."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def sample_bytes(self) -> int:
        """The size of one stored sample in bytes."""
        return sum(tensor.num_bytes for tensor in self.layout(1).values())

    def layout(self, count: int) -> dict[str, TensorLayout]:
        """The tensors of a shard of `count` samples: n = count, S = grid.num_steps."""
        shape = self.sample_shape
        layout = {"label": TensorLayout("int64", (count,)), "noise": TensorLayout("float32", (count, *shape))}
        kept = ("state", "denoised") if self.keep == "both" else (self.keep,)
        return layout | {name: TensorLayout(self.dtype, (count, self.grid.num_steps, *shape)) for name in kept}

    def number_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Condition numbers of samples, such as class labels: int64 [n]."""
        if isinstance(self.labels, str):
            if self.labels == "uniform":
                return uniform_labels(self.seed, indices, self.num_classes)
            return indices % self.num_classes
        return self._given_labels[indices % len(self._given_labels)]

    @functools.cached_property
    def _given_labels(self) -> NDArray[np.int64]:
        return np.array(self.labels, dtype=np.int64)

    def require_target(self, target: Target, where: str) -> None:
        """Raise an InputError if a student with this `target` cannot learn from this store."""
        if target not in get_args(Target):
            raise InputError(f"target is {target!r}; expected one of {get_args(Target)}")
        if self.keep not in (target, "both"):
            raise InputError(
                f"trajectories {where}: target={target!r} needs a store that keeps it, but this one only keeps "
                f"{self.keep!r}; use target={self.keep!r}, or generate another store with keep={target!r} or 'both'"
            )

    def require_equal(self, wanted: TrajectoryManifest, where: str) -> None:
        """Raise an InputError that names both values of each difference. A grid's embed_times may differ."""
        mine, theirs = self._settings(), wanted._settings()
        differences = [
            f"{name} is {_short(mine.get(name))}, requested {_short(theirs.get(name))}"
            for name in {**mine, **theirs}  # a setting may be left out where it has its default
            if mine.get(name) != theirs.get(name)
        ]
        if differences:
            raise InputError(
                f"trajectories {where}: the store holds other trajectories than requested: "
                f"{'; '.join(differences)}. Give the store's settings, or another folder"
            )

    def _settings(self) -> dict[str, Any]:
        """The settings by which stores are compared, with those of schedule and grid under their own names."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("schedule", "grid"):
            settings |= {f"{name}.{key}": value for key, value in settings.pop(name).to_json().items()}
        del settings["grid.embed_times"]
        return settings

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_json` turns back into an equal manifest."""
        config: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, NoiseSchedule | TimeGrid):
                value = value.to_json()
            config[field.name] = list(value) if isinstance(value, tuple) else value
        if not self.conditions:
            del config["conditions"]  # as in manifests that know classes alone, so that digests stay what they are
        return config

    @classmethod
    def from_json(cls, config: Any) -> TrajectoryManifest:
        """The manifest of a `to_json` dictionary; anything else is an InputError."""
        if not isinstance(config, dict):
            raise InputError(f"expected a JSON object, found {type(config).__name__}")
        version = config.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"format version {version!r}; this pyard reads version {FORMAT_VERSION}")
        names = {field.name for field in dataclasses.fields(cls)}
        config = {"conditions": "", **config}
        if set(config) != names:
            missing, unknown = sorted(names - set(config)), sorted(set(config) - names)
            raise InputError(f"settings missing: {missing or 'none'}, unknown: {unknown or 'none'}")
        labels, interval = config["labels"], config["cfg_interval"]
        try:
            return cls(
                **{
                    **config,
                    "schedule": NoiseSchedule.from_json(config["schedule"]),
                    "grid": TimeGrid.from_json(config["grid"]),
                    "sample_shape": tuple(config["sample_shape"]),
                    "cfg_interval": None if interval is None else tuple(interval),
                    "labels": labels if isinstance(labels, str) else tuple(labels),
                }
            )
        except InputError:
            raise
        except (TypeError, AttributeError, ValueError, OverflowError) as error:
            raise InputError(f"a setting of the wrong type: {error}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
