"""Every reader raises `InputError` and nothing else, whatever a file holds: Hypothesis, from a corpus of small files.

`corpus/<reader>/` has good files, and bad ones that a reader was once wrong about. The C++ reader of shards is fuzzed by
`make fuzz`, too.
"""

from __future__ import annotations

import functools
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from damaged_files import ANY_FILE, JSON_FILE, JSON_LINES, NPZ, PICKLE, SAFETENSORS, YAML_FILE, Damage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyard.conditions.prompt_file import read_prompts
from pyard.conditions.prompt_storage import TableRecord
from pyard.data.pictures import read_picture
from pyard.diffusion.schedulers import load_schedule
from pyard.errors import InputError
from pyard.models.pretrained import check_config
from pyard.models.student_config import StudentConfig
from pyard.runtime.onnx_student import OnnxStudentInfo, _info_of
from pyard.storage.arrays import read_npy, read_npz
from pyard.storage.log import read_log
from pyard.storage.pickles import read_pickle, require_names, require_sound
from pyard.storage.reading import read_json, read_object, read_yaml, reading
from pyard.storage.tensor_files import read_with_metadata, require_finite, tensor_shapes
from pyard.training.sharded import _OF_SHARDS
from pyard.trajectories.gather import native_module
from pyard.trajectories.manifest import SAFETENSORS_DTYPES, TrajectoryManifest
from pyard.trajectories.shard import map_shard, read_record
from pyard.trajectories.store import read_request

CORPUS = Path(__file__).parent / "corpus"


@functools.cache
def manifest() -> TrajectoryManifest:
    return TrajectoryManifest.from_json(read_json(CORPUS / "manifest/manifest.json"))


def read_arrays(path: Path) -> None:
    if path.suffix == ".npy":
        read_npy(path)
    else:
        read_npz(path)


def unpickle(path: Path) -> None:
    if path.suffix == ".metadata":
        require_names(path, _OF_SHARDS)
        return
    require_sound(path)
    read_pickle(path)


def tensors(path: Path) -> None:
    tensor_shapes(path)
    found, _ = read_with_metadata(path)
    require_finite(found, path)
    for tensor in found.values():
        tensor.clone()


def sidecar(path: Path) -> None:
    # Beside a shard of the size that it names.
    shutil.copyfile(CORPUS / "shard/0000000000-0000000020.safetensors", path.with_suffix(".safetensors"))
    read_record(path, manifest())


def shard(path: Path) -> None:
    """The reader in Python, and the one in C++, which must agree."""
    layout = manifest().layout(20)
    module, _ = native_module()

    def native() -> None:
        rows = [(name, SAFETENSORS_DTYPES[t.dtype][0], list(t.shape[1:])) for name, t in layout.items()]
        module.Gatherer(
            paths=[str(path)], counts=[20], shard_size=20, layout=rows, target="denoised", output="F32",
            num_classes=manifest().num_classes, num_threads=1,
        )  # fmt: skip

    if module is None or not path.is_file():
        map_shard(path, layout)
        return
    try:
        found = map_shard(path, layout)
        assert all(array.shape == tensor.shape for array, tensor in zip(found.values(), layout.values(), strict=True))
    except InputError:
        with pytest.raises(ValueError):
            native()
        raise
    native()


def student(path: Path) -> None:
    config = read_object(path)
    config.pop("_class_name", None)
    StudentConfig.from_json(config)


def scheduler(path: Path) -> None:
    if path.name != "scheduler_config.json" and path.exists():
        path = path.rename(path.with_name("scheduler_config.json"))
    load_schedule(path.parent)


def transformer(path: Path) -> None:
    check_config(read_object(path, finite=False), path, {f"w{i}": (24, 24) for i in range(100)})


def conditions(path: Path) -> None:
    TableRecord.from_json(read_json(path), path)


def onnx_metadata(path: Path) -> OnnxStudentInfo:
    from pyard.runtime.checks import check_info

    tensor = functools.partial(SimpleNamespace, type="tensor(float)")
    session: Any = SimpleNamespace(
        get_inputs=lambda: [
            tensor(name="noise", shape=["n", 1, 8, 8]),
            tensor(name="label", shape=["n"], type="tensor(int64)"),
        ],
        get_outputs=lambda: [tensor(name="sample", shape=["n", 1, 8, 8])],
        get_providers=lambda: ["CPUExecutionProvider"],
    )
    with reading(path):
        info = _info_of(read_object(path), path, session)
    check_info(info, session, path)
    return info


READERS: dict[str, tuple[Callable[[Path], Any], tuple[Damage, ...]]] = {
    "json": (read_json, JSON_FILE),
    "yaml": (read_yaml, YAML_FILE),
    "safetensors": (tensors, SAFETENSORS),
    "pickle": (unpickle, PICKLE),
    "arrays": (read_arrays, NPZ),
    "pictures": (lambda path: read_picture(path, 4, 3), ()),
    "manifest": (lambda path: TrajectoryManifest.from_json(read_json(path)), JSON_FILE),
    "request": (lambda path: read_request(path.parent), JSON_FILE),
    "sidecar": (sidecar, JSON_FILE),
    "shard": (shard, SAFETENSORS),
    "log": (read_log, JSON_LINES),
    "prompts": (read_prompts, JSON_LINES),
    "student": (student, JSON_FILE),
    "scheduler": (scheduler, JSON_FILE),
    "transformer": (transformer, JSON_FILE),
    "conditions": (conditions, JSON_FILE),
    "onnx": (onnx_metadata, JSON_FILE),
}


def only_input_errors(reader: str, path: Path) -> bool:
    """Whether a file was read; anything but an InputError of one line is raised."""
    read, _ = READERS[reader]
    try:
        read(path)
    except InputError as error:
        if "\n" in str(error):
            raise AssertionError("an error of several lines") from error
        return False
    return True


def fuzz(reader: str, examples: int) -> None:
    files = sorted((CORPUS / reader).iterdir())
    _, own = READERS[reader]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(
        file=st.sampled_from(files),
        damages=st.lists(st.sampled_from([*own, *ANY_FILE]), max_size=3),
        seed=st.integers(0, 2**32),
        content=st.one_of(st.none(), st.none(), st.none(), st.binary(max_size=300)),
    )
    def check(file: Path, damages: list[Damage], seed: int, content: bytes | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(shutil.copyfile(file, Path(folder) / file.name))
            rng = random.Random(seed)
            if content is not None:
                path.write_bytes(content)
            for damage in damages:
                # Some know only undamaged files of their kind.
                if path.is_file() and not path.is_symlink():
                    try:
                        damage.apply(path, rng)
                    except Exception:
                        continue
            only_input_errors(reader, path)

    check()


@pytest.mark.parametrize("reader", READERS)
def test_the_corpus(reader: str, tmp_path: Path) -> None:
    read = [
        only_input_errors(reader, Path(shutil.copyfile(file, tmp_path / file.name)))
        for file in sorted((CORPUS / reader).iterdir())
    ]
    assert any(read), "no file of the corpus is good"


@pytest.mark.parametrize("reader", READERS)
def test_a_little_fuzzing(reader: str) -> None:
    fuzz(reader, 10)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_fuzzing(reader: str) -> None:
    fuzz(reader, 250)
