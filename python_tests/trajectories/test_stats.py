from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models.autoencoders import plain_vae
from trajectories.gaussian import GaussianTeacher, flip_byte, write

from pyard.cli.command_line import main
from pyard.data.pictures import tiles
from pyard.errors import InputError
from pyard.trajectories import trajectory_stats


def test_stats_prints_a_table_and_draws_trajectories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write(tmp_path / "store", 21, dtype="bfloat16", labels="balanced", cfg_interval=(100, 900))
    write(tmp_path / "exact", 21, labels="balanced", cfg_interval=(100, 900))
    assert (
        main(["trajectories", "stats", str(tmp_path / "store"), "--picture", str(tmp_path / "p.png"), "--trajectories", "5"])
        == 0
    )
    out = capsys.readouterr().out
    assert "balanced; 3 of 3 classes, 7 to 7 of each" in out
    assert "1.5 at times 100 to 900" in out
    assert "ddim, 6 steps" in out
    assert "rounding of denoised" in out
    rows = {
        line.rsplit(None, 4)[0]: [float(x) for x in line.split()[-4:]]
        for line in out.splitlines()
        if line.startswith(("noise", "denoised ", "state "))
    }
    exact = np.concatenate([np.array(store.tensors(shard)["noise"]) for shard in store.shards]).astype(np.float64)
    assert rows["noise"] == pytest.approx([exact.mean(), exact.std(), exact.min(), exact.max()], abs=6e-5)
    assert set(rows) == {"noise", *(f"{name} {s}" for name in ("state", "denoised") for s in (1, 2, 3))}
    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "p.png"))
    tile = 64 + 2
    assert picture.shape == (5 * tile + 2, 4 * tile + 2, 3)
    predictions = write(tmp_path / "exact", 21, labels="balanced", cfg_interval=(100, 900)).tensors(store.shards[0])["denoised"]
    # Row 2, last column: the trajectory's end, a pixel of it 16 screen pixels wide.
    shown = picture[2 + 2 * tile + 8 : 2 + 2 * tile + 64 : 16, 2 + 3 * tile + 8 : 2 + 3 * tile + 64 : 16, 0]
    wanted = np.clip((predictions[2, 2, 0] + 1) * 127.5, 0, 255)
    assert np.abs(shown - wanted).max() < 2


def test_stats_decodes_latents_with_a_vae_or_the_teachers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    shape = (2, 4, 4)
    store = write(tmp_path / "store", 3, teacher=GaussianTeacher(shape))
    vae = plain_vae(shift_factor=0.1)
    vae.save_pretrained(tmp_path / "teacher" / "vae")
    tensors = store.tensors(store.shards[0])
    steps = np.concatenate([tensors["noise"][:, None], tensors["denoised"]], axis=1)  # [3, 1 + S, *shape]
    with torch.no_grad():
        images = vae.decode(torch.from_numpy(steps.reshape(-1, *shape)) / 0.3 + 0.1, return_dict=False)[0].numpy()
    expected = tiles(images, columns=steps.shape[1])
    for flag, folder in (("--vae", tmp_path / "teacher" / "vae"), ("--teacher", tmp_path / "teacher")):
        words = [str(tmp_path / "store"), "--picture", str(tmp_path / "p.png"), flag, str(folder)]
        assert main(["trajectories", "stats", *words]) == 0
        assert np.abs(np.asarray(Image.open(tmp_path / "p.png")).astype(int) - expected).max() <= 1
    assert trajectory_stats(tmp_path / "store", picture=tmp_path / "latents.png") == 0
    assert np.abs(np.asarray(Image.open(tmp_path / "latents.png")).astype(int) - expected).max() > 20
    capsys.readouterr()
    plain_vae(latent_channels=3).save_pretrained(tmp_path / "wrong")
    for settings, message in (
        ({"vae": tmp_path / "wrong"}, "latents of 3 channels"),
        ({"vae": tmp_path / "nowhere"}, r"there is no config\.json"),
        ({"teacher": tmp_path / "store"}, r"has no vae/ in its folder, and .* give --vae FOLDER, or leave out --teacher"),
        ({"teacher": tmp_path / "nowhere"}, "there is no .*nowhere; expected the folder of a teacher"),
        ({"vae": tmp_path / "wrong", "teacher": tmp_path / "teacher"}, "found both vae and teacher"),
    ):
        with pytest.raises(InputError, match=message):
            trajectory_stats(tmp_path / "store", **settings)
        assert capsys.readouterr().out == ""  # refused before the work


@pytest.mark.parametrize("channels", [1, 3])
def test_the_samples_of_a_teacher_without_a_vae_are_drawn_as_they_are(channels: int, tmp_path: Path) -> None:
    write(tmp_path / "store", 3, teacher=GaussianTeacher((channels, 8, 8)))
    (tmp_path / "teacher").mkdir()
    for name, flags in (("plain", []), ("of-teacher", ["--teacher", str(tmp_path / "teacher")])):
        assert main(["trajectories", "stats", str(tmp_path / "store"), "--picture", str(tmp_path / f"{name}.png"), *flags]) == 0
    assert (tmp_path / "of-teacher.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_samples_that_are_no_pictures_have_statistics_and_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed tokens [4, 8] are four squares of latents [2, 4, 4]."""
    write(tmp_path / "store", 3, teacher=GaussianTeacher((4, 8)))
    assert trajectory_stats(tmp_path / "store") == 0
    assert "(4, 8)" in capsys.readouterr().out
    assert not (tmp_path / "store" / "stats.png").exists()
    with pytest.raises(InputError, match="are not pictures"):
        trajectory_stats(tmp_path / "store", picture=tmp_path / "p.png")
    plain_vae().save_pretrained(tmp_path / "vae")
    assert trajectory_stats(tmp_path / "store", picture=tmp_path / "p.png", vae=tmp_path / "vae") == 0
    assert (tmp_path / "p.png").exists()


def test_stats_of_a_store_with_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 20)
    (tmp_path / "shards" / "0000000008-0000000016.safetensors").unlink()
    assert trajectory_stats(tmp_path) == 0
    out = capsys.readouterr().out
    assert "12, 8 more were requested" in out
    assert "missing, though its sidecar is there" in out
    assert (tmp_path / "stats.png").exists()
    with pytest.raises(InputError, match=r"expected a \.png"):
        trajectory_stats(tmp_path, picture="x.gif")
    for file in (tmp_path / "shards").glob("*"):
        file.unlink()
    with pytest.raises(InputError, match="holds no trajectories yet"):
        trajectory_stats(tmp_path)


def test_verify_says_all_right_or_what_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 20)
    assert main(["trajectories", "verify", str(tmp_path)]) == 0
    assert "20 trajectories in 3 shards" in capsys.readouterr().out
    flip_byte(tmp_path / "shards" / "0000000008-0000000016.safetensors", -5)
    assert main(["trajectories", "verify", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "1 of 3 shards are broken: 0000000008-0000000016.safetensors: sha256 is" in error
    assert error.count("\n") == 1


def test_merge_and_convert_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        write(tmp_path / str(number), 20, part=f"{number}/2")
    parts = f"[{tmp_path / '1'}, {tmp_path / '2'}]"
    assert main(["trajectories", "merge", "--stores", parts, "--out", str(tmp_path / "all"), "--progress", "false"]) == 0
    assert main(["trajectories", "convert", str(tmp_path / "all"), str(tmp_path / "tree"), "--progress=false"]) == 0
    assert len(list((tmp_path / "tree" / "zt" / "6").rglob("*.npz"))) == 20
