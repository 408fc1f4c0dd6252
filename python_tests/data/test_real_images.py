"""Pictures of the adversarial stage: cropped as ADM crops, encoded once, by one process or two."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from training_runs import start, teacher_and_store, train_in, wait

from pyard.conditions import ClassConditions
from pyard.data import real_images
from pyard.data.pictures import centre_crop
from pyard.data.real_data import RealData
from pyard.data.real_images import cached_images, is_image_folder
from pyard.errors import InputError
from pyard.models.codec import LatentCodec
from pyard.storage.log import read_log


def pictures(folder: Path, count: int = 7, size: tuple[int, int] = (20, 16)) -> Path:
    """Two classes of pictures of noise."""
    random = np.random.default_rng(0)
    for i in range(count):
        file = folder / ("cat" if i % 2 else "bird") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file)
    return folder


def vae(channels: int = 2) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=channels, scaling_factor=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (129, 512), (1000, 257), (70, 65)])
def test_crop_is_the_middle_square(size):
    """A linear ramp keeps its values under any averaging, so its crop is known."""
    width, height = size
    ramp = np.tile(np.linspace(0, 255, width), (height, 1)).astype(np.uint8)
    crop = np.asarray(centre_crop(Image.fromarray(ramp), 64), dtype=float)
    assert crop.shape == (64, 64)
    scale = min(width, height) / 64
    columns = (width / 2 + (np.arange(64) - 31.5) * scale - 0.5) * 255 / (width - 1)
    np.testing.assert_allclose(crop[32, 4:-4], columns[4:-4], atol=2.5 + 255 * scale / width)


def test_crop_equals_the_published_steps():
    """Dhariwal & Nichol 2021: 400 x 300 to 64 is halved twice (300 -> 150; 75 is less than twice 64), then bicubic."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    halved = picture.resize((200, 150), Image.Resampling.BOX)
    halved = halved.resize((100, 75), Image.Resampling.BOX)
    scaled = halved.resize((round(100 * 64 / 75), 64), Image.Resampling.BICUBIC)
    left = (scaled.width - 64) // 2
    assert np.array_equal(centre_crop(picture, 64), np.asarray(scaled.crop((left, 0, left + 64, 64))))


def test_pixels_are_kept_as_they_are(tmp_path):
    folder = pictures(tmp_path / "images", size=(8, 8))
    assert is_image_folder(folder)
    assert not is_image_folder(folder / "cat")
    data = RealData.load(cached_images(folder, tmp_path / "cache", (3, 8, 8), None), (3, 8, 8), 2)
    assert data.count == 7
    assert not data.latent
    images, labels = data.gather(range(7), [False] * 7, torch.zeros(7, 3, 8, 8))
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    original = np.asarray(Image.open(folder / "cat" / "3.png"), dtype=np.float32) / 127.5 - 1
    np.testing.assert_allclose(images[5].permute(1, 2, 0).numpy(), original, atol=1e-6)
    grey = RealData.load(cached_images(folder, tmp_path / "grey", (1, 8, 8), None), (1, 8, 8), 2)
    assert grey.count == 7


