"""Folders of pictures and ADM's files: what is written is what is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyard.data.pictures import centre_crop
from pyard.errors import InputError
from pyard.evaluation.images import SampleFile, folder_images, npz_images


def pictures(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def test_a_sample_file_is_adm_s_and_appears_only_when_complete(tmp_path: Path) -> None:
    images, labels = pictures(7, 3, 4, 5), np.arange(7) % 3
    path = tmp_path / "deep" / "samples.npz"
    with SampleFile(path, labels, {"labels": "balanced"}) as file:
        for start in (0, 3, 6):
            assert not path.exists()
            file.write(images[start : start + 3])
    with np.load(path) as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert (archive["arr_0"] == images.transpose(0, 2, 3, 1)).all()
        assert archive["arr_1"].tolist() == labels.tolist()
        assert json.loads(str(archive["settings"])) == {"labels": "balanced"}
    assert [len(batch) for batch in npz_images(path, 3)] == [3, 3, 1]
    assert (np.concatenate(list(npz_images(path, 3))) == images).all()
    assert [p.name for p in path.parent.iterdir()] == ["samples.npz"]


def test_a_sample_file_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    def stop_after_one_batch(error: type[BaseException]) -> None:
        with SampleFile(tmp_path / "s.npz", np.arange(5), {}) as file:
            file.write(pictures(2, 1, 2, 2))
            raise error

    with pytest.raises(KeyboardInterrupt):
        stop_after_one_batch(KeyboardInterrupt)
    with pytest.raises(InputError, match="2 images for 5 labels"), SampleFile(tmp_path / "s.npz", np.arange(5), {}) as file:
        file.write(pictures(2, 1, 2, 2))
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"\.npz"):
        SampleFile(tmp_path / "s.png", np.arange(5), {})


def test_npz_of_numpy_itself_is_read_and_wrong_ones_are_named(tmp_path: Path) -> None:
    images = pictures(5, 2, 2, 3)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", images)
        assert (np.concatenate(list(npz_images(tmp_path / "a.npz", 2))) == images.transpose(0, 3, 1, 2)).all()
    np.savez(tmp_path / "float.npz", images.astype(np.float32))
    with pytest.raises(InputError, match="float32"):
        list(npz_images(tmp_path / "float.npz", 2))
    np.savez(tmp_path / "other.npz", images=images)
    with pytest.raises(InputError, match=r"no \.npz file with images arr_0"):
        list(npz_images(tmp_path / "other.npz", 2))


def test_cropping_keeps_the_middle_square() -> None:
    picture = Image.fromarray(pictures(1, 8, 14, 3)[0])
    assert (centre_crop(picture, 8) == np.asarray(picture)[:, 3:11]).all()
    # Twice as large: exactly one halving with a box, that is, means of 2 x 2 pixels, rounded once for each axis.
    large = pictures(1, 16, 28, 3)[0]
    means = large.reshape(8, 2, 14, 2, 3).mean(axis=(1, 3))[:, 3:11]
    assert np.abs(centre_crop(Image.fromarray(large), 8).astype(float) - means).max() <= 1
    assert centre_crop(Image.fromarray(pictures(1, 5, 50, 3)[0]), 8).shape == (8, 8, 3)


def test_a_folder_is_read_in_order_with_its_subfolders(tmp_path: Path) -> None:
    images = pictures(5, 6, 6, 3)
    for i, image in enumerate(images):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"class{i % 2}" / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    batches = list(folder_images(tmp_path, 6, 3, 2))
    assert [batch.shape for batch in batches] == [(2, 3, 6, 6), (2, 3, 6, 6), (1, 3, 6, 6)]
    assert (np.concatenate(batches) == images[[0, 2, 4, 1, 3]].transpose(0, 3, 1, 2)).all()
    assert next(folder_images(tmp_path, 6, 1, 5)).shape == (5, 1, 6, 6)
    (tmp_path / "z.png").write_bytes(b"no png")
    with pytest.raises(InputError, match=r"z\.png cannot be read"):
        list(folder_images(tmp_path, 6, 3, 2))
    with pytest.raises(InputError, match="no pictures"):
        next(folder_images(tmp_path / "nowhere", 6, 3, 2))
