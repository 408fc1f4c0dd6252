"""Scenes: what is drawn, and a small teacher of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pyard.data.scenes import CLASS_NAMES, NUM_CLASSES, draw_scenes, scenes_data
from pyard.errors import InputError
from pyard.teachers import load_teacher
from pyard.teachers.guidance import endpoints
from pyard.teachers.scenes import teach

TINY = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "batch_size": 8, "progress": False}


def plain(count: int, x: float = 0.5) -> torch.Tensor:
    """Random numbers of scenes whose shapes are upright, at a height of one half and without texture, before dark grey."""
    uniform = torch.full((count, 23), 0.5)
    uniform[:, 2] = x
    # Rotation, kind of texture, then all of the background.
    for zero in (4, 9, *range(12, 23)):
        uniform[:, zero] = 0.0
    return uniform


def test_a_scene_depends_on_its_seed_index_and_label_alone() -> None:
    images, labels = scenes_data(3, range(40))
    assert images.shape == (40, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (np.float32, np.int64)
    assert images.min() >= -1
    assert images.max() <= 1
    some, their_labels = scenes_data(3, [31, 4])
    np.testing.assert_allclose(some, images[[31, 4]], atol=1e-6)
    np.testing.assert_array_equal(their_labels, labels[[31, 4]])
    np.testing.assert_array_equal(scenes_data(3, range(40), labels)[0], images)
    assert len(np.unique(np.concatenate([images, scenes_data(4, range(40))[0]]).reshape(80, -1), axis=0)) == 80
    with pytest.raises(InputError, match="label 16"):
        scenes_data(0, [0], [16])


def test_classes_are_frequent_alike() -> None:
    _, labels = scenes_data(0, range(3200))
    counts = np.bincount(labels, minlength=NUM_CLASSES)
    assert len(counts) == NUM_CLASSES == len(CLASS_NAMES)
    assert ((counts - 200) ** 2 / 200).sum() < 40  # chi-squared of 15 degrees of freedom: 1 in 2000 is larger


def test_shapes_are_where_and_as_large_as_they_should_be() -> None:
    images = draw_scenes(plain(4), torch.tensor([0, 4, 8, 12]))  # red
    # Red rises from the background's 0.1 to the shape's 0.875: [4, 32, 32].
    covered = ((images[:, 0] + 1) / 2 - 0.1) / 0.775
    radius = 0.25 * 32
    areas = math.pi, math.pi, 3 * math.sqrt(3) * 0.75**2, 4 * (2 * 1.1 * 0.42 - 0.42**2)
    for drawn, area in zip(covered, areas, strict=True):
        assert float(drawn.sum()) == pytest.approx(area * radius**2, rel=0.04)
    for symmetric in covered[[0, 1, 3]]:
        torch.testing.assert_close(symmetric, symmetric.flip(0))
        torch.testing.assert_close(symmetric, symmetric.flip(1))
        torch.testing.assert_close(symmetric, symmetric.T)
    torch.testing.assert_close(covered[2], covered[2].flip(1))
    assert not torch.allclose(covered[2], covered[2].flip(0), atol=0.1)


def test_a_small_move_changes_a_scene_a_little() -> None:
    still, moved = (draw_scenes(plain(1, x), torch.tensor([4])) for x in (0.5, 0.5 + 0.1 / 32 / 0.5))
    assert 0 < (still - moved).abs().max() < 0.25  # a tenth of a pixel; a hard edge would jump by 1.5


def test_colours_are_their_names() -> None:
    images = draw_scenes(plain(4), torch.arange(4))
    red, green, blue = ((images[:, :, 16, 16].T + 1) / 2 / 0.875).numpy()  # of the four colours each
    assert red == pytest.approx([1, 1, 0.15, 0.15], abs=0.1)
    assert green == pytest.approx([0.15, 0.9, 1, 0.45], abs=0.1)
    assert blue == pytest.approx([0.15, 0.15, 0.3, 1], abs=0.1)


def test_a_small_teacher_samples_and_is_loaded(tmp_path: Path) -> None:
    whole = teach(tmp_path / "whole", max_steps=6, save_every=2, **TINY)
    assert whole.class_names == CLASS_NAMES
    assert load_teacher(tmp_path / "whole").fingerprint == whole.fingerprint
    ends = endpoints(whole, torch.randn(2, 3, 32, 32), torch.tensor([0, 15]), 3, cfg_scale=1.5)
    assert torch.isfinite(ends).all()
    with pytest.raises(InputError, match="patch_size: was 8, now 16"):
        teach(tmp_path / "whole", max_steps=6, **{**TINY, "patch_size": 16})


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    settings = {**TINY, "hidden_size": 64, "patch_size": 4, "batch_size": 8, "learning_rate": 5e-3, "ema_decay": 0.9}
    teacher = teach(tmp_path / "t", max_steps=120, **settings)
    images, labels = (torch.from_numpy(array) for array in scenes_data(9, range(64)))
    noise = torch.randn(images.shape)
    error = teacher.predict(0.3 * images + 0.7 * noise, 0.7, labels) - (noise - images)
    assert error.square().mean() < 0.5 * (noise - images).square().mean()
