"""`merge --move` deletes a shard only when it has read the same bytes from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from trajectories.gaussian import contents, flip_byte, write

from pyard.errors import InputError
from pyard.trajectories import merge_trajectories


def test_a_shard_is_removed_only_when_its_copy_has_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "undisturbed", 40)
    write(tmp_path / "part", 40)
    merge_trajectories([str(tmp_path / "part")], tmp_path / "all", progress=False)
    flip_byte(min((tmp_path / "all" / "shards").glob("*.safetensors")), -1)
    store = merge_trajectories([str(tmp_path / "part")], tmp_path / "all", move=True, progress=False)
    store.verify()
    assert contents(tmp_path / "all") == contents(tmp_path / "undisturbed")
    assert not list((tmp_path / "part" / "shards").iterdir())


def test_a_killed_move_leaves_no_shards_behind(tmp_path: Path) -> None:
    write(tmp_path / "part", 40)
    merge_trajectories([str(tmp_path / "part")], tmp_path / "all", progress=False)
    shards = sorted((tmp_path / "part" / "shards").glob("*.safetensors"))
    shards[0].with_suffix(".json").unlink()
    merge_trajectories([str(tmp_path / "part")], tmp_path / "all", move=True, progress=False)
    assert not list((tmp_path / "part" / "shards").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("inner", ["", "shards"])
def test_one_folder_under_two_names_is_refused(tmp_path: Path, inner: str) -> None:
    write(tmp_path / "store", 40)
    before = contents(tmp_path / "store")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "store", other)
    subprocess.run(["mount", "--bind", tmp_path / "store" / inner, other / inner], check=True)
    try:
        with pytest.raises(InputError, match="both a source and the destination"):
            merge_trajectories([str(other)], tmp_path / "store", move=True, progress=False)
    finally:
        subprocess.run(["umount", other / inner], check=True)
    assert contents(tmp_path / "store") == before
