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
from pyard.models.codec import LatentCodec
from pyard.models.families import backbone_class
from pyard.models.folder import require_sizes
from pyard.models.lora import add_lora, merge_lora
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig
from pyard.storage.checkpoints import Checkpoints, Stateful, load_trained
from pyard.storage.numbers import whole_number
from pyard.storage.pickles import DTYPES, require_names
from pyard.storage.reading import as_object, read_object, read_yaml, reading
from pyard.storage.tensor_files import read_safetensors, require_finite, tensor_shapes
from pyard.teachers import is_text_to_image, load_teacher
from pyard.training.config import IDENTITY_NAME, SETTINGS_NAME

if TYPE_CHECKING:
    from pyard.teachers.network_teacher import NetworkTeacher
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


def whole_student(student: Student, processes: Processes) -> Student | None:
    """The student in one piece, on rank 0; None on the others. All processes must call it."""
    tensors = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not processes.is_main:
        return None
    whole = Student(student.config, type(student.trunk)(student.config.network))
    whole.load_state_dict(tensors)
    whole.codec, whole.conditions = student.codec, student.conditions
    return whole.eval()


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
        with _plain_errors():
            load_shards(tensors, checkpoint_id=folder / _SHARDS)
        for name, part in parts.items():
            if not self._is_sharded(part):
                continue
            if isinstance(part, torch.optim.Optimizer):
                set_optimizer_state_dict(self.model, part, optim_state_dict=tensors[name])
            else:
                set_model_state_dict(_module(part), tensors[name])

    def _sharded(self, parts: Mapping[str, Stateful]) -> dict[str, Any]:
        return {
            name: get_optimizer_state_dict(self.model, part)
            if isinstance(part, torch.optim.Optimizer)
            else get_model_state_dict(_module(part))
            for name, part in parts.items()
            if self._is_sharded(part)
        }

    def _is_sharded(self, part: Stateful) -> bool:
        if isinstance(part, torch.optim.Optimizer):
            return any(isinstance(p, DTensor) for group in part.param_groups for p in group["params"])
        return isinstance(part, nn.Module) and any(isinstance(p, DTensor) for p in part.parameters())


def consolidate(run: Path, out: Path, *, step: int | None = None, weights: str = "ema", network: str | None = None) -> Student:
    """Make one student's folder of a checkpoint, sharded or not.

    Example: pyard consolidate --run runs/xl2 --out runs/xl2-step-100000 --step 100000

    Args:
        run: the run folder.
        out: the student's folder to write.
        step: updates done at the checkpoint; none: the newest.
        weights: `ema` for the averaged weights, `ema-DECAY` for a further average, `model` for the weights themselves.
        network: package.module:Class of the backbone of a student that is made of none of pyard's.

    Returns:
        The student, with the VAE beside the run's student, the one it started from or the teacher.

    Raises:
        InputError: no such checkpoint, no such weights in it, or shards that are damaged.
    """
    checkpoints = Checkpoints(run / "checkpoints")
    steps = checkpoints.steps()
    if not steps or (step is not None and step not in steps):
        raise InputError(f"{run}: checkpoints of steps {steps}; expected {'any' if step is None else step}")
    folder = checkpoints.folder(steps[-1] if step is None else step)
    state = read_object(folder / "state.json", "the state of a run")
    about = as_object(state.get("student"), folder / "state.json", "a student's configuration under 'student'")
    backbone = backbone_class(str(about.get("family", "dit")), network, folder)
    student_config = StudentConfig.from_json(about, backbone)
    rank = state.get("lora_rank")
    if rank is not None:
        rank = whole_number(f"{folder / 'state.json'}: lora_rank", rank, 1, 2**12)
    shapes = _shapes(folder, weights)
    with reading(folder, "its configuration fits no student", RuntimeError):
        _check_sizes(folder, student_config, backbone, shapes)
        student = Student(student_config, backbone(student_config.network))
        if rank is not None:
            add_lora(student, rank)
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
        tensors = {name: torch.empty_like(tensor) for name, tensor in student.state_dict().items()}
        try:
            with _plain_errors():
                load_shards({weights: tensors}, checkpoint_id=folder / _SHARDS, no_dist=True)
        except RuntimeError as error:
            raise InputError(f"checkpoint {folder} cannot be read ({error}); choose another --step of {steps}") from error
    require_finite(tensors, folder)
    file = run / SETTINGS_NAME
    settings = as_object(read_yaml(file), file, "the settings of a run") if file.exists() else {}
    if rank is not None and student.state_dict().keys() - tensors.keys():
        _share_base(student, settings, rank, run, network)
    with reading(folder, "weights and configuration do not fit each other", RuntimeError):
        load_trained(student, tensors)
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


def _check_sizes(folder: Path, config: StudentConfig, backbone: type[Backbone], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError if a checkpoint's configuration asks for another student than the weights beside it."""
    if not shapes:
        return  # there are no such weights, which is said below
    require_sizes(folder, config.network.depth, shapes, config.grid.num_steps if config.heads == "per_step" else 1)
    with backbone.without_weights():
        wanted = Student(config, backbone(config.network)).state_dict()  # type: ignore[call-arg]
    for name, tensor in wanted.items():
        if shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape):
            raise InputError(f"{folder}: its configuration asks for {name} {list(tensor.shape)}; there is {list(shapes[name])}")


def _share_base(student: Student, settings: Mapping[str, Any], rank: int, run: Path, network: Any) -> None:
    """Give a student with low-rank additions the frozen weights of its teacher, which its checkpoints do without."""
    teacher = teacher_of_run(settings, run, network)
    if teacher.fingerprint != student.config.teacher_fingerprint:
        raise InputError(f"{run}: its teacher {settings.get('teacher')} has changed since; put it back as it was")
    made = Student.from_teacher(teacher, student.config.grid, history_layers=student.config.history_layers, share=True)
    student.trunk = made.trunk
    add_lora(student, rank)


def teacher_of_run(settings: Mapping[str, Any], run: Path, network: Any) -> NetworkTeacher:
    """The teacher of a run's settings, in the precision of its trajectories."""
    given = {name: settings.get(name) for name in ("variant", "transformer", "lora") if settings.get(name) is not None}
    source = settings.get("teacher")
    if not source:
        raise InputError(f"{run}: its settings name no teacher, whose weights its checkpoints do without")
    if is_text_to_image(source):
        given["dtype"] = precision_of_run(run / IDENTITY_NAME)
    return load_teacher(source, network=network, **given)


def precision_of_run(file: Path) -> str:
    """What the teacher of a run computed its trajectories in, by the record of what the run began with."""
    manifest: Any = read_object(file, "what a run began with").get("manifest")
    manifest = manifest[0] if isinstance(manifest, list) and manifest else manifest
    found = as_object(manifest, file, "the trajectories' manifest").get("precision")
    if not isinstance(found, str):
        raise InputError(f"{file}: the trajectories' precision is {found!r:.60}; expected a text")
    return found


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong in one process, as an error: torch's CheckpointException is none, and passes by `except Exception`."""
    try:
        yield
    except CheckpointException as failed:
        rank, (cause, _) = next(iter(failed.failures.items()))
        raise RuntimeError(f"process {rank}: {cause}") from failed


def _average_of(entry: str, student: Student) -> str:
    """`ema-0.99.trunk.pos_embed` -> `ema-0.99`: a decay has a dot of its own."""
    return next(entry.removesuffix("." + name) for name in student.state_dict() if entry.endswith("." + name))


def _module(part: Any) -> nn.Module:
    module: nn.Module = part.module if isinstance(part, AveragedModel) else part
    return module
