"""The built-in teacher: its data, and training that can be stopped anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pyard.data.digits import digits_data
from pyard.errors import InputError
from pyard.storage.checkpoints import Checkpoints
from pyard.teachers import digits, load_teacher
from pyard.teachers.digits import cache_folder, teach

TINY = {"max_steps": 7, "hidden_size": 16, "depth": 1, "num_heads": 2, "batch_size": 8, "progress": False}


def test_data() -> None:
    images, labels = digits_data()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.dtype == np.int64
    assert set(labels) == set(range(10))


def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = teach(tmp_path / "whole", save_every=2, **TINY)

    save, saved = Checkpoints.save, []

    def killed_after_the_second(self: Checkpoints, step: int, *rest: object) -> None:
        save(self, step, *rest)  # type: ignore[arg-type]
        saved.append(step)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", killed_after_the_second)
    with pytest.raises(KeyboardInterrupt):
        teach(tmp_path / "killed", save_every=2, **TINY)
    assert not (tmp_path / "killed").exists()
    torch.manual_seed(123)  # whatever the caller's random state is
    resumed = teach(tmp_path / "killed", save_every=2, **TINY)
    assert saved == [2, 4, 6]  # it went on from step 4
    assert resumed.fingerprint == whole.fingerprint
    assert not (tmp_path / "killed.training").exists()
    assert load_teacher(tmp_path / "killed").fingerprint == whole.fingerprint


def test_a_finished_teacher_is_loaded_and_other_settings_are_refused(tmp_path: Path) -> None:
    first = teach(tmp_path / "t", **TINY)
    changed = (tmp_path / "t" / "model.safetensors").stat().st_mtime_ns
    assert teach(tmp_path / "t", **TINY).fingerprint == first.fingerprint
    assert (tmp_path / "t" / "model.safetensors").stat().st_mtime_ns == changed
    with pytest.raises(InputError, match="max_steps: was 7, now 8"):
        teach(tmp_path / "t", **{**TINY, "max_steps": 8})
    (tmp_path / "full").mkdir()
    with pytest.raises(InputError, match="no training of the built-in teacher"):
        teach(tmp_path / "full", **TINY)
    with pytest.raises(InputError, match="label_dropout is 1"):
        teach(tmp_path / "new", label_dropout=1.0, **TINY)


def test_seeds_differ_and_training_lowers_the_loss(tmp_path: Path) -> None:
    settings = {**TINY, "max_steps": 150, "batch_size": 64, "ema_decay": 0.9, "learning_rate": 5e-3}
    first, second = (teach(tmp_path / str(seed), seed=seed, **settings) for seed in (0, 1))
    assert first.fingerprint != second.fingerprint
    # At the noisiest level eps is x_t itself; a fresh network predicts 0, whose error is 1.
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for teacher in (first, second):
        error = (teacher.predict(x, 999.0, torch.arange(64) % 10) - x).square().mean()
        assert error < 0.3


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYARD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "pyard"
    monkeypatch.setenv("PYARD_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    for name in ("PYARD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(InputError, match=r"no home folder .*PYARD_CACHE=DIR"):
        cache_folder()


def test_the_built_in_teacher_is_trained_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYARD_CACHE", str(tmp_path))
    folders = []
    monkeypatch.setattr(digits, "teach", lambda out, progress: folders.append(out) or teach(out, **TINY))
    first, second = load_teacher("digits"), load_teacher("digits")
    assert first.fingerprint == second.fingerprint
    assert folders[0] == folders[1]
    assert folders[0].parent == tmp_path


def test_a_cache_that_nothing_can_be_written_to_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYARD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot be written to \(Not a directory\).*PYARD_CACHE"):
        load_teacher("digits")
