"""What a run starts from: its teacher, the stores, the student before training, and real data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyard.errors import InputError
from pyard.models.student import Student
from pyard.teachers import is_text_to_image, load_teacher
from pyard.teachers.text_to_image.teacher import PipelineTeacher
from pyard.training.config import TrainConfig
from pyard.trajectories import TrajectoryStore, generate_trajectories
from pyard.trajectories.buckets import check_buckets
from pyard.trajectories.store import read_manifest

if TYPE_CHECKING:
    from pyard.models.backbone import Backbone
    from pyard.models.codec import Codec
    from pyard.models.student_config import StudentConfig
    from pyard.teachers.network_teacher import NetworkTeacher
    from pyard.training.processes import Processes
    from pyard.trajectories import TrajectoryManifest

Trajectories = str | Path | TrajectoryStore

# The seed of trajectories that are measured on is this far from the one of those that are trained on.
_HELD_OUT_SEED = 1 << 32


def open_teacher(
    teacher: str | Path, trajectories: Any, config: TrainConfig, network: type[Backbone] | str | None
) -> NetworkTeacher:
    """The teacher by its path; a text-to-image pipeline in the precision of the trajectories that it made."""
    if not is_text_to_image(teacher):
        return load_teacher(teacher, network=network)
    given = trajectories[0] if isinstance(trajectories, list | tuple) and trajectories else trajectories
    precision = config.trajectory_precision
    if isinstance(given, TrajectoryStore):
        precision = given.manifest.precision
    elif isinstance(given, str | Path) and (manifest := read_manifest(Path(given))) is not None:
        precision = manifest.precision
    return load_teacher(
        teacher,
        network=network,
        dtype=precision,
        variant=config.variant,
        transformer=config.transformer,
        lora=config.lora,
    )


def manifests_of(begun: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifests of the stores that a run was begun with, as `TrainConfig.begun` returns it."""
    found = begun["manifest"]
    return found if isinstance(found, list) else [found]


def open_stores(
    teacher: NetworkTeacher, trajectories: Trajectories | Sequence[Trajectories] | None, config: TrainConfig
) -> list[TrajectoryStore]:
    """The stores to train on: the given ones, checked against teacher and S, or a new one in the run folder."""
    if trajectories is None:
        new = generate_trajectories(
            teacher,
            config.out / "trajectories",
            config.num_trajectories,
            num_steps=config.num_steps,
            teacher_steps=config.teacher_steps,
            cfg_scale=config.cfg_scale,
            cfg_channels=config.cfg_channels,
            keep=config.trajectory_keep,
            dtype=config.trajectory_dtype,
            precision=config.trajectory_precision,
            prompts=config.prompts,
            height=config.height,
            width=config.width,
            embedded_guidance=config.embedded_guidance,
            seed=config.seed,
            progress=config.progress,
        )
        return [new]
    given = [trajectories] if isinstance(trajectories, str | Path | TrajectoryStore) else list(trajectories)
    if not given:
        raise InputError("train: trajectories is an empty list; expected at least one store")
    stores = [_open_store(teacher, one, config) for one in given]
    check_buckets(stores)
    return stores


def _open_store(teacher: NetworkTeacher, trajectories: Trajectories, config: TrainConfig) -> TrajectoryStore:
    store = trajectories if isinstance(trajectories, TrajectoryStore) else TrajectoryStore.open(trajectories)
    theirs = store.manifest
    if theirs.teacher_fingerprint != teacher.fingerprint:
        raise InputError(
            f"the trajectories were made by teacher {theirs.teacher_fingerprint[:12]}, but this is teacher "
            f"{teacher.fingerprint[:12]}; generate trajectories with this teacher"
        )
    if theirs.grid.num_steps != config.num_steps:
        raise InputError(f"the trajectories have {theirs.grid.num_steps} steps, but num_steps is {config.num_steps}")
    return store


def open_held_out(
    teacher: NetworkTeacher, config: TrainConfig, stores: Sequence[TrajectoryStore], processes: Processes
) -> list[TrajectoryStore]:
    """Trajectories of the same kind as those trained on, from other noise, for the exposure-bias curve."""
    if not (config.evaluate_every and (processes.is_main or processes.sharded)):
        return []
    paths = [config.out / ("held-out" if len(stores) == 1 else f"held-out-{i}") for i in range(len(stores))]
    if not processes.is_main:
        return [TrajectoryStore.open(path) for path in paths]
    return [_like(teacher, config, store.manifest, path) for store, path in zip(stores, paths, strict=True)]


