"""`pyard.train`: distils a teacher into a student, in all stages."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyard.conditions import PromptTable
from pyard.errors import InputError
from pyard.models.fingerprint import weights_digest
from pyard.models.lora import add_lora, merge_lora
from pyard.models.student import Student
from pyard.storage.lock import only_one
from pyard.teachers import is_text_to_image
from pyard.teachers.text_to_image.teacher import PipelineTeacher
from pyard.training import identity
from pyard.training.agreement import agree_with_pipeline, agree_with_stores, agree_with_student, check_target
from pyard.training.config import TrainConfig, known
from pyard.training.early import check_before_generating, names_of_results, require_run_folder
from pyard.training.inputs import (
    Trajectories,
    check_teacher,
    default_lora_heads,
    first_student,
    given_stores,
    manifests_of,
    names_of,
    new_store,
    open_held_out,
    open_real_data,
    open_teacher,
    read_counts,
)
from pyard.trajectories import TrajectoryReader
from pyard.trajectories.buckets import BatchReader, BucketReader

if TYPE_CHECKING:
    from pyard.models.backbone import Backbone
    from pyard.teachers.network_teacher import NetworkTeacher
    from pyard.training.processes import Processes

_REAL = 3  # the draws of the real data, as a part of their seed
_ADDITIONS = 4  # those of the start of low-rank additions
_LOST = ("by peer", "Broken pipe")  # what gloo says where another process has gone


def train(
    teacher: str | Path | NetworkTeacher | TrainConfig,
    trajectories: Trajectories | Sequence[Trajectories] | None = None,
    *,
    out: str | Path | None = None,
    **settings: Any,
) -> Student:
    """Distil a teacher into a student of a few steps.

    Missing trajectories are generated first. An interrupted run resumes from its last checkpoint and ends with the same weights
    as an uninterrupted run. On SIGTERM or SIGUSR1, the run writes a checkpoint (or stops its preparations) and exits with
    status 75. Ctrl-C does the same with status 130; a second Ctrl-C ends the run at once. Several processes
    (`torchrun -m pyard train ...`, `accelerate launch -m pyard train ...`) share each update.

    The folder `out` then has `student/` (averaged weights), `settings.yaml` (all settings, which `pyard train --config` reads),
    `log.jsonl` and `checkpoints/`; with `evaluate_every`, also `exposure_bias.jsonl`, `tensorboard/`, and, in `grids/`,
    pictures of the first prompts or of 20 samples of the classes in turn.

    Example: pyard train --config digits --out runs/digits

    Args:
        teacher: `digits`, a teacher's folder, or a teacher; or a whole `TrainConfig` as the only argument.
        trajectories: a store that `generate_trajectories` wrote with this teacher, or its folder; or a list with a store for
            each sample shape (each batch comes from one store, in proportion to its number of full batches); None: generate
            them.
        out: the run folder.
        settings: further fields of `TrainConfig`, which documents them.

    Returns:
        The student with its averaged weights, in evaluation mode.

    Raises:
        InputError: settings contradict each other, the store, or the run in `out`; another process is training in `out`; too
            many updates were not finite; memory ran out; or the disk is full.
        Preempted: a signal asked the run to end (a SystemExit).
    """
    given_teacher, given_store = teacher, trajectories
    backbone = settings.get("network")
    if isinstance(backbone, type):
        settings["network"] = f"{backbone.__module__}:{backbone.__qualname__}"
    if isinstance(teacher, TrainConfig):
        if trajectories is not None or out is not None or settings:
            raise InputError("train: a TrainConfig must be the only argument; use dataclasses.replace to change a field of it")
        config = teacher
        given_teacher, given_store, backbone = config.teacher, config.trajectories, config.network
    else:
        if out is None:
            raise InputError("train: out is missing; expected the run folder")
        named = {
            "teacher": str(teacher) if isinstance(teacher, str | Path) else "",
            "trajectories": names_of(trajectories),
        }
        config = TrainConfig.of({**named, "out": Path(out), **settings})
    # Importing accelerate and diffusers takes seconds, which `pyard train --help` need not wait for.
    from pyard.training.processes import Processes, ends_at_once, own_random_state

    processes = Processes(config.mixed_precision, config.parallel, is_finished=identity.is_finished(config))
    with own_random_state(processes.device), ends_at_once(), contextlib.ExitStack() as held:
        with processes.main_first():
            if processes.is_main:  # one lock for all processes of a run
                held.enter_context(only_one(config.out, "training"))
        try:
            return _run(config, given_teacher, given_store, processes, backbone)
        except RuntimeError as error:  # as torch raises it of gloo
            if processes.world > 1 and any(words in str(error) for words in _LOST):
                message = "training: another process of this run has ended; its output says why, and the same command resumes"
                raise InputError(message) from None
            raise


def train_command(config: TrainConfig) -> None:
    """Distil a teacher into a student of a few steps.

    Missing trajectories are generated first. The same command resumes a run that was stopped, to the same weights as one that
    was not. SIGTERM and SIGUSR1 make a run write a checkpoint and end with status 75, Ctrl-C with status 130. Several processes
    share the work: torchrun --nproc-per-node 8 -m pyard train ...

    Example: pyard train --config digits --out runs/digits
    """
    from pyard.data.digits import DIGIT_SHAPE

    if not config.teacher:
        raise InputError("--teacher is missing; expected 'digits', 'scenes-text' or the path of a teacher")
    student = train(config)
    if int(os.environ.get("RANK", 0)) == 0:
        out, teacher = config.out, config.teacher
        features = " --features inception-2015-12-05.pt --reference FOLDER_OF_PICTURES"
        following = [
            f"pyard sample --student {out} --out samples.png",
            f"pyard evaluate --students {out} --teacher {teacher}{'' if student.sample_shape == DIGIT_SHAPE else features}",
            f"pyard export --student {out} --onnx student.onnx",
        ]
        if is_text_to_image(teacher):
            following = [
                f'pyard sample --student {out} --prompts "a red circle" --out samples.png',
                f"pyard evaluate --students {out} --prompts prompts.txt",
            ]
        print(f"{config.max_steps} updates done; the student is {out / 'student'}, the log {out / 'log.jsonl'}. Next:")
        print("\n".join(f"  {command}" for command in following))


def _run(
    config: TrainConfig, teacher: Any, trajectories: Any, processes: Processes, network: type[Backbone] | str | None
) -> Student:
    from pyard.data.real_data import RealReader
    from pyard.training.adversarial import Adversarial
    from pyard.training.loop import checkpoints_of, step_to_resume, train_stage
    from pyard.training.processes import seed_of
    from pyard.training.regression import Regression
    from pyard.training.sharded import save_sharded
    from pyard.training.watch import Watcher

    if config.batch_size % (processes.world * config.gradient_accumulation):
        raise InputError(
            f"training: batch_size {config.batch_size} is not a multiple of {processes.world} processes times "
            f"gradient_accumulation {config.gradient_accumulation}"
        )
    require_run_folder(config)
    begun = identity.begun(config)  # what it was begun with, before hours go into something else
    counts = [] if begun is None else [manifest["count"] for manifest in manifests_of(begun)]
    stores, is_given = [] if trajectories is None else given_stores(trajectories), trajectories is not None
    if is_given:
        config = agree_with_stores(config, stores, read_counts(stores, counts))
    read_here = isinstance(teacher, str | Path)
    if read_here:
        with processes.main_first():  # the built-in teacher is trained on first use
            teacher = open_teacher(teacher, config, network, stores)
    elif wrong := [name for name in ("variant", "transformer", "lora") if getattr(config, name) is not None]:
        raise InputError(f"training: {wrong[0]} is for a teacher given by its folder")
    network = type(teacher.network.trunk)
    if config.compile and network.not_compiled is not None:
        raise InputError(f"training: compile does not work with {network.__name__}: {network.not_compiled}; leave it out")
    home = teacher.device
    teacher.to(processes.device)
    shared = teacher.network if isinstance(teacher, PipelineTeacher) else None
    earlier = None if config.student is None else Student.from_pretrained(config.student, network=network, base=shared)
    if earlier is not None:
        config = agree_with_student(config, earlier.config)
    config = config.resolved(teacher.network.config.depth)
    if is_given:
        check_teacher(teacher, stores)
        check_target(known(config.target), stores)
    else:
        if counts and counts[0] < known(config.num_trajectories):
            raise InputError(
                f"{config.out} holds a run on {counts[0]} trajectories, but num_trajectories is "
                f"{config.num_trajectories}; use another --out, or remove it"
            )
        config = check_before_generating(config, teacher, earlier, processes.world)
        stores = [new_store(teacher, config)]
        config = dataclasses.replace(config, num_trajectories=None)
        config = agree_with_stores(config, stores, read_counts(stores, counts))
    config = agree_with_pipeline(config, stores, teacher, given=is_given)
    if isinstance(teacher, PipelineTeacher):
        table = stores[0].conditions
        assert isinstance(table, PromptTable)
        if is_given and processes.is_main:  # one process reads all files of the text encoders
            table.require_encoder(teacher.text_encoder)
        teacher = teacher.with_prompts(table)
    with processes.main_first():
        held_out = open_held_out(teacher, config, stores, processes)
    student = first_student(teacher, stores, config, earlier).to(processes.device)
    if config.lora_rank is None:
        student.float()  # small updates vanish in bfloat16; mixed_precision says what is computed in it
    theirs = stores[0].manifest
    trained_on = {name: getattr(theirs, name) for name in ("cfg_scale", "cfg_channels", "cfg_interval", "solver")}
    student.config = dataclasses.replace(student.config, **trained_on)
    if config.lora_rank is not None and student.lora is None:
        heads = config.lora_heads or default_lora_heads(student.config, student.config.text is not None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(config.seed, _ADDITIONS))  # the same in all processes
            add_lora(student, config.lora_rank, heads)
        if isinstance(teacher, PipelineTeacher) and earlier is None:
            student.config = dataclasses.replace(student.config, base=teacher.base_source(config.lora_rank, heads))
    read = read_counts(stores, counts)
    manifests = [{**store.manifest.to_json(), "count": count} for store, count in zip(stores, read, strict=True)]
    inputs = {"teacher_fingerprint": teacher.fingerprint, "manifest": manifests[0] if len(manifests) == 1 else manifests}
    if earlier is not None:
        inputs["student_fingerprint"] = weights_digest(student)
    stage: Regression
    if config.stage == "adversarial":
        shape = stores[0].manifest.sample_shape
        data, shown = open_real_data(config, teacher, student, shape, processes)
        inputs["real_fingerprint"] = data.fingerprint()
        if shown is not student.conditions:
            inputs["real_prompts"] = shown.fingerprint
    with processes.main_first():
        if processes.is_main:
            identity.resume_or_begin(config, **inputs)
    if processes.reopens:
        return Student.from_pretrained(config.out, network=network, base=shared).to(processes.device)
    readers = [
        TrajectoryReader(
            store,
            config.batch_size // processes.world,
            target=known(config.target),
            seed=config.seed,
            rank=processes.rank,
            world_size=processes.world,
            count=count,
        )
        for store, count in zip(stores, read, strict=True)
    ]
    reader: BatchReader = readers[0] if len(readers) == 1 else BucketReader(readers, config.seed)
    if config.stage == "adversarial":
        real = RealReader(
            data,
            config.batch_size,
            seed=seed_of(config.seed, _REAL),
            flips=config.adversarial.flips,
            rank=processes.rank,
            world_size=processes.world,
        )
        stage = Adversarial(config, student, processes, teacher, real, shown)
    else:
        # The regression only needs trajectories: one model less in memory, or on the device if the caller has the teacher.
        if read_here:
            teacher = shared = None
        else:
            teacher.to(home)
        stage = Regression(config, student, processes)
    averages = stage.averages
    checkpoints = checkpoints_of(student, config, processes)
    begin = step_to_resume(checkpoints, processes)
    # Shards are gathered by all processes together, so that all have to look.
    looks = processes.is_main or processes.sharded
    watcher = Watcher(config, averages[0], held_out, begin, records=processes.is_main) if looks else None
    try:
        train_stage(
            stage,
            student,
            reader,
            config,
            processes,
            watcher or (lambda step, measured: None),
            checkpoints=checkpoints,
            begin=begin,
            flush=watcher.flush if watcher else lambda: None,
        )
    finally:
        if watcher is not None:
            watcher.finish()
    _refuse_diverged(averages, config)
    for i, name in enumerate(names_of_results(config)):
        if processes.sharded:
            save_sharded(averages[i], config.out / name, processes)
            continue
        if averages[i].config.base is None:
            merge_lora(averages[i])
        with processes.main_first():
            if processes.is_main:
                averages[i].save_pretrained(config.out / name)
    return (
        Student.from_pretrained(config.out, network=network, base=shared).to(processes.device)
        if processes.sharded
        else averages[0].eval()
    )


def _refuse_diverged(averages: list[Student], config: TrainConfig) -> None:
    """Raise an InputError if averaged weights are not finite, or so large that they use up half of their dtype's range."""
    from torch.distributed.tensor import DTensor

    for student in averages:
        tops = []
        for weight in student.parameters():
            # Gathered one by one: a process may have nothing of a small one, and nothing has no maximum.
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            tops.append(whole.detach().abs().amax().float().cpu() if whole.numel() else torch.zeros(()))
        largest = float(torch.stack(tops).amax())  # NaN if one of them is
        if not largest < 1e18:  # also true of NaN; products of two such numbers overflow
            raise InputError(
                f"training: the student has diverged: its averaged weights reach {largest:.3g}. Lower --learning_rate (now "
                f"{config.learning_rate:g}) or --grad_clip, and train into another --out; no student was written"
            )
