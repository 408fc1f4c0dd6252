"""Students in shards: FSDP2 by torch's own `fully_shard`, checkpoints that each process writes its part of, and consolidation.

Accelerate is in the way here: on a CPU it falls back to DDP without a word, and it has no say in what `fully_shard` does.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from pyard.conditions import load_conditions
from pyard.errors import InputError
from pyard.models.backbone import Backbone
from pyard.models.base import read_base
from pyard.models.codec import LatentCodec
from pyard.models.families import backbone_class
from pyard.models.folder import require_sizes
from pyard.models.lora import add_lora, merge_lora
from pyard.models.student import Student
from pyard.models.student_config import LoraHeads, StudentConfig
from pyard.storage.checkpoints import Checkpoints, Stateful
from pyard.storage.numbers import whole_number
from pyard.storage.pickles import DTYPES, require_names
from pyard.storage.reading import MOST_LABELLED_BYTES, as_object, read_object, read_yaml, reading
from pyard.storage.tensor_files import read_safetensors, require_finite, tensor_shapes
from pyard.storage.trained import load_trained, trained_names
from pyard.teachers import load_teacher
from pyard.training.config import SETTINGS_NAME

if TYPE_CHECKING:
    from pyard.training.processes import Processes

# What torch's description of a checkpoint in shards is made of.
_OF_SHARDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "StorageMeta",
        "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *DTYPES},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip

_SHARDS = "shards"  # the part of a checkpoint that all processes write


def shard(student: Student, processes: Processes) -> None:
    """Split a student's parameters over the processes, block by block; they become DTensors."""
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for block in student.trunk.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(student, mesh=mesh)
    # Sampling enters the student by `step`, where its own parameters have to be gathered too.
    register_fsdp_forward_method(student, "step")
    plain = [name for name, parameter in student.named_parameters() if not isinstance(parameter, DTensor)]
    if plain:
        raise RuntimeError(f"parameters that fully_shard left whole: {plain}")


def save_sharded(student: Student, path: Path, processes: Processes) -> None:
    """Write the folder of a student in shards, by rank 0. All processes must call it."""
    names_base = student.config.base is not None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=names_base)
    tensors: dict[str, Any] = get_model_state_dict(student, options=options)
    with processes.main_first():
        if not processes.is_main:
            return
        if names_base:
            student.write_folder(path, {name: tensors[name] for name in trained_names(student)})
            return
        whole = Student(student.config, type(student.trunk)(student.config.network))
        if student.lora is not None:
            add_lora(whole, student.lora.rank, student.lora.heads)
        whole.load_state_dict(tensors)
        whole.codec, whole.conditions = student.codec, student.conditions
        whole.save_pretrained(path)


class ShardedCheckpoints(Checkpoints):
    """Checkpoints whose modules and optimizer are written by all processes, each its shards; all of them call `save`.

    Args:
        path, keep_last, keep_every: as in `Checkpoints`.
        model: whose optimizer it is.
        processes: who writes.
    """

    def __init__(self, path: Path, keep_last: int, keep_every: int | None, model: nn.Module, processes: Processes):
        super().__init__(path, keep_last, keep_every)
        self.model, self.processes = model, processes

    def save(self, step: int, parts: Mapping[str, Stateful], state: Mapping[str, Any] | None = None) -> None:
        shards = self.path / f".{self.folder(step).name}.{_SHARDS}"
        with self.processes.main_first():
            if self.processes.is_main:
                shutil.rmtree(shards, ignore_errors=True)
                shards.mkdir(parents=True)
        try:
            with _plain_errors():
                save_shards(self._sharded(parts), checkpoint_id=shards)
        except Exception as error:
            with self.processes.main_first():
                if self.processes.is_main:
                    shutil.rmtree(shards, ignore_errors=True)
            raise self.unwritable(step, error) from error
        with self.processes.main_first():
            if self.processes.is_main:
                try:
                    self._shards = shards
                    super().save(step, parts, state)
                finally:
                    shutil.rmtree(shards, ignore_errors=True)

    def _write(self, folder: Path, parts: Mapping[str, Stateful]) -> None:
        self._shards.rename(folder / _SHARDS)
        super()._write(folder, {name: part for name, part in parts.items() if not self._is_sharded(part)})

    def _read(self, folder: Path, parts: Mapping[str, Stateful]) -> None:
        super()._read(folder, {name: part for name, part in parts.items() if not self._is_sharded(part)})
        tensors = self._sharded(parts)
        require_names(folder / _SHARDS / ".metadata", _OF_SHARDS)
        with _plain_errors():
            load_shards(tensors, checkpoint_id=folder / _SHARDS)
        for name, part in parts.items():
            if not self._is_sharded(part):
                continue
            if isinstance(part, torch.optim.Optimizer):
                set_optimizer_state_dict(self.model, part, optim_state_dict=tensors[name])
            else:
                module = _module(part)
                is_whole = len(tensors[name]) == len(module.state_dict())
                set_model_state_dict(module, tensors[name], options=StateDictOptions(strict=is_whole))

    def _sharded(self, parts: Mapping[str, Stateful]) -> dict[str, Any]:
        return {
            name: get_optimizer_state_dict(self.model, part)
            if isinstance(part, torch.optim.Optimizer)
            else _trained_state(_module(part))
            for name, part in parts.items()
            if self._is_sharded(part)
        }

    def _is_sharded(self, part: Stateful) -> bool:
        if isinstance(part, torch.optim.Optimizer):
            return any(isinstance(p, DTensor) for group in part.param_groups for p in group["params"])
        return isinstance(part, nn.Module) and any(isinstance(p, DTensor) for p in part.parameters())


