"""What cannot work is found before the first trajectory is generated; further ones are as those that a student learnt from."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import tiny_teacher
from models.autoencoders import plain_vae
from PIL import Image

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.training import train
from pyard.trajectories import TrajectoryStore, generate_trajectories

FLOW = NoiseSchedule(kind="flow", prediction="velocity")
TINY: dict[str, Any] = dict(
    num_steps=2, num_trajectories=16, max_steps=1, batch_size=8, progress=False, trackers="none"
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher/`, `other/`, and `student/`, which was trained at another guidance than the usual one."""
    folder = tmp_path_factory.mktemp("early")
    tiny_teacher(FLOW).save_pretrained(folder / "teacher")
    tiny_teacher(FLOW, seed=3).save_pretrained(folder / "other")
    train(folder / "teacher", out=folder / "run", teacher_steps=4, cfg_scale=3.0, cfg_channels=1, **TINY)
    shutil.copytree(folder / "run" / "student", folder / "student")
    (folder / "pictures" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "pictures" / "cat" / "1.png")
    return folder


def test_trajectories_for_a_student_are_generated_as_its_own_were(folder: Path, tmp_path: Path) -> None:
    train(folder / "teacher", out=tmp_path / "more", student=str(folder / "student"), **TINY)
    manifest = TrajectoryStore.open(tmp_path / "more" / "trajectories").manifest
    assert (manifest.cfg_scale, manifest.cfg_channels, manifest.grid.teacher_steps) == (3.0, 1, 4)
    train(folder / "teacher", out=tmp_path / "asked", student=str(folder / "student"), cfg_scale=1.0, **TINY)
    manifest = TrajectoryStore.open(tmp_path / "asked" / "trajectories").manifest
    assert (manifest.cfg_scale, manifest.cfg_channels) == (1.0, None)


ADVERSARIAL = dict(stage="adversarial", student="{folder}/student")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(student="{folder}/student", teacher_steps=6), "those that 6 teacher steps give; give --teacher_steps 4"),
        (dict(**ADVERSARIAL, adversarial=dict(real="nowhere", virtual_batch=4)), "real data nowhere: no such file or folder"),
        (dict(**ADVERSARIAL, adversarial=dict(real="{folder}/pictures", virtual_batch=4)), "1 class folders for 5 classes"),
        (dict(**ADVERSARIAL, adversarial=dict(real="digits", virtual_batch=4)), r"samples of .1, 8, 8. .*draws .2, 8, 8"),
        (dict(lora_rank=33), "lora_rank is 33; the teacher's layers are 32 wide"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_generating(
    settings: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placed(inner) for name, inner in value.items()}
        return value.format(folder=folder) if isinstance(value, str) else value

    with pytest.raises(InputError, match=message):
        train(folder / "teacher", out=tmp_path / "run", **TINY, **placed(settings))
    assert not (tmp_path / "run" / "trajectories").exists()


def test_a_student_of_another_teacher_is_refused_before_generating(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"was made from teacher .*give its own"):
        train(folder / "other", out=tmp_path / "run", student=str(folder / "student"), **TINY)
    assert not (tmp_path / "run" / "trajectories").exists()


def test_a_vae_that_does_not_fit_is_refused_before_generating(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    plain_vae(latent_channels=3).save_pretrained(tmp_path / "teacher" / "vae")
    with pytest.raises(InputError, match="latents of 3 channels"):
        train(tmp_path / "teacher", out=tmp_path / "run", evaluate_every=1, **TINY)
    assert not (tmp_path / "run" / "trajectories").exists()


def test_guidance_of_some_times_alone_is_not_replaced_by_that_of_all(folder: Path, tmp_path: Path) -> None:
    store = generate_trajectories(
        folder / "teacher", tmp_path / "store", 8, num_steps=2, teacher_steps=4, cfg_interval=(0.2, 0.8), progress=False
    )
    train(folder / "teacher", store, out=tmp_path / "first", **{**TINY, "num_trajectories": None})
    with pytest.raises(InputError, match=r"guided at times 0\.2 to 0\.8 alone.*--cfg_interval 0\.2 0\.8"):
        train(folder / "teacher", out=tmp_path / "run", student=str(tmp_path / "first"), **TINY)


def test_lora_without_peft_is_refused_before_generating(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else find(name, *more))
    with pytest.raises(InputError, match="lora_rank needs PEFT"):
        train(folder / "teacher", out=tmp_path / "run", lora_rank=2, **TINY)
    assert not (tmp_path / "run" / "trajectories").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "student").symlink_to("elsewhere"), "student is a link; expected a folder or a new path"),
        (lambda out: tiny_teacher().save_pretrained(out / "student"), "holds a config.json of a NetworkTeacher"),
        (lambda out: (out / "checkpoints").write_text(""), "checkpoints is a file; expected a folder or a new path"),
        (lambda out: (out / "tensorboard").symlink_to("nowhere"), "tensorboard is a dangling link; expected a folder"),
        (lambda out: (out / "log.jsonl").mkdir(), r"log\.jsonl is a folder; expected a file or a new path"),
        (lambda out: (out.rmdir(), out.symlink_to("nowhere")), "run is a dangling link; expected a folder or a new path"),
    ],
    ids=["link", "teacher", "checkpoints", "tensorboard", "log", "out"],
)
def test_what_is_in_the_way_is_found_first(spoil: Callable[[Path], object], message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    spoil(tmp_path / "run")
    with pytest.raises(InputError, match=message):
        train(folder / "teacher", out=tmp_path / "run", **TINY)
    assert not (tmp_path / "run" / "trajectories").exists()


def test_the_student_of_a_run_is_replaced_by_that_of_the_next(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "student", tmp_path / "run" / "student")
    (tmp_path / "run" / "student" / "notes").write_text("precious")
    result = train(folder / "teacher", out=tmp_path / "run", teacher_steps=4, **TINY)
    assert Student.from_pretrained(tmp_path / "run").config == result.config
    assert (tmp_path / "run" / "student" / "notes").read_text() == "precious"
