from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pyard.data.real_data import RealData, RealReader
from pyard.errors import InputError


def numbered(count: int) -> RealData:
    """Two shards; image i holds i on its left half and -i on its right."""
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 1, 2, 4).clone()
    images[..., 2:] *= -1
    labels = torch.arange(count) % 3
    return RealData(
        tuple({"images": part, "labels": names} for part, names in zip(images.split(4), labels.split(4), strict=True))
    )


def take(reader: RealReader, batches: int) -> tuple[list[int], list[bool]]:
    numbers, flips = [], []
    for _ in range(batches):
        images, labels = next(reader)
        number = images.abs()[:, 0, 0, 0].long()
        assert torch.equal(labels, number % 3)
        numbers += number.tolist()
        flips += (images[:, 0, 0, 0] < 0).tolist()
    return numbers, flips


def test_every_epoch_visits_every_image_once_in_another_order():
    numbers, _ = take(RealReader(numbered(6), 4, seed=1, flips=False), 6)
    epochs = [numbers[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 2


def test_processes_share_the_order_of_one():
    whole, flips = take(RealReader(numbered(7), 4, seed=2, flips=True), 5)
    ranks = [take(RealReader(numbered(7), 4, seed=2, flips=True, rank=rank, world_size=2), 5) for rank in (0, 1)]
    for i in range(5):
        assert [n for numbers, _ in ranks for n in numbers[2 * i : 2 * i + 2]] == whole[4 * i : 4 * i + 4]
        assert [f for _, flipped in ranks for f in flipped[2 * i : 2 * i + 2]] == flips[4 * i : 4 * i + 4]


def test_half_is_mirrored_or_none():
    numbers, flips = take(RealReader(numbered(9), 100, seed=3, flips=True), 10)
    shown = [f for n, f in zip(numbers, flips, strict=True) if n]
    assert np.mean(shown) == pytest.approx(0.5, abs=0.07)
    assert not any(take(RealReader(numbered(9), 100, seed=3, flips=False), 2)[1])


def test_position_is_resumed():
    reader = RealReader(numbered(9), 4, seed=4, flips=True)
    take(reader, 3)
    state = reader.state_dict()
    rest = take(reader, 3)
    other = RealReader(numbered(9), 4, seed=4, flips=True)
    other.load_state_dict(state)
    assert take(other, 3) == rest


def test_latents_are_drawn_from_their_distributions():
    shape = (1, 1, 20, 20)
    data = RealData(({
        "images": torch.full(shape, 2.0), "std": torch.full(shape, 0.5), "labels": torch.tensor([1]),
        "flipped": torch.full(shape, -2.0), "flipped_std": torch.full(shape, 0.1),
    },))  # fmt: skip
    images, _ = next(RealReader(data, 200, seed=0, flips=True))
    mirrored = images.mean(dim=(1, 2, 3)) < 0
    assert 60 < int(mirrored.sum()) < 140
    assert float(images[~mirrored].mean()) == pytest.approx(2.0, abs=0.02)
    assert float(images[~mirrored].std()) == pytest.approx(0.5, abs=0.02)
    assert float(images[mirrored].std()) == pytest.approx(0.1, abs=0.01)
    again, _ = next(RealReader(data, 200, seed=0, flips=True))
    assert torch.equal(images, again)


def test_files_folders_and_digits(tmp_path: Path):
    images, labels = torch.randn(6, 2, 8, 8), torch.arange(6) % 5
    np.savez(tmp_path / "a.npz", images=images.numpy(), labels=labels.numpy())
    (tmp_path / "shards").mkdir()
    for i in range(2):
        half = slice(3 * i, 3 * i + 3)
        save_file({"images": images[half].clone(), "labels": labels[half].clone()}, tmp_path / "shards" / f"{i}.safetensors")
    for source in (tmp_path / "a.npz", tmp_path / "shards"):
        data = RealData.load(source, (2, 8, 8), 5)
        found, classes = data.gather(range(6), [False] * 6, torch.zeros_like(images))
        assert torch.equal(found, images)
        assert torch.equal(classes, labels)
    assert RealData.load("digits", (1, 8, 8), 10).count == 1797
    assert RealData.load(tmp_path / "a.npz", (2, 8, 8), 5).fingerprint() != RealData.load("digits", (1, 8, 8), 10).fingerprint()


@pytest.mark.parametrize(("tensors", "message"), [
    (dict(images=torch.randn(3, 1, 8, 8), labels=torch.arange(3)), r"samples of \[1, 8, 8\].*draws \[2, 8, 8\]"),
    (dict(images=torch.randn(3, 2, 8, 8), labels=torch.tensor([0, 1, 5])), "labels 0 to 5.*of 5 classes"),
    (dict(images=torch.randn(3, 2, 8, 8)), "expected images and labels"),
    (dict(images=torch.zeros(3, 2, 8, 8, dtype=torch.uint8), labels=torch.arange(3)), "expected floating point"),
    (dict(images=torch.randn(3, 2, 8, 8), labels=torch.arange(3), std=torch.randn(3, 2, 8, 8)), "for latents flipped, std"),
], ids=["shape", "labels", "no labels", "bytes", "half a latent"])  # fmt: skip
def test_wrong_data_is_named(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "real.safetensors")
    with pytest.raises(InputError, match=message):
        RealData.load(tmp_path / "real.safetensors", (2, 8, 8), 5)


def test_a_cut_off_file_is_named(tmp_path):
    np.savez(tmp_path / "real.npz", images=np.zeros((3, 2, 8, 8), np.float32), labels=np.arange(3))
    content = (tmp_path / "real.npz").read_bytes()
    (tmp_path / "real.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"real\.npz cannot be read"):
        RealData.load(tmp_path / "real.npz", (2, 8, 8), 5)


def test_no_data(tmp_path):
    with pytest.raises(InputError, match="expected 'digits'"):
        RealData.load(tmp_path / "nothing.npz", (2, 8, 8), 5)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        RealData.load(tmp_path / "bad.safetensors", (2, 8, 8), 5)


def test_a_sample_that_is_no_picture_is_named_when_it_is_used(tmp_path):
    images = torch.randn(4, 1, 8, 8)
    images[2, 0, 3, 3] = torch.nan
    save_file({"images": images, "labels": torch.arange(4)}, tmp_path / "real.safetensors")
    data = RealData.load(tmp_path / "real.safetensors", (1, 8, 8), 10)
    noise = torch.zeros(2, 1, 8, 8)
    assert data.gather([0, 3], [False, True], noise)[1].tolist() == [0, 3]
    with pytest.raises(InputError, match="real data: sample 2 holds NaN or infinity"):
        data.gather([1, 2], [False, False], noise)
