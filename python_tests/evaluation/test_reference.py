"""References: published statistics, images, or both, as ADM's batches have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyard.errors import InputError
from pyard.evaluation.features import Activations
from pyard.evaluation.frechet import GaussianStatistics
from pyard.evaluation.reference import Reference, load_reference

SHAPE = (3, 4, 4)


class Means:
    """Features: each channel's mean. Spatial ones: the first channel's rows."""

    name, fingerprint = "means", "0"

    def features(self, images: np.ndarray) -> np.ndarray:
        return images.astype(np.float64).mean(axis=(2, 3))

    def activations(self, images: np.ndarray) -> Activations:
        return Activations(self.features(images), images[:, 0].astype(np.float64).mean(axis=2))


class Plain:
    """Without spatial features, of floats alone."""

    name, fingerprint = "plain", "1"

    def features(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.float32
        return images.astype(np.float64).mean(axis=(2, 3))


def images(count: int = 150) -> np.ndarray:  # uint8 [n, H, W, C]
    return np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def statistics(dim: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(dim)
    return {"mean": rng.standard_normal(dim), "covariance": np.cov(rng.standard_normal((dim, 50)))}


def test_an_adm_batch_has_published_statistics_and_images_for_precision_and_recall(tmp_path: Path) -> None:
    pool, spatial = statistics(3), statistics(4)
    arrays = {"mu": pool["mean"], "sigma": pool["covariance"], "mu_s": spatial["mean"], "sigma_s": spatial["covariance"]}
    np.savez(tmp_path / "batch.npz", images(), **arrays)
    found = load_reference(tmp_path / "batch.npz", Means(), SHAPE)
    np.testing.assert_array_equal(found.statistics.mean, pool["mean"])
    np.testing.assert_array_equal(found.statistics.covariance, pool["covariance"])
    np.testing.assert_array_equal(found.spatial.mean, spatial["mean"])
    np.testing.assert_allclose(found.features, images().mean(axis=(1, 2)))
    assert (found.name, found.count) == ("batch.npz", 150)
    # A network without spatial features has nothing to compare with the published ones.
    assert load_reference(tmp_path / "batch.npz", Plain(), SHAPE).spatial is None

    np.savez(tmp_path / "alone.npz", **arrays)
    alone = load_reference(tmp_path / "alone.npz", Means(), SHAPE)
    assert alone.features is None
    assert alone.count == 0
    np.testing.assert_array_equal(alone.spatial.covariance, spatial["covariance"])


def test_images_alone_make_the_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=images())
    found = load_reference(tmp_path / "images.npz", Means(), SHAPE)
    expected = GaussianStatistics.of(images().mean(axis=(1, 2)))
    np.testing.assert_allclose(found.statistics.covariance, expected.covariance)
    assert found.statistics.count == 150
    np.testing.assert_allclose(found.spatial.mean, images()[..., 0].mean(axis=(0, 2)))
    # Networks that know no bytes see -1 to 1.
    plain = load_reference(tmp_path / "images.npz", Plain(), SHAPE)
    np.testing.assert_allclose(plain.features, images().mean(axis=(1, 2)) / 127.5 - 1, atol=1e-5)


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for i, image in enumerate(images(5)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    found = load_reference(tmp_path, Means(), SHAPE)
    np.testing.assert_allclose(found.features, images(5).mean(axis=(1, 2)))


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="VIRTUAL_imagenet256_labeled"):
        load_reference(tmp_path / "nothing.npz", Means(), SHAPE)
    other = statistics(5)
    np.savez(tmp_path / "other.npz", mu=other["mean"], sigma=other["covariance"])
    with pytest.raises(InputError, match="statistics of 5 features; means gives 3"):
        load_reference(tmp_path / "other.npz", Means(), SHAPE)
    np.savez(tmp_path / "empty.npz", x=np.zeros(3))
    with pytest.raises(InputError, match="it has x; expected mu and sigma, or arr_0"):
        load_reference(tmp_path / "empty.npz", Means(), SHAPE)
    np.savez(tmp_path / "images.npz", images())
    with pytest.raises(InputError, match=r"images of \(3, 4, 4\); the samples are \(3, 8, 8\)"):
        load_reference(tmp_path / "images.npz", Means(), (3, 8, 8))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(InputError, match="cannot be read"):
        load_reference(tmp_path / "text.npz", Means(), SHAPE)
    with pytest.raises(InputError, match="no images"):
        Reference.of([], Means())


def test_linked_classes_are_read_and_16_bits_scaled(tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "linked").mkdir()
    Image.fromarray(np.full((4, 4), 51400, np.uint16)).save(tmp_path / "linked/deep.png")  # 200 of 255
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(tmp_path / "linked/flat.png")
    (tmp_path / "reference/class").symlink_to(tmp_path / "linked")
    (tmp_path / "linked/circle").symlink_to(tmp_path / "reference")
    found = load_reference(tmp_path / "reference", Means(), SHAPE)
    np.testing.assert_allclose(found.features, [[200, 200, 200], [7, 7, 7]])


def test_progress_says_how_many_batches_a_folder_has(tmp_path: Path, capsys) -> None:
    for i, image in enumerate(images(65)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    load_reference(tmp_path, Means(), SHAPE, progress=True)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("compressed", [False, True])
def test_fortran_order_is_read(compressed: bool, tmp_path: Path) -> None:
    (np.savez_compressed if compressed else np.savez)(tmp_path / "f.npz", arr_0=np.asfortranarray(images()))
    found = load_reference(tmp_path / "f.npz", Means(), SHAPE)
    np.testing.assert_allclose(found.features, images().mean(axis=(1, 2)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "it is a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><title>Sign in</title>", "it is a web page"),
        (b"", "it is empty"),
        (None, "it is one array as np.save writes it; np.savez writes an .npz"),
    ],
    ids=["lfs", "html", "empty", "npy"],
)
def test_what_is_no_archive_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    path.write_bytes(content or b"")
    if content is None:
        with path.open("wb") as file:
            np.save(file, images())
    with pytest.raises(InputError, match=message) as refused:
        load_reference(path, Means(), SHAPE)
    assert "\n" not in str(refused.value)
