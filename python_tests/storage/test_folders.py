"""A folder appears whole; one that is there keeps what is not pyard's, and holds the old model or the new one at any moment."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from factories import tiny_student, tiny_teacher
from training_runs import small_disk

from pyard.errors import InputError
from pyard.models.student import Student
from pyard.storage import folders
from pyard.storage.folders import appearing_folder, new_folder

# Saves models 0, 1, 2, ... of two files each, for ever.
WRITER = """
import itertools, sys
from pathlib import Path
from pyard.storage.folders import new_folder
for number in itertools.count():
    with new_folder(Path(sys.argv[1]), owned=("config", "weights", "vae")) as folder:
        (folder / "config").write_text(str(number))
        (folder / "weights").write_text(str(number) * 1000)
        if number % 2:
            (folder / "vae").mkdir()
            (folder / "vae" / "weights").write_text(str(number))
"""


def write(path: Path, *names: str) -> None:
    with new_folder(path, owned=("config", "weights", "vae")) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("new")


def content(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}  # enters no links


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=[True, False], ids=["exchange", "entry by entry"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(folders, "_RENAME_EXCHANGE", 1 << 20)  # a flag that no kernel knows


@pytest.mark.usefixtures("_both_ways")
def test_in_a_folder_that_is_there_only_its_own_files_change(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for name in ("config", "weights", "vae/weights", "notes", "checkpoints/step-1/model"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("old")
    (path / "link").symlink_to("checkpoints")
    log = (path / "notes").open("a")
    write(path, "config", "weights")
    log.write(" and more")
    log.close()
    expected = {"config": "new", "weights": "new", "notes": "old and more", "checkpoints/step-1/model": "old"}
    assert content(path) == expected
    assert (path / "link").is_symlink()
    write(path, "config", "weights", "vae/weights")
    assert content(path)["vae/weights"] == "new"
    assert names(tmp_path) == ["run"]


def test_what_others_write_meanwhile_stays(tmp_path: Path) -> None:
    write(tmp_path / "run", "config")
    with new_folder(tmp_path / "run", owned=("config",)) as folder:
        (folder / "config").write_text("newer")
        link = folders._link

        def linked_too_early(entry: Path, to: Path) -> None:
            link(entry, to)
            (tmp_path / "run" / "late").mkdir(exist_ok=True)
            (tmp_path / "run" / "late" / "file").write_text("late")

        (tmp_path / "run" / "early").write_text("early")
        folders._link = linked_too_early
    folders._link = link
    assert content(tmp_path / "run") == {"config": "newer", "early": "early", "late/file": "late"}


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_a_file_or_a_link_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("precious")
    path = tmp_path / ("file" if kind == "file" else "link")
    if kind != "file":
        path.symlink_to("file" if kind == "link" else "nowhere")
    for save in (tiny_teacher().save_pretrained, tiny_student(history_layers=1).save_pretrained):
        with pytest.raises(InputError, match=f"is a {kind.split()[-1]}; expected a folder"):
            save(path)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("target", [".", "..", "inner/..", ""])
def test_the_working_folder_and_those_around_it_stay_the_folders_they_are(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "notes").write_text("old")
    monkeypatch.chdir(tmp_path / "inner" if target == ".." else tmp_path)
    before = tmp_path.stat().st_ino
    write(Path(target), "config", "vae/weights")
    write(Path(target), "config", "weights")
    assert content(tmp_path) == {"notes": "old", "config": "new", "weights": "new"}
    assert names(tmp_path) == ["config", "inner", "notes", "weights"]
    assert tmp_path.stat().st_ino == before  # a shell in it would see an empty folder otherwise
    (tmp_path / f".{tmp_path.name}.{folders.this_process()}.new").mkdir()  # of a process that was killed
    write(Path(target), "config")
    assert names(tmp_path) == ["config", "inner", "notes"]


def test_a_sub_folder_that_cannot_be_replaced_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights").write_text("old")
    replace = Path.replace

    def fails(self: Path, target: Path) -> Path:
        if target.name == "vae":
            raise OSError(errno.EIO, "input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="input/output error"):
        write(Path(), "vae/weights")
    assert content(tmp_path) == {"vae/weights": "old"}
    assert names(tmp_path) == ["vae"]


@pytest.mark.parametrize("kind", ["disk", "folder"])
def test_a_mount_point_is_written_to_as_any_folder(kind: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m"):
        path = tmp_path / "disk"
        if kind == "folder":  # of the same disk, which does not look like a mount point
            path = tmp_path / "disk" / "mounted"
            (tmp_path / "disk" / "source").mkdir()
            path.mkdir()
            subprocess.run(["mount", "--bind", tmp_path / "disk" / "source", path], check=True)
        try:
            (path / "notes").write_text("old")
            write(path, "config", "weights", "vae/weights")
            write(path, "config", "weights")
            assert content(path) == {"notes": "old", "config": "new", "weights": "new"}
        finally:
            if kind == "folder":
                subprocess.run(["umount", "-l", path], check=True)
    assert names(tmp_path) == ["disk"]


def test_a_target_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(InputError, match=f"{name}/model: cannot be made or written"):
            tiny_teacher().save_pretrained(tmp_path / name / "model")


def test_killed_at_any_moment_it_holds_one_model(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "notes").write_text("precious")
    seen = set()
    for seed in range(12):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        deadline = time.monotonic() + 20
        while not (path / "config").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2 + random.Random(seed).random() * 0.1)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        found = content(path)
        number = found["config"]
        expected = {"config": number, "weights": number * 1000, "notes": "precious"}
        assert found == (expected | {"vae/weights": number} if int(number) % 2 else expected)
        seen.add(number)
    assert len(seen) > 1
    write(path, "config")
    assert names(tmp_path) == ["model"]  # what the killed ones left is gone


def test_a_student_saved_into_a_run_leaves_the_run(tmp_path: Path) -> None:
    student = tiny_student(history_layers=1)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "settings.yaml").write_text("precious")
    for _ in range(2):
        student.save_pretrained(tmp_path)
        assert Student.from_pretrained(tmp_path).config == student.config
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "README.md",
        "checkpoints",
        "config.json",
        "model.safetensors",
        "settings.yaml",
    ]


def test_other_models_and_weights_are_not_replaced(tmp_path: Path) -> None:
    student, teacher = tiny_student(history_layers=1), tiny_teacher()
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "config.json").write_text('{"architectures": ["BertModel"]}')
    (tmp_path / "download").mkdir()
    (tmp_path / "download" / "model.safetensors").write_bytes(b"precious")
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    before = {str(file): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for save, name, message in (
        (student.save_pretrained, "transformers", "config.json without the config.json of a Student"),
        (teacher.save_pretrained, "download", "model.safetensors without the config.json of a NetworkTeacher"),
        (student.save_pretrained, "teacher", "config.json of a NetworkTeacher, which would be lost"),
        (teacher.save_pretrained, "student", "config.json of a Student, which would be lost"),
    ):
        with pytest.raises(InputError, match=message):
            save(tmp_path / name)
    assert {str(file): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_vae_that_was_put_there_first_stays(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights").write_text("precious")
    tiny_teacher().save_pretrained(tmp_path)
    assert (tmp_path / "vae" / "weights").read_text() == "precious"


def test_of_two_writers_of_a_folder_the_first_wins(tmp_path: Path) -> None:
    with appearing_folder(tmp_path / "folder") as late:
        (late / "late").touch()
        with appearing_folder(tmp_path / "folder") as early:
            (early / "early").touch()
    assert names(tmp_path / "folder") == ["early"]
    assert names(tmp_path) == ["folder"]
