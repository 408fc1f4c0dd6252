"""One shard on disk: a safetensors file named by its range of samples, and the sidecar that says it is whole.

    0000000000-0000001024.safetensors   noise, label, state, denoised of samples 0 ... 1023
    0000000000-0000001024.json          count, bytes, sha256, ...; written last

Both appear by write, fsync, rename; a shard without a valid sidecar does not exist. Files never change: a partial shard
that is completed later is another file, and only then is the shorter one removed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyard.errors import InputError
from pyard.storage.numbers import number
from pyard.storage.reading import damaged, parse_json, read_json, regular_file
from pyard.trajectories.manifest import SAFETENSORS_DTYPES, TensorLayout, TrajectoryManifest

# numpy has no bfloat16: its bits are read as uint16.
NUMPY_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64}

_NAME = re.compile(r"(\d{10})-(\d{10})\.(?:json|safetensors)")
# A shard has at most four tensors and one metadata entry; the reference implementation's own limit is 100 MB.
_MAX_HEADER_BYTES = 1 << 16


class ForeignShardError(InputError):
    """A shard that is whole, but was written under another manifest."""


@dataclass(frozen=True)
class ShardRecord:
    """The sidecar of a shard.

    Args:
        first: index of the first sample.
        count: samples in the shard.
        num_bytes: size of the safetensors file.
        sha256: of the safetensors file.
        manifest: digest of the manifest it was written under.
        rounding: per tensor, root mean square and largest absolute error of storing it in the manifest's dtype; empty
            for float32.
        written_by: versions and device that computed it: what to look at when two machines' last bits differ.
    """

    first: int
    count: int
    num_bytes: int
    sha256: str
    manifest: str
    rounding: dict[str, dict[str, float]]
    written_by: dict[str, str]

    @property
    def end(self) -> int:
        """One past the index of the last sample."""
        return self.first + self.count

    @property
    def name(self) -> str:
        """File name of shard and sidecar, without the ending."""
        return shard_name(self.first, self.end)


def shard_name(first: int, end: int) -> str:
    """File name, without its ending, of the shard of samples first ... end - 1."""
    return f"{first:010d}-{end:010d}"


def shard_range(name: str) -> tuple[int, int] | None:
    """(first, end) of a shard's or a sidecar's file name; None if it is no such name."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def read_record(path: Path, manifest: TrajectoryManifest) -> ShardRecord:
    """Read a sidecar and check what can be checked without reading the shard.

    Args:
        path: the sidecar.
        manifest: the store's manifest.

    Raises:
        ForeignShardError: shard and sidecar belong to another manifest.
        InputError: the sidecar is no sidecar, or shard and sidecar do not belong together.
    """
    config = read_json(path)
    names = {field.name for field in dataclasses.fields(ShardRecord)}
    if not isinstance(config, dict) or set(config) != names:
        raise InputError(f"{path.name}: not a sidecar; expected a JSON object of {sorted(names)}")
    record = ShardRecord(**config)
    _check_kinds(record, path)
    integers = (record.first, record.count, record.num_bytes)
    if any(type(value) is not int for value in integers) or (record.first, record.end) != shard_range(path.name):
        raise InputError(
            f"{path.name}: says it holds {record.count!r} samples from {record.first!r} on; its name says otherwise"
        )
    size = manifest.shard_size
    if record.first % size or not 1 <= record.count <= size:
        raise InputError(f"{path.name}: a shard begins at a multiple of {size} and holds 1 to {size} samples")
    if record.manifest != manifest.digest:
        raise ForeignShardError(
            f"{path.name}: written under a manifest with digest {str(record.manifest)[:12]}, this store's is "
            f"{manifest.digest[:12]}: manifest.json was changed, or the shard comes from another store"
        )
    shard = path.with_suffix(".safetensors")
    try:
        about = shard.stat()
    except FileNotFoundError:
        raise InputError(f"{shard.name}: missing, though its sidecar is there") from None
    except OSError as error:
        raise damaged(shard, error) from None
    found = about.st_size if stat.S_ISREG(about.st_mode) else -1
    if found != record.num_bytes:
        raise InputError(f"{shard.name}: {found} bytes, its sidecar says {record.num_bytes}: truncated or overwritten")
    return record


