"""Every source of samples against the plain Python one, and the native one's memory, threads and refusals."""

from __future__ import annotations

import gc
import itertools
import json
import os
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories.gaussian import GaussianTeacher, write
from trajectories.native import require_native

from pyard.errors import InputError
from pyard.trajectories import TrajectoryBatch, TrajectoryReader, TrajectoryStore
from pyard.trajectories.manifest import SAFETENSORS_DTYPES, TensorLayout
from pyard.trajectories.shard import read_header

SHARD = "shards/0000000008-0000000016.safetensors"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    """21 trajectories in shards of 8, 8 and 5."""
    return write(tmp_path_factory.mktemp("store"), 21)


def assert_same(batches: list[TrajectoryBatch], others: list[TrajectoryBatch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.history.dtype == other.history.dtype
        assert torch.equal(batch.history, other.history)
        assert torch.equal(batch.target, other.target)
        assert torch.equal(batch.condition["label"], other.condition["label"])


def take(reader: TrajectoryReader, count: int) -> list[TrajectoryBatch]:
    return list(itertools.islice(reader, count))


@pytest.mark.parametrize("source", [{"backend": "native"}, {"resident": "cpu"}], ids=["native", "resident"])
@pytest.mark.parametrize("dtype", ["float32", "stored"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_every_source_gives_the_batches_of_plain_python(tmp_path: Path, source: dict, dtype: Any, stored: Any) -> None:
    if "backend" in source:
        require_native()
    kept = write(tmp_path, 21, dtype=stored)
    for target, world_size in (("state", 1), ("denoised", 2)):
        settings: dict[str, Any] = dict(target=target, seed=5, rank=world_size - 1, world_size=world_size, drop_last=False)
        mine = TrajectoryReader(kept, 4, dtype=dtype, **source, **settings)
        assert_same(take(mine, 13), take(TrajectoryReader(kept, 4, dtype=dtype, backend="python", **settings), 13))
        out = torch.float32 if dtype == "float32" else getattr(torch, stored)
        assert next(mine).target.dtype == out


def test_rounding_and_widening_are_torchs(tmp_path: Path) -> None:
    # Every float16 and bfloat16, and floats around every rounding boundary, written as a one-sample store's numbers.
    module = require_native()
    halves = np.arange(2**16, dtype=np.uint16)
    floats = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    edges = torch.from_numpy(halves.view(np.int16).copy()).view(torch.bfloat16).float().numpy().view(np.uint32)
    half_edges = halves.view(np.float16).astype(np.float32).view(np.uint32)
    numbers = np.concatenate([floats, edges, edges + 0x8000, half_edges, half_edges + 0x1000, half_edges - 0x1000])

    def convert(bits: np.ndarray, source: str, target: str) -> np.ndarray:
        """Through the gatherer: one sample whose noise is a number, whose state is the numbers."""
        names = {"F32": 4, "F16": 2, "BF16": 2}
        noise_bytes, n = (len(bits) * 4 if source == "F32" else 4), len(bits)
        noise = bits.tobytes() if source == "F32" else bytes(4)
        state = bits.tobytes() if source != "F32" else bytes(names[target] * n)
        state_dtype = source if source != "F32" else target
        noise_shape, state_shape = ([n], [1, n]) if source == "F32" else ([1], [n, 1])
        spans = {"label": 8, "noise": noise_bytes, "state": len(state)}
        header, at = {}, 0
        shapes = {"label": ("I64", [1]), "noise": ("F32", [1, *noise_shape]), "state": (state_dtype, [1, *state_shape])}
        for name, size in spans.items():
            header[name] = {"dtype": shapes[name][0], "shape": shapes[name][1], "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8) + noise + state)
        layout = [("label", "I64", []), ("noise", "F32", noise_shape), ("state", state_dtype, state_shape)]
        gatherer = module.Gatherer(
            paths=[str(path)],
            counts=[1],
            shard_size=1,
            layout=layout,
            target="state",
            output=target,
            num_classes=1,
            num_threads=1,
        )
        frames = np.empty(2 * n if source == "F32" else n + 1, dtype={4: np.uint32, 2: np.uint16}[names[target]])
        gatherer.submit(np.zeros(1, np.int64), frames, np.empty(1, np.int64)).wait()
        return frames[:n] if source == "F32" else frames[1:]

    def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))

    exact = torch.from_numpy(numbers.view(np.float32))
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        same(torch.from_numpy(convert(numbers, "F32", name).view(np.int16)).view(dtype), exact.to(dtype))
        widened = torch.from_numpy(convert(halves, name, "F32").view(np.float32).copy())
        same(widened, torch.from_numpy(halves.view(np.int16)).view(dtype).float())


def test_resume_is_exact_with_batches_gathered_ahead(store: TrajectoryStore) -> None:
    require_native()
    for taken in (0, 1, 4, 5, 9):
        reader = TrajectoryReader(store, 4, target="state", seed=2, backend="native", prefetch=3, drop_last=False)
        take(reader, taken)
        state = json.loads(json.dumps(reader.state_dict()))
        ahead = take(reader, 7)
        for backend in ("native", "python"):
            resumed = TrajectoryReader(store, 4, target="state", seed=2, backend=backend, drop_last=False)  # type: ignore[arg-type]
            take(resumed, 2)
            resumed.load_state_dict(state)
            assert_same(take(resumed, 7), ahead)


def test_batches_are_views_of_one_buffer_that_is_used_again(store: TrajectoryStore) -> None:
    require_native()
    reader = TrajectoryReader(store, 4, target="state", backend="native", prefetch=1)
    addresses = set()
    for batch in itertools.islice(reader, 40):
        assert batch.history.untyped_storage().data_ptr() == batch.target.untyped_storage().data_ptr()
        assert batch.history[:, 1].data_ptr() == batch.target.data_ptr()
        addresses.add(batch.history.data_ptr())
    assert len(addresses) <= 3


def test_a_batch_that_is_kept_is_never_overwritten(store: TrajectoryStore) -> None:
    require_native()
    native, python = (TrajectoryReader(store, 4, target="state", backend=b, prefetch=2) for b in ("native", "python"))  # type: ignore[arg-type]
    kept = [(batch.target[1], batch.condition["label"]) for batch in itertools.islice(native, 30)]  # views only, no batch
    gc.collect()
    wanted = [(batch.target[1], batch.condition["label"]) for batch in itertools.islice(python, 30)]
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(kept, wanted, strict=True))


def test_a_batch_moves_with_its_frames(store: TrajectoryStore) -> None:
    batch = next(TrajectoryReader(store, 4, target="state"))
    moved = batch.to("meta")
    assert moved.history.untyped_storage().nbytes() == moved.target.untyped_storage().nbytes()
    assert moved.frames is not None
    assert moved.frames.shape == (4, 4, 1, 4, 4)
    plain = TrajectoryBatch(batch.history.clone(), batch.target.clone(), batch.condition["label"]).to("meta")
    assert plain.history.shape == moved.history.shape


def test_readers_of_many_threads_agree(store: TrajectoryStore) -> None:
    require_native()
    wanted = take(TrajectoryReader(store, 5, target="denoised", backend="python"), 60)
    found: dict[int, list[TrajectoryBatch]] = {}

    def read(number: int) -> None:
        found[number] = take(TrajectoryReader(store, 5, target="denoised", backend="native", num_threads=3), 60)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batches in found.values():
        assert_same(batches, wanted)
    assert len(found) == 4


def test_readers_that_are_dropped_midway_leave_no_thread(store: TrajectoryStore) -> None:
    require_native()

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    for _ in range(5):
        reader = TrajectoryReader(store, 8, target="state", backend="native", num_threads=4, prefetch=5)
        next(reader)
        assert threads() >= before + 4
        del reader
        gc.collect()
    assert threads() <= before


def test_a_forked_reader_is_refused_in_the_child(store: TrajectoryStore) -> None:
    require_native()
    reader = TrajectoryReader(store, 4, target="state", backend="native", prefetch=0)
    next(reader)
    child = os.fork()
    if child == 0:
        try:
            reader.gather(np.array([0]))
        except InputError as error:
            os._exit(7 if "threads do not survive a fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("backend", ["native", "python"])
def test_a_label_outside_the_teachers_classes_is_refused(tmp_path: Path, backend: Any) -> None:
    if backend == "native":
        require_native()
    kept = write(tmp_path, 21)
    content = bytearray((tmp_path / SHARD).read_bytes())
    begin = read_header(tmp_path / SHARD, kept.manifest.layout(8))["label"]
    content[begin + 16 : begin + 24] = struct.pack("<q", 3)
    (tmp_path / SHARD).write_bytes(content)
    reader = TrajectoryReader(TrajectoryStore.open(tmp_path), 21, target="state", backend=backend)
    for _ in range(2):  # and it stays where it is
        with pytest.raises(InputError, match="sample 10 has label 3; the teacher's classes are 0 to 2"):
            next(reader)
    with pytest.raises(InputError, match="sample 10 has label 3"):
        TrajectoryReader(TrajectoryStore.open(tmp_path), 21, target="state", resident="cpu")


def test_a_shard_that_lies_is_refused_when_the_reader_is_made(tmp_path: Path) -> None:
    require_native()
    kept = write(tmp_path, 21)
    content = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(content.replace(b'"F32"', b'"F64"', 1))
    with pytest.raises(InputError, match=r"0000000008-0000000016\.safetensors: tensor .* has another dtype or shape"):
        TrajectoryReader(kept, 4, target="state", backend="native")
    (tmp_path / SHARD).unlink()
    with pytest.raises(InputError, match=r"cannot be opened \(No such file"):
        TrajectoryReader(kept, 4, target="state", backend="native")


def test_wrong_calls_of_the_gatherer_are_refused(store: TrajectoryStore) -> None:
    require_native()
    reader = TrajectoryReader(store, 4, target="state", backend="native")
    for wrong in ([21], [-1], [0, 2**40]):
        with pytest.raises(InputError, match=r"sample \S+; expected 0 to 20"):
            reader.gather(np.array(wrong))
    assert len(reader.gather(np.arange(21))) == 21  # more than a batch
    gatherer = reader._gather._gatherer  # type: ignore[attr-defined]
    frames, labels = np.empty((2, 4, 16), np.float32), np.empty(2, np.int64)
    read_only = frames.copy()
    read_only.flags.writeable = False
    for args in (
        (frames[:1], labels),
        (frames[:, ::2], labels),
        (frames, labels[:1]),
        (frames, labels.view(np.float64)),
        (read_only, labels),
    ):
        with pytest.raises(ValueError, match="expected a writable C-contiguous"):
            gatherer.submit(np.zeros(2, np.int64), *args)


def test_settings_of_the_sources_that_make_no_sense_are_refused(
    store: TrajectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong, message in (
        ({"prefetch": -1}, "prefetch -1"),
        ({"num_threads": 0}, "at least one thread"),
        ({"backend": "rust"}, "backend is 'rust'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
    ):
        with pytest.raises(InputError, match=message):
            TrajectoryReader(store, 4, target="state", **wrong)  # type: ignore[arg-type]
    monkeypatch.setattr("pyard.trajectories.gather.native_module", lambda: (None, "it was not built"))
    monkeypatch.setattr("pyard.trajectories.reader.native_module", lambda: (None, "it was not built"))
    with pytest.raises(InputError, match="backend='native', but it was not built"):
        TrajectoryReader(store, 4, target="state", backend="native")
    assert len(next(TrajectoryReader(store, 4, target="state"))) == 4


@pytest.mark.cuda
def test_batches_cross_to_the_gpu_intact_while_buffers_are_used_again(tmp_path: Path) -> None:
    require_native()
    store = write(tmp_path, 64, GaussianTeacher(shape=(4, 32, 32)))
    readers = [TrajectoryReader(store, 16, target="state", backend=b) for b in ("native", "python")]  # type: ignore[arg-type]
    moved = [batch.to("cuda") for batch in itertools.islice(readers[0], 50)]
    for batch, wanted in zip(moved, readers[1], strict=False):
        assert torch.equal(batch.history.cpu(), wanted.history)
    resident = TrajectoryReader(store, 16, target="state", resident="cuda")
    assert torch.equal(next(resident).target.cpu(), take(TrajectoryReader(store, 16, target="state"), 1)[0].target)


LAYOUT = {
    "label": TensorLayout("int64", (2,)),
    "noise": TensorLayout("float32", (2, 1, 2, 2)),
    "state": TensorLayout("bfloat16", (2, 3, 1, 2, 2)),
}
HEADER = {
    "__metadata__": {"pyard": "{}"},
    "label": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
    "noise": {"dtype": "F32", "shape": [2, 1, 2, 2], "data_offsets": [16, 48]},
    "state": {"dtype": "BF16", "shape": [2, 3, 1, 2, 2], "data_offsets": [48, 96]},
}


def file_of(header: Any, payload: int = 96, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(payload)


def both_parsers(content: bytes, path: Path) -> tuple[dict[str, int] | None, dict[str, int] | None]:
    """What the Python and the C++ parser say of a file; None: refused."""
    path.write_bytes(content)
    try:
        python = read_header(path, LAYOUT)
    except InputError:
        python = None
    layout = [(name, SAFETENSORS_DTYPES[t.dtype][0], list(t.shape)) for name, t in LAYOUT.items()]
    try:
        native = dict(zip(LAYOUT, require_native().parse_shard(content, layout), strict=True))
    except ValueError:
        native = None
    return python, native


def test_both_parsers_read_a_good_header(tmp_path: Path) -> None:
    python, native = both_parsers(file_of(HEADER), tmp_path / "x")
    assert python == native is not None
    spaced = json.dumps(HEADER, indent=3).replace("noise", "\\u006eoise").encode() + b"  "
    python, native = both_parsers(file_of(spaced), tmp_path / "x")
    assert python == native is not None


def changed(**tensors: Any) -> dict[str, Any]:
    return {**HEADER, **{name: {**HEADER[name], **change} for name, change in tensors.items()}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10",
        file_of(HEADER)[:-1],
        file_of(HEADER)[:40],
        file_of(HEADER, payload=97),
        file_of(HEADER, size=2**63),
        file_of(HEADER, size=2**64 - 1),
        file_of(HEADER, size=2**64 - 8),
        file_of(HEADER, size=10),
        file_of(b"{}"),
        file_of(b"[]"),
        file_of(b"[" * 5000),
        file_of(b'{"a":' * 5000),
        file_of(b"\xff" * 50),
        file_of(json.dumps(HEADER).encode()[:-1] + b', "noise": 1}'),
        file_of(json.dumps(HEADER).encode() + b"x"),
        file_of(json.dumps(HEADER).replace("[16, 48]", "[016, 48]").encode()),
        file_of(json.dumps(HEADER).replace("[16, 48]", "[16, 48").encode()),
        file_of({**HEADER, "more": HEADER["noise"]}),
        file_of({name: entry for name, entry in HEADER.items() if name != "label"}),
        file_of({**HEADER, "noise": None}),
        file_of(changed(noise={"dtype": "F64"})),
        file_of(changed(noise={"dtype": None})),
        file_of(changed(noise={"shape": [2, 1, 2]})),
        file_of(changed(noise={"shape": [2, 1, 2, 2, 1]})),
        file_of(changed(noise={"shape": [2.0, 1, 2, 2]})),
        file_of(changed(noise={"shape": [2**62, 1, 2, 2]})),
        file_of(changed(noise={"data_offsets": [0, 32]})),
        file_of(changed(noise={"data_offsets": [20, 52]}, state={"data_offsets": [52, 100]}), payload=100),
        file_of(changed(noise={"data_offsets": [16, 2**64 + 48]})),
        file_of(changed(noise={"data_offsets": [-16, 16]})),
        file_of(changed(noise={"data_offsets": [48, 16]})),
        file_of(changed(noise={"data_offsets": [16.0, 48]})),
        file_of(changed(noise={"data_offsets": [16, 48, 48]})),
        file_of(changed(noise={"data_offsets": {"0": 16, "1": 48}})),
        file_of(changed(label={"data_offsets": [48, 64]}, state={"data_offsets": [49, 97]}), payload=97),
    ],
)  # fmt: skip
def test_both_parsers_refuse_a_header_that_lies(tmp_path: Path, content: bytes) -> None:
    assert both_parsers(content, tmp_path / "x") == (None, None)


@settings(max_examples=300, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=3), cut=st.integers(0, 3))
def test_the_native_parser_accepts_only_what_the_python_one_accepts(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int
) -> None:
    content = bytearray(file_of(HEADER))
    for place, value in edits:
        content[place % len(content)] = value
    python, native = both_parsers(bytes(content[: len(content) - cut]), tmp_path_factory.getbasetemp() / "mutated")
    assert native is None or native == python