def test_latents_are_the_posterior_of_picture_and_mirror_image(tmp_path):
    folder, codec = pictures(tmp_path / "images"), LatentCodec(vae())
    data = RealData.load(cached_images(folder, tmp_path / "cache", (2, 8, 8), codec), (2, 8, 8), 2)
    assert data.latent
    with Image.open(folder / "bird" / "2.png") as picture:
        pixels = torch.from_numpy(np.asarray(centre_crop(picture, 16), dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    for flip in (False, True):
        posterior = codec.vae.encode(pixels.flip(-1) if flip else pixels).latent_dist
        noise = torch.randn(1, 2, 8, 8)
        (latent,), _ = data.gather([1], [flip], noise)
        torch.testing.assert_close(latent, 0.5 * (posterior.mean + posterior.std * noise)[0], atol=2e-3, rtol=2e-3)
    with torch.no_grad():
        codec.vae.encoder.conv_in.bias += 1
    with pytest.raises(InputError, match="remove it, or give another real_cache"):
        cached_images(folder, tmp_path / "cache", (2, 8, 8), codec)  # the latents of another VAE


def test_packed_samples_are_encoded_packed(tmp_path):
    folder, codec = pictures(tmp_path / "images"), LatentCodec(vae())
    plain = load_file(cached_images(folder, tmp_path / "plain", (2, 8, 8), codec) / "000000.safetensors")
    packed = load_file(cached_images(folder, tmp_path / "packed", (16, 8), codec) / "000000.safetensors")
    for name in ("images", "std", "flipped", "flipped_std"):
        tokens = torch.nn.functional.pixel_unshuffle(plain[name], 2).flatten(2).transpose(1, 2)
        assert torch.equal(packed[name], tokens)
    assert RealData.load(tmp_path / "packed", (16, 8), 2).count == 7
    with pytest.raises(InputError, match="cropped to squares; this student draws 16 x 32"):
        cached_images(folder, tmp_path / "wide", (2, 8, 16), codec)


def test_a_stopped_encoding_goes_on_and_processes_share_it(tmp_path, monkeypatch):
    monkeypatch.setattr(real_images, "SHARD_IMAGES", 2)
    folder = pictures(tmp_path / "images", size=(8, 8))
    whole = cached_images(folder, tmp_path / "whole", (3, 8, 8), None)
    shared = tmp_path / "shared"
    cached_images(folder, shared, (3, 8, 8), None, rank=1, world_size=2)
    assert sorted(file.name for file in shared.glob("*.safetensors")) == ["000001.safetensors", "000003.safetensors"]
    cached_images(folder, shared, (3, 8, 8), None, rank=0, world_size=2)
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (shared / file.name).read_bytes()
    times = {file: file.stat().st_mtime_ns for file in whole.glob("*.safetensors")}
    (whole / "000002.safetensors").unlink()
    cached_images(folder, whole, (3, 8, 8), None)
    assert {file for file in times if file.stat().st_mtime_ns != times[file]} == {whole / "000002.safetensors"}


def test_other_pictures_and_broken_ones_are_named(tmp_path):
    folder = pictures(tmp_path / "images", size=(8, 8))
    cached_images(folder, tmp_path / "cache", (3, 8, 8), None)
    with pytest.raises(InputError, match="does not hold the images"):
        cached_images(folder, tmp_path / "cache", (3, 4, 4), None)
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "cat" / "1.png", folder / ".thumbnails")
    cached_images(folder, tmp_path / "cache", (3, 8, 8), None)  # a hidden folder is no class
    with pytest.raises(InputError, match=r"latents needs a VAE: .*`pyard convert \.\.\. --vae FOLDER` writes one"):
        cached_images(folder, tmp_path / "latents", (4, 8, 8), None)
    (folder / "cat" / "x.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"x\.png cannot be read as a picture"):
        cached_images(folder, tmp_path / "other", (3, 8, 8), None)


def test_linked_folders_are_entered_and_circles_end(tmp_path):
    folder = pictures(tmp_path / "images", size=(8, 8))
    elsewhere = pictures(tmp_path / "elsewhere", 3, size=(8, 8))
    (folder / "cat" / "more").symlink_to(elsewhere / "bird")
    (folder / "dog").symlink_to(elsewhere / "cat")
    (folder / "cat" / "circle").symlink_to(folder)
    (folder / "dog" / "itself").symlink_to(folder / "dog")
    data = RealData.load(cached_images(folder, tmp_path / "cache", (3, 8, 8), None), (3, 8, 8), 3)
    counts = np.bincount(torch.cat([shard["labels"] for shard in data.shards]).numpy())
    # bird 4; cat 3, the 2 linked ones, and what the circle shows of the other classes before it comes back; dog 1.
    assert counts[0] == 4
    assert counts[1] >= 5
    assert counts[2] == 1


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_16_bits_are_scaled_and_not_clipped(mode, tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).round()
    picture = Image.fromarray(ramp.astype(np.uint16 if mode == "I;16" else np.int32))
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name[0]).mkdir(parents=True)
        picture.save(tmp_path / "images" / name[0] / name, format="PNG" if mode == "I;16" else "TIFF")
    data = RealData.load(cached_images(tmp_path / "images", tmp_path / "cache", (1, 8, 8), None), (1, 8, 8), 2)
    np.testing.assert_allclose(data.shards[0]["images"][0, 0].numpy(), ramp / 32767.5 - 1, atol=1.01 / 255)
    colour = RealData.load(cached_images(tmp_path / "images", tmp_path / "colour", (3, 8, 8), None), (3, 8, 8), 2)
    assert torch.equal(colour.shards[0]["images"][0, 2], data.shards[0]["images"][0, 0])


@pytest.mark.parametrize(
    ("folders", "names", "expected"),
    [
        (["a", "b", "c"], None, [0, 1, 2]),
        (["0", "1", "2", "10", "3", "4", "5", "6", "7", "8", "9"], None, list(range(11))),  # "10" sorts before "2"
        (["cat", "bird", "great_owl"], ["owl, great owl", "cat, kitten", "bird"], [1, 2, 0]),
        (["n1", "n2", "n3"], ["owl", "cat", "bird"], [0, 1, 2]),
        (["a\u0302ne", "ze\u0300bre"], ["z\xe8bre", "\xe2ne"], [1, 0]),  # as macOS spells accents
        (["STRASSE", "Ufer"], ["ufer", "stra\xdfe"], [1, 0]),
        (["0", "1"], ["1", "0"], [1, 0]),  # names of classes come before numbers
    ],
)
def test_folders_are_classes_by_number_by_name_or_by_order(folders, names, expected, tmp_path, capsys):
    for i, name in enumerate(folders):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8), i * 20).save(tmp_path / "images" / name / "x.png")
    classes = ClassConditions(len(folders), names)
    cache = cached_images(tmp_path / "images", tmp_path / "cache", (1, 8, 8), None, conditions=classes, progress=True)
    shard = RealData.load(cache, (1, 8, 8), len(folders)).shards[0]
    values = ((shard["images"][:, 0, 0, 0] + 1) * 127.5).round().long() // 20
    numbers = expected if names else [int(name) if name.isdigit() else i for i, name in enumerate(folders)]
    assert {int(v): int(label) for v, label in zip(values, shard["labels"], strict=True)} == dict(enumerate(numbers))
    printed = capsys.readouterr().err
    assert f"{numbers[1]} {folders[1]}" in printed
    assert not (names and folders[0] == "n1") or "0 n1 (owl), 1 n2 (cat), 2 n3 (bird)" in printed
    assert "encoding pictures" in printed
    assert f"{len(folders)}/{len(folders)}" in printed


