"""The authors' .npz tree, written out by hand, becomes a store, and a store becomes such a tree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from trajectories.gaussian import write

from pyard.errors import InputError
from pyard.trajectories import TrajectoryReader, TrajectoryStore, convert_trajectories
from pyard.trajectories.gather import as_tensor

SHAPE = (4, 2, 2)
NAMES = ["3_000000.npz", "3_000001.npz", "3_000009.npz", "3_999999.npz", "3_1000000.npz"]
LABELS = [7, 0, 3, 7, 999]


def write_tree(root: Path, kinds: tuple[str, ...] = ("zt", "pred_z0"), steps: range = range(26)) -> dict[tuple, np.ndarray]:
    """What sample_trajectory.py is to leave behind: every step of every sample, numbers that name their place."""
    arrays = {}
    for kind in kinds:
        for step in steps:
            for number, (name, label) in enumerate(zip(NAMES, LABELS, strict=True)):
                folder = root / kind / str(step) / str(label)
                folder.mkdir(parents=True, exist_ok=True)
                value = 1000 * number + step + (0.5 if kind == "pred_z0" else 0.0)
                arrays[kind, step, number] = np.full(SHAPE, value, np.float32)
                np.savez(folder / name, **{kind: arrays[kind, step, number]})
    return arrays


def test_import_takes_the_published_places(tmp_path: Path) -> None:
    arrays = write_tree(tmp_path / "tree")
    store = convert_trajectories(tmp_path / "tree", tmp_path / "store", progress=False)
    assert store is not None
    store.verify()
    assert (store.count, store.manifest.keep, store.manifest.cfg_channels) == (5, "both", 3)
    assert store.manifest.grid.denoised_index == (10, 15, 20)
    batch = TrajectoryReader(store, 5, target="denoised").gather(np.arange(5))
    states = TrajectoryReader(store, 5, target="state").gather(np.arange(5))
    assert batch.condition["label"].tolist() == LABELS
    for i in range(5):
        # x_T and the predictions with 15, 10 and 5 steps to do; x_0 last: as the authors' training reads them.
        wanted = [arrays["zt", 25, i], *(arrays["pred_z0", t, i] for t in (15, 10, 5)), arrays["zt", 0, i]]
        assert np.array_equal(batch.frames[i], np.stack(wanted))  # type: ignore[index]
        wanted = [arrays["zt", 25 - k, i] for k in store.manifest.grid.state_index]
        assert np.array_equal(states.frames[i], np.stack(wanted))  # type: ignore[index]


def test_import_resumes_and_takes_what_there_is(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", kinds=("zt",))
    assert convert_trajectories(tmp_path / "tree", tmp_path / "a", progress=False).manifest.keep == "state"  # type: ignore[union-attr]
    store = convert_trajectories(tmp_path / "tree", tmp_path / "a", progress=False)
    assert store is not None
    assert store.count == 5
    write_tree(tmp_path / "two", kinds=("pred_z0",))
    write_tree(tmp_path / "two", kinds=("zt",), steps=range(0, 26, 25))
    assert convert_trajectories(tmp_path / "two", tmp_path / "b", progress=False).manifest.keep == "denoised"  # type: ignore[union-attr]
    with pytest.raises(InputError, match="the store holds other trajectories"):
        convert_trajectories(tmp_path / "two", tmp_path / "a", progress=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_then_import_gives_the_numbers_back(tmp_path: Path, dtype: str) -> None:
    store = write(tmp_path / "store", 21, dtype=dtype)
    assert convert_trajectories(store.path, tmp_path / "tree", progress=False) is None
    labels = store.manifest.number_of(np.arange(21))
    file = tmp_path / "tree" / "pred_z0" / str(6 - store.manifest.grid.denoised_index[0]) / str(labels[20]) / "7_000020.npz"
    with np.load(file) as arrays:
        assert np.array_equal(arrays["pred_z0"], as_tensor(store.tensors(store.shards[2])["denoised"][4, 0].copy()).float())
    again = convert_trajectories(tmp_path / "tree", tmp_path / "again", num_steps=3, num_classes=3, dtype=dtype, progress=False)  # type: ignore[arg-type]
    assert again is not None
    for target in ("state", "denoised"):
        mine, theirs = (TrajectoryReader(s, 21, target=target).gather(np.arange(21)) for s in (store, again))  # type: ignore[arg-type]
        assert torch.equal(mine.history, theirs.history)
        assert torch.equal(mine.target, theirs.target)
        assert torch.equal(mine.condition["label"], theirs.condition["label"])


def harm_missing(tree: Path) -> None:
    (tree / "zt" / "0" / "3" / NAMES[2]).unlink()


def harm_zip(tree: Path) -> None:
    (tree / "pred_z0" / "10" / "3" / NAMES[2]).write_bytes(b"PK\x03\x04 no")


def harm_key(tree: Path) -> None:
    np.savez(tree / "pred_z0" / "10" / "3" / NAMES[2], other=np.zeros(SHAPE))


def harm_shape(tree: Path) -> None:
    np.savez(tree / "pred_z0" / "10" / "3" / NAMES[2], pred_z0=np.zeros((4, 2, 3), np.float32))


def harm_nan(tree: Path) -> None:
    np.savez(tree / "pred_z0" / "10" / "3" / NAMES[2], pred_z0=np.full(SHAPE, np.nan))


def harm_pickle(tree: Path) -> None:
    np.savez(tree / "pred_z0" / "10" / "3" / NAMES[2], pred_z0=np.array([{}], dtype=object))


def harm_label(tree: Path) -> None:
    (tree / "zt" / "25" / "3").rename(tree / "zt" / "25" / "1000")


def harm_folder(tree: Path) -> None:
    (tree / "zt" / "25" / "3").rename(tree / "zt" / "25" / "dog")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (harm_missing, "missing"),
        (harm_zip, r"3_000009\.npz.*expected an \.npz with an array 'pred_z0'"),
        (harm_key, "expected an .npz with an array 'pred_z0'"),
        (harm_shape, r"expected finite numbers of shape \(4, 2, 2\)"),
        (harm_nan, "expected finite numbers"),
        (harm_pickle, "Object arrays cannot be loaded|expected an .npz"),
        (harm_label, "label 1000 .* the teacher's classes are 0 to 999"),
        (harm_folder, "expected folders named by class labels"),
    ],
)
def test_a_tree_that_is_broken_is_refused(tmp_path: Path, harm, message: str) -> None:  # type: ignore[no-untyped-def]
    write_tree(tmp_path / "tree", steps=range(0, 26, 5))
    harm(tmp_path / "tree")
    with pytest.raises(InputError, match=message):
        convert_trajectories(tmp_path / "tree", tmp_path / "store", progress=False)
    if (tmp_path / "store" / "manifest.json").exists():
        assert TrajectoryStore.open(tmp_path / "store").count == 0


def test_folders_that_are_neither_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither a manifest\.json"):
        convert_trajectories(tmp_path, tmp_path / "out")
    (tmp_path / "zt" / "25" / "1").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds no \.npz"):
        convert_trajectories(tmp_path, tmp_path / "out")
    write_tree(tmp_path / "tree", steps=range(24, 26))
    with pytest.raises(InputError, match="lacks what 4 steps need"):
        convert_trajectories(tmp_path / "tree", tmp_path / "out")