def _like(teacher: NetworkTeacher, config: TrainConfig, manifest: TrajectoryManifest, path: Path) -> TrajectoryStore:
    begun = read_manifest(path)  # more may be asked for now
    return generate_trajectories(
        teacher,
        path,
        config.evaluation_trajectories,
        grid=manifest.grid,
        cfg_scale=manifest.cfg_scale,
        cfg_channels=manifest.cfg_channels,
        cfg_interval=manifest.cfg_interval,
        solver=None if manifest.solver == "unknown" else manifest.solver,
        precision=manifest.precision,
        keep=config.target,
        seed=(manifest.seed + _HELD_OUT_SEED) % 2**64,
        labels=manifest.labels if isinstance(manifest.labels, str) else list(manifest.labels),
        batch_size=begun.batch_size if begun else min(manifest.batch_size, config.evaluation_trajectories),
        part="1/1",  # rank 0 is alone here
        progress=False,
        sample_shape=manifest.sample_shape,
    )


def first_student(
    teacher: NetworkTeacher, stores: Sequence[TrajectoryStore], config: TrainConfig, earlier: Student | None
) -> Student:
    """The student that training starts from: that of an earlier stage, or the teacher with a history."""
    store = stores[0]
    if earlier is None:
        assert config.history_layers is not None
        assert config.history_bias != "auto"
        return Student.from_teacher(
            teacher,
            store.manifest.grid,
            history_layers=config.history_layers,
            mask=config.mask,
            window=config.window,
            target=config.target,
            output=config.output,
            heads=config.heads,
            history_bias=config.history_bias,
            sample_shapes=[store.manifest.sample_shape for store in stores],
            share=config.lora_rank is not None,
            text=teacher.text_source() if isinstance(teacher, PipelineTeacher) else None,
        )
    if earlier.config.teacher_fingerprint != teacher.fingerprint:
        raise InputError(
            f"student {config.student} was made from teacher {earlier.config.teacher_fingerprint[:12]}, but this is teacher "
            f"{teacher.fingerprint[:12]}; give its own"
        )
    if not earlier.config.grid.same_trajectory(store.manifest.grid):
        raise InputError(
            f"student {config.student} and the trajectories {store.path} have other grids; give those it learnt from"
        )
    earlier.trained_shape(store.manifest.sample_shape)
    earlier.conditions = earlier.conditions or teacher.conditions  # prompts are the trajectories', not the student's
    return earlier


def fits_stock(student: StudentConfig) -> bool:
    """Whether a stock pipeline could draw with the student, if nothing but its linear layers were changed."""
    return student.text is not None and not student.history_layers and student.output == "jump" and student.heads == "shared"


def encoded_real_data(
    config: TrainConfig, sample_shape: tuple[int, ...], student: Student, codec: Codec | None, processes: Processes
) -> str | Path:
    """Where the real data is; pictures are encoded first, each process its share."""
    from pyard.data.real_images import cached_images, is_image_folder

    source = config.adversarial.real
    if source == "digits" or not is_image_folder(Path(source)):
        return source
    shards = cached_images(
        Path(source),
        Path(config.adversarial.real_cache or config.out / "real"),
        sample_shape,
        codec,
        device=processes.device,
        rank=processes.rank,
        world_size=processes.world,
        conditions=student.conditions,
        progress=config.progress and processes.is_main,
    )
    processes.wait(patiently=True)  # encoding takes hours, and some processes have more to encode than others
    return shards


def names_of(trajectories: Trajectories | Sequence[Trajectories] | None) -> str | list[str] | None:
    """The folders of stores, as a `TrainConfig` holds them."""
    if trajectories is None:
        return None
    if isinstance(trajectories, TrajectoryStore):
        return str(trajectories.path)
    if isinstance(trajectories, str | Path):
        return str(trajectories)
    return [str(t.path if isinstance(t, TrajectoryStore) else t) for t in trajectories]