@pytest.mark.parametrize(
    ("folders", "names", "message"),
    [
        ([f"class{i}" for i in range(10) if i != 4], None, "9 class folders for 10 classes .*4 class5"),
        ([str(i) for i in range(10) if i != 4], None, "9 class folders for 10 classes"),
        ([str(i) for i in range(1, 11)], None, "10 class folders for 10 classes .*10 10"),
        ([f"class{i}" for i in range(11)], None, "11 class folders for 10 classes"),
        (["1", "01", *"023456789"], None, "several folders for one class"),
        (["b", *"cdefghij", "x"], list("abcdefghij"), "'b' is number 0 .*, but .* class 1 .*'x' is not the name of a class"),
    ],
)
def test_folders_that_are_not_the_classes_are_refused_with_the_map(folders, names, message, tmp_path):
    for name in folders:
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / name / "x.png")
    with pytest.raises(InputError, match=message):
        cached_images(tmp_path / "images", tmp_path / "cache", (1, 8, 8), None, conditions=ClassConditions(10, names))
    assert not (tmp_path / "cache").exists()


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    folder = pictures(tmp_path / "images", size=(8, 8))
    (folder / "cat" / "._1.png").write_bytes(b"what macOS notes of 1.png")
    (folder / "cat" / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "cat" / "1.png", folder / "cat" / ".ipynb_checkpoints" / "1-checkpoint.png")
    assert RealData.load(cached_images(folder, tmp_path / "cache", (3, 8, 8), None), (3, 8, 8), 2).count == 7


def test_a_class_of_files_that_are_no_pictures_is_not_empty(tmp_path):
    folder = pictures(tmp_path / "images", size=(8, 8))
    Image.open(folder / "cat" / "1.png").save(folder / "cat" / "1.TIFF")
    Image.open(folder / "cat" / "1.png").save(folder / "cat" / "1.gif")
    assert RealData.load(cached_images(folder, tmp_path / "cache", (3, 8, 8), None), (3, 8, 8), 2).count == 9
    (folder / "dog").mkdir()
    assert len(real_images.class_folders(folder, None)) == 3
    for name in ("b.heic", "a.npy"):
        (folder / "dog" / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"dog has 2 files, such as a\.npy, and no pictures \(\.jpeg, .*convert them"):
        cached_images(folder, tmp_path / "other", (3, 8, 8), None)


def test_32_bits_with_numbers_of_8_are_refused(tmp_path):
    folder = pictures(tmp_path / "images", size=(8, 8))
    for top, message in ((255, "numbers of the kind 'I' from 0 to 255; expected 8 or 16 bits"), (0, "")):
        Image.fromarray(np.array([[0, top]] * 2, np.int32)).save(folder / "cat" / "x.tiff")
        if message:
            with pytest.raises(InputError, match=message):
                cached_images(folder, tmp_path / f"cache-{top}", (1, 2, 2), None)
        else:
            cached_images(folder, tmp_path / f"cache-{top}", (1, 2, 2), None)


@pytest.mark.slow
def test_the_adversarial_stage_trains_on_a_folder_of_pictures(tmp_path):
    """The teacher's VAE encodes them, the run resumes from the shards, and two processes see what one sees."""
    teacher_and_store(tmp_path)
    vae().save_pretrained(tmp_path / "teacher" / "vae")
    train_in(tmp_path, "first", max_steps=2)
    images = pictures(tmp_path / "images")
    for empty in ("dog", "eel", "fox"):
        (images / empty).mkdir()
    adversarial = dict(real=str(images), virtual_batch=4, width=8, warmup_steps=0, flips=True)
    settings = dict(stage="adversarial", student=str(tmp_path / "first"), adversarial=adversarial, max_steps=3)
    train_in(tmp_path, "one", **settings)
    assert set(load_file(tmp_path / "one" / "real" / "000000.safetensors")) == {
        "images", "std", "flipped", "flipped_std", "labels",
    }  # fmt: skip
    assert set(wait(start(tmp_path, "two", 2, **settings))) == {0}
    for a, b in zip(*(read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")), strict=True):
        assert a["discriminator"] == pytest.approx(b["discriminator"], rel=1e-3)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