def consolidate(run: Path, out: Path, *, step: int | None = None, weights: str = "ema", network: str | None = None) -> Student:
    """Convert a checkpoint, sharded or not, into a student folder.

    Example: pyard consolidate --run runs/xl2 --out runs/xl2-step-100000 --step 100000

    Args:
        run: the run folder.
        out: the student's folder to write.
        step: number of updates at the checkpoint; none: the newest.
        weights: `ema` for the averaged weights, `ema-DECAY` for a further average, `model` for the weights themselves.
        network: package.module:Class of the student's backbone, if it is not one of pyard's.

    Returns:
        The student, with the VAE beside the run's student, the one it started from or the teacher.

    Raises:
        InputError: no such checkpoint, no such weights in it, or shards that are damaged.
    """
    checkpoints = Checkpoints(run / "checkpoints")
    steps = checkpoints.steps()
    if not steps or (step is not None and step not in steps):
        raise InputError(f"{run}: checkpoints of steps {steps}; expected {'any' if step is None else step}")
    step = steps[-1] if step is None else step
    folder = checkpoints.folder(step)
    if (damage := checkpoints.damage(step)) is not None:
        raise InputError(f"checkpoint {folder} is damaged ({damage}); choose another --step of {steps}")
    state = checkpoints.state(step)
    about = as_object(state.get("student"), folder / "state.json", "a student's configuration under 'student'")
    backbone = backbone_class(str(about.get("family", "dit")), network, folder)
    student_config = StudentConfig.from_json(about, backbone)
    file = run / SETTINGS_NAME
    settings = as_object(read_yaml(file), file, "the settings of a run") if file.exists() else {}
    with reading(folder, "its configuration does not describe a student", RuntimeError):
        _check_sizes(folder, student_config, state, backbone, _shapes(folder, weights))
        student = _student_of(student_config, state, backbone, settings, folder)
    names = [file.stem for file in folder.glob("*.safetensors")]
    if (folder / _SHARDS).is_dir():
        entries = _entries(folder)
        names += sorted(
            {entry.split(".")[0] if not entry.startswith("ema-") else _average_of(entry, student) for entry in entries}
        )
    if weights not in names:
        raise InputError(f"{folder}: no weights {weights!r}; there are {', '.join(n for n in names if n != 'optimizer')}")
    if (folder / f"{weights}.safetensors").exists():
        tensors = read_safetensors(folder / f"{weights}.safetensors")
    else:
        own = student.state_dict()
        tensors = {name: torch.empty_like(own[name]) for name in trained_names(student)}
        try:
            with _plain_errors():
                load_shards({weights: tensors}, checkpoint_id=folder / _SHARDS, no_dist=True)
        except RuntimeError as error:
            raise InputError(f"checkpoint {folder} cannot be read ({error}); choose another --step of {steps}") from error
    require_finite(tensors, folder)
    with reading(folder, "weights and configuration do not match", RuntimeError):
        load_trained(student, tensors)
    if student_config.base is None:
        merge_lora(student)
    origins = (run / "student", *(Path(str(settings.get(of) or run)) for of in ("student", "teacher")))
    student.codec = LatentCodec.beside(*origins)
    student.conditions = student.conditions or load_conditions(*origins)
    student.save_pretrained(out)
    return student.eval()