def _check_kinds(record: ShardRecord, path: Path) -> None:
    """Raises InputError for values that whoever reads the record could not work with."""
    errors = record.rounding.values() if isinstance(record.rounding, dict) else [None]
    by = record.written_by.items() if isinstance(record.written_by, dict) else [(None, None)]
    right = all(isinstance(error, dict) and set(error) == {"rms", "max"} for error in errors)
    right = right and all(isinstance(text, str) for pair in by for text in pair)
    if not right or not isinstance(record.sha256, str) or not isinstance(record.manifest, str):
        raise InputError(f"{path.name}: rounding, written_by, sha256 or manifest is not valid in a sidecar")
    for error in errors:
        for name, value in (error or {}).items():
            number(f"{path.name}: {name}", value, 0)


def map_shard(path: Path, layout: dict[str, TensorLayout]) -> dict[str, NDArray[Any]]:
    """Memory-map the tensors of a shard; nothing is read before it is used.

    Args:
        path: a safetensors file.
        layout: the tensors it must hold, no more and no less.

    Returns:
        Read-only arrays into the mapped file; bfloat16 as its bits, uint16.

    Raises:
        InputError: a header that is none, or that says anything but what `layout` expects.
    """
    offsets = read_header(path, layout)
    # One map for all tensors: each map costs a file descriptor.
    payload: NDArray[np.uint8] = np.memmap(path, mode="r", dtype=np.uint8)
    arrays = {}
    for name, tensor in layout.items():
        begin = offsets[name]
        dtype = NUMPY_DTYPES[SAFETENSORS_DTYPES[tensor.dtype][0]]
        arrays[name] = payload[begin : begin + tensor.num_bytes].view(dtype).reshape(tensor.shape)
    return arrays


def read_header(path: Path, layout: dict[str, TensorLayout]) -> dict[str, int]:
    """Check a safetensors header against the expected tensors; returns where in the file each begins.

    The format: https://github.com/huggingface/safetensors#format
    """
    with regular_file(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_size <= min(file_size - 8, _MAX_HEADER_BYTES):
            raise InputError(f"{path}: {file_size} bytes with a header of {header_size}: not a shard, or truncated")
        text = file.read(header_size)
    header = parse_json(text, path)
    if not isinstance(header, dict):
        raise InputError(f"{path}: header is a {type(header).__name__}; expected a JSON object")
    found = sorted(set(header) - {"__metadata__"})
    if found != sorted(layout):
        raise InputError(f"{path}: holds the tensors {found}; the manifest says {sorted(layout)}")
    data_size = file_size - 8 - header_size
    spans = []
    for name, tensor in layout.items():
        entry = header[name]
        dtype = SAFETENSORS_DTYPES[tensor.dtype][0]
        shape = entry.get("shape") if isinstance(entry, dict) else None
        # 2.0 and True are equal to numbers that they must not pass for.
        whole = isinstance(shape, list) and all(type(size) is int for size in shape)
        if not whole or shape != list(tensor.shape) or entry.get("dtype") != dtype:
            raise InputError(f"{path}: tensor {name!r} is {entry}; the manifest says {dtype} {list(tensor.shape)}")
        span = entry.get("data_offsets")
        if not (isinstance(span, list) and len(span) == 2 and all(type(offset) is int for offset in span)):
            raise InputError(f"{path}: tensor {name!r} has data_offsets {span!r}; expected [begin, end]")
        begin, end = span
        if not 0 <= begin <= end <= data_size or end - begin != tensor.num_bytes or begin % SAFETENSORS_DTYPES[tensor.dtype][1]:
            raise InputError(
                f"{path}: tensor {name!r} has data_offsets [{begin}, {end}]; expected {tensor.num_bytes} aligned bytes "
                f"within the {data_size} that follow the header"
            )
        spans.append((begin, end, name))
    # The format wants the payload covered without holes or overlaps.
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            raise InputError(f"{path}: tensor {name!r} begins at {begin}, expected {expected}: tensors overlap or leave a hole")
        expected = end
    if expected != data_size:
        raise InputError(f"{path}: {data_size - expected} bytes follow the last tensor")
    return {name: 8 + header_size + begin for begin, _, name in spans}
