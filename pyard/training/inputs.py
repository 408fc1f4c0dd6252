"""What a run starts from: its teacher, the stores, the student before training, and real data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyard.errors import InputError
from pyard.models.student import Student
from pyard.teachers import is_text_to_image, load_teacher
from pyard.teachers.text_to_image.teacher import PipelineTeacher
from pyard.training.config import TrainConfig, known
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


def open_teacher(teacher: str | Path, config: TrainConfig, network: type[Backbone] | str | None) -> NetworkTeacher:
    """The teacher by its path; a text-to-image pipeline in the precision of the trajectories."""
    return load_teacher(
        teacher,
        network=network,
        dtype=config.trajectory_precision if is_text_to_image(teacher) else None,
        variant=config.variant,
        transformer=config.transformer,
        lora=config.lora,
    )


def manifests_of(begun: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifests of the stores that a run was begun with, as `TrainConfig.begun` returns it."""
    found = begun["manifest"]
    return found if isinstance(found, list) else [found]


def read_counts(stores: Sequence[TrajectoryStore], begun_with: Sequence[int]) -> list[int]:
    """How many trajectories of each store are read: one that has grown since the run began is read as far as it went then."""
    return [min(store.count, *begun_with[i : i + 1]) if begun_with[i:] else store.count for i, store in enumerate(stores)]


def given_stores(trajectories: Trajectories | Sequence[Trajectories]) -> list[TrajectoryStore]:
    """The stores that are given to train on."""
    given = [trajectories] if isinstance(trajectories, str | Path | TrajectoryStore) else list(trajectories)
    if not given:
        raise InputError("train: trajectories is an empty list; expected at least one store")
    stores = [one if isinstance(one, TrajectoryStore) else TrajectoryStore.open(one) for one in given]
    check_buckets(stores)
    return stores


def check_teacher(teacher: NetworkTeacher, stores: Sequence[TrajectoryStore]) -> None:
    """Raises InputError if another teacher made the stores."""
    for store in stores:
        made_by = store.manifest.teacher_fingerprint
        if made_by != teacher.fingerprint:
            raise InputError(
                f"the trajectories {store.path} were made by teacher {made_by[:12]}, but this is teacher "
                f"{teacher.fingerprint[:12]}; generate trajectories with this teacher"
            )


def new_store(teacher: NetworkTeacher, config: TrainConfig) -> TrajectoryStore:
    """The store in the run folder; each process writes its part of it, and waits for the others."""
    return generate_trajectories(
        teacher,
        config.out / "trajectories",
        known(config.num_trajectories),
        num_steps=known(config.num_steps),
        teacher_steps=config.teacher_steps,
        cfg_scale=config.cfg_scale,
        cfg_channels=config.cfg_channels,
        solver=config.solver,
        keep=known(config.trajectory_keep),
        dtype=known(config.trajectory_dtype),
        precision=config.trajectory_precision,
        prompts=config.prompts,
        height=config.height,
        width=config.width,
        embedded_guidance=config.embedded_guidance,
        seed=config.seed,
        progress=config.progress,
    )


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
        keep=known(config.target),
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
        assert config.history_bias != "auto"
        return Student.from_teacher(
            teacher,
            store.manifest.grid,
            history_layers=known(config.history_layers),
            mask=known(config.mask),
            window=config.window,
            target=known(config.target),
            output=config.output,
            heads=known(config.heads),
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
    for store in stores:
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
