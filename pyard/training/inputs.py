"""What a run starts from: its teacher, the stores, the student before training, and real data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyard.conditions import Conditions, PromptLine, PromptTable
from pyard.conditions.prompt_file import METADATA_NAME, has_captions, read_captions
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.teachers import is_text_to_image, load_teacher
from pyard.teachers.text_to_image.teacher import PipelineTeacher
from pyard.training.config import TrainConfig, known
from pyard.training.early import require_own_teacher
from pyard.trajectories import TrajectoryStore, generate_trajectories
from pyard.trajectories.buckets import check_buckets
from pyard.trajectories.of_pipelines import text_limit
from pyard.trajectories.store import read_manifest

if TYPE_CHECKING:
    from pyard.data.real_data import RealData
    from pyard.models.backbone import Backbone
    from pyard.models.student_config import LoraHeads, StudentConfig
    from pyard.teachers.network_teacher import NetworkTeacher
    from pyard.training.processes import Processes
    from pyard.trajectories import TrajectoryManifest

Trajectories = str | Path | TrajectoryStore

# The seed of trajectories that are measured on is this far from the one of those that are trained on.
_HELD_OUT_SEED = 1 << 32


def open_teacher(
    teacher: str | Path, config: TrainConfig, network: type[Backbone] | str | None, stores: Sequence[TrajectoryStore]
) -> NetworkTeacher:
    """The teacher by its path; a text-to-image pipeline with the precision and the text limit of the trajectories."""
    of_pipeline = is_text_to_image(teacher)
    return load_teacher(
        teacher,
        network=network,
        dtype=config.trajectory_precision if of_pipeline else None,
        max_sequence_length=text_limit(stores[0].conditions) if of_pipeline and stores else None,
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
    """The stores that are given to train on; an InputError if one lacks trajectories."""
    given = [trajectories] if isinstance(trajectories, str | Path | TrajectoryStore) else list(trajectories)
    if not given:
        raise InputError("train: trajectories is an empty list; expected at least one store")
    stores = [one if isinstance(one, TrajectoryStore) else TrajectoryStore.open(one) for one in given]
    for store in stores:
        store.require_complete()  # before a run begins: its settings say how many there are
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
        batch_size=config.trajectory_batch_size,
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
    if earlier is None:
        assert config.history_bias != "auto"
        return Student.from_teacher(
            teacher,
            [one.manifest.grid for one in stores],
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
    require_own_teacher(config, earlier, teacher)
    for store in stores:
        shape = earlier.trained_shape(store.manifest.sample_shape)
        if not earlier.config.grid_of(shape).same_trajectory(store.manifest.grid):
            raise InputError(
                f"student {config.student} and the trajectories {store.path} have different grids; give the trajectories that "
                "it was trained on"
            )
    earlier.scores = None  # they are of the weights that it starts from
    earlier.conditions = earlier.conditions or teacher.conditions  # prompts are the trajectories', not the student's
    return earlier


def default_lora_heads(student: StudentConfig, of_pipeline: bool) -> LoraHeads:
    """`lora` where a stock pipeline could draw with the student if nothing but its linear layers were changed, else `whole`."""
    fits_stock = not student.history_layers and student.output == "jump" and student.heads == "shared"
    return "lora" if of_pipeline and fits_stock else "whole"


def open_real_data(
    config: TrainConfig, teacher: NetworkTeacher, student: Student, sample_shape: tuple[int, ...], processes: Processes
) -> tuple[RealData, Conditions]:
    """The real data, and what its labels are numbers of; pictures are encoded first, each process its share.

    Raises:
        InputError: real data that cannot be read, or that the student could not have drawn.
    """
    from pyard.data.real_data import RealData
    from pyard.data.real_images import cached_images, cached_pictures, is_image_folder

    source, conditions = config.adversarial.real, student.require_conditions()
    folder, cache = Path(source), Path(config.adversarial.real_cache or config.out / "real")
    codec = student.codec or teacher.codec
    shared: dict[str, Any] = dict(
        device=processes.device,
        rank=processes.rank,
        world_size=processes.world,
        progress=config.progress and processes.is_main,
    )
    if isinstance(teacher, PipelineTeacher) and (source == "digits" or is_image_folder(folder)) and not has_captions(folder):
        raise InputError(
            f"real data {source}: found classes, but this student draws from prompts; expected a folder of pictures with "
            f"{METADATA_NAME}, one line per picture with file_name and text"
        )
    if isinstance(teacher, PipelineTeacher) and has_captions(folder):
        captions = read_captions(folder)
        with processes.main_first():  # encoded by one, opened by the others
            conditions = _table_of_captions(teacher, captions, cache / "conditions", config)
        files = [(file, number) for number, (file, _) in enumerate(captions)]
        source = str(cached_pictures(folder, files, cache, sample_shape, codec, **shared))
    elif source != "digits" and is_image_folder(folder):
        source = str(cached_images(folder, cache, sample_shape, codec, conditions=conditions, **shared))
    processes.wait(patiently=True)  # encoding takes hours, and some processes have more to encode than others
    return RealData.load(source, sample_shape, conditions.count), conditions


def _table_of_captions(
    teacher: PipelineTeacher, captions: list[tuple[Path, PromptLine]], folder: Path, config: TrainConfig
) -> PromptTable:
    """The captions as conditions of the student's kind: of the same text encoders, with the same constants."""
    learnt = teacher.conditions
    assert isinstance(learnt, PromptTable)
    table = PromptTable.build(
        teacher.text_encoder,
        [line for _, line in captions],
        folder,
        constants=learnt.record.constants,
        default_negative=teacher.family.negative_prompt,
        progress=config.progress,
    )
    if table.record.encoder != learnt.record.encoder:
        raise InputError(
            f"real data {config.adversarial.real}: its texts were encoded by other text encoders than the trajectories' "
            f"prompts in {learnt.folder}; restore the pipeline's folder, or generate the trajectories again"
        )
    return table


def names_of(trajectories: Trajectories | Sequence[Trajectories] | None) -> str | list[str] | None:
    """The folders of stores, as a `TrainConfig` holds them."""
    if trajectories is None:
        return None
    if isinstance(trajectories, TrajectoryStore):
        return str(trajectories.path)
    if isinstance(trajectories, str | Path):
        return str(trajectories)
    return [str(t.path if isinstance(t, TrajectoryStore) else t) for t in trajectories]