def _entries(folder: Path) -> dict[str, Any]:
    """What a checkpoint's shards hold, by name; torch keeps that in a pickle, which is walked before torch runs it."""
    file = folder / _SHARDS / ".metadata"
    require_names(file, _OF_SHARDS)
    with reading(file, "it says what the shards hold", RuntimeError):
        entries: dict[str, Any] = FileSystemReader(folder / _SHARDS).read_metadata().state_dict_metadata
    return entries


def _shapes(folder: Path, weights: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one set of weights in a checkpoint."""
    if (folder / f"{weights}.safetensors").exists():
        return tensor_shapes(folder / f"{weights}.safetensors")
    entries = _entries(folder) if (folder / _SHARDS).is_dir() else {}
    start = f"{weights}."
    return {
        name.removeprefix(start): tuple(e.size) for name, e in entries.items() if name.startswith(start) and hasattr(e, "size")
    }


def _check_sizes(
    folder: Path,
    config: StudentConfig,
    state: Mapping[str, Any],
    backbone: type[Backbone],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises InputError if a checkpoint's configuration asks for another student than the weights beside it."""
    if not shapes:
        return  # there are no such weights, which is said below
    require_sizes(folder, config.network.depth, shapes, config.grid.num_steps if config.heads == "per_step" else 1)
    if state.get("lora_rank") is not None:  # the weights below the additions are the teacher's
        whole_number(f"{folder / 'state.json'}: lora_rank", state["lora_rank"], 1, 2**12)
        return
    with backbone.without_weights():
        wanted = Student(config, backbone(config.network)).state_dict()  # type: ignore[call-arg]
    for name, tensor in wanted.items():
        if shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape):
            raise InputError(f"{folder}: its configuration asks for {name} {list(tensor.shape)}; found {list(shapes[name])}")


def _student_of(
    config: StudentConfig, state: dict[str, Any], backbone: type[Backbone], settings: dict[str, Any], folder: Path
) -> Student:
    """A student that the weights of a checkpoint fit; with low-rank additions, it has the frozen weights below them."""
    if state.get("lora_rank") is None:
        return Student(config, backbone(config.network))
    heads: LoraHeads = state.get("lora_heads") or "whole"
    if config.base is not None:
        config, trunk, head = read_base(config, backbone, None, folder)
        student = Student(config, trunk, head)
    elif settings.get("student"):
        student = Student.from_pretrained(settings["student"], network=backbone)
    elif settings.get("teacher"):
        teacher = load_teacher(settings["teacher"], network=backbone)
        if teacher.fingerprint != config.teacher_fingerprint:
            raise InputError(f"checkpoint {folder}: the teacher {settings['teacher']} is not the one that it was trained with")
        student = Student(config, *teacher.network.trunk.for_student(teacher.network.head))
    else:
        raise InputError(
            f"checkpoint {folder} only holds what was trained, and {SETTINGS_NAME} names no teacher to add it to; save the "
            "teacher in a folder, and write its path into that file"
        )
    add_lora(student, state["lora_rank"], heads)
    return student


def precision_of_run(file: Path) -> str:
    """What the teacher of a run computed its trajectories in, by the record of what the run began with."""
    manifest: Any = read_object(file, "the settings recorded when the run started", MOST_LABELLED_BYTES).get("manifest")
    manifest = manifest[0] if isinstance(manifest, list) and manifest else manifest
    found = as_object(manifest, file, "the trajectories' manifest").get("precision")
    if not isinstance(found, str):
        raise InputError(f"{file}: the trajectories' precision is {found!r:.60}; expected a string")
    return found


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong in one process, as an error: torch's CheckpointException is none, and passes by `except Exception`."""
    try:
        yield
    except CheckpointException as failed:
        rank, (cause, _) = next(iter(failed.failures.items()))
        raise RuntimeError(f"process {rank}: {cause}") from failed


def _trained_state(module: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = get_model_state_dict(module, options=StateDictOptions(ignore_frozen_params=True))
    return {name: state[name] for name in trained_names(module)}


def _average_of(entry: str, student: Student) -> str:
    """`ema-0.99.trunk.pos_embed` -> `ema-0.99`: a decay has a dot of its own."""
    return next(entry.removesuffix("." + name) for name in student.state_dict() if entry.endswith("." + name))


def _module(part: Any) -> nn.Module:
    module: nn.Module = part.module if isinstance(part, AveragedModel) else part
    return module
