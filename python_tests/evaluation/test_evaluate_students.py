"""`pyard.evaluate` and `python -m pyard evaluate`, on random students of the digits' shape."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.feature_files import SmallInception, save_torchscript
from factories import randomise, tiny_teacher

import pyard
from pyard.cli.command_line import main
from pyard.diffusion.noise import standard_normal, uniform_labels
from pyard.diffusion.time_grid import TimeGrid
from pyard.evaluation.candidates import student_candidate, teacher_candidate
from pyard.evaluation.feature_file import FeatureSettings
from pyard.evaluation.frechet import GaussianStatistics, frechet_distance
from pyard.export import export_onnx
from pyard.models.codec import LatentCodec
from pyard.models.student import Student
from pyard.teachers.network_teacher import NetworkTeacher

DIGITS = {"in_channels": 1, "num_classes": 10}


@pytest.fixture
def teacher() -> NetworkTeacher:
    return tiny_teacher(**DIGITS)


@pytest.fixture
def student(teacher: NetworkTeacher) -> Student:
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 4, 6), history_layers=2)
    randomise(student, seed=3)
    return student.eval()


@pytest.mark.slow
def test_command_line_writes_the_same_numbers_as_the_function(
    teacher: NetworkTeacher, student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    export_onnx(student, tmp_path / "student.onnx")
    sources = [str(tmp_path / "student"), str(tmp_path / "student.onnx")]
    flags = {"count": 40, "teacher_steps": 3, "batch_size": 16}
    words = [f"--{key}={value}" for key, value in flags.items()]
    words += ["--students", json.dumps(sources), "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "q.json")]
    assert main(["evaluate", *words]) == 0
    assert "Fréchet data" in capsys.readouterr().out
    content = json.loads((tmp_path / "q.json").read_text())
    assert [row["network_passes"] for row in content["rows"]] == [6, 4, 4]
    torch_row, onnx_row = content["rows"][1:]
    assert onnx_row["endpoint_mse"] == pytest.approx(torch_row["endpoint_mse"], rel=1e-4)
    assert onnx_row["frechet_to_data"] == pytest.approx(torch_row["frechet_to_data"], rel=1e-3)

    again = pyard.evaluate(student, teacher, **flags, progress=False)
    assert again.rows[1].endpoint_mse == pytest.approx(torch_row["endpoint_mse"], rel=1e-6)
    assert again.settings["teacher_fingerprint"] == teacher.fingerprint


def test_candidates_draw_what_the_samplers_draw(teacher: NetworkTeacher, student: Student) -> None:
    labels = np.array([3, 1, 4])
    noise = standard_normal(7, np.arange(3), teacher.sample_shape)
    drawn = student_candidate(student, teacher).draw(noise, labels)
    np.testing.assert_allclose(drawn, pyard.sample(student, labels, seed=7).numpy(), rtol=1e-5, atol=1e-6)
    # Unguided, one pass a step; guided, two.
    assert teacher_candidate(teacher, 5, cfg_scale=1.0).network_passes == 5
    assert teacher_candidate(teacher, 5, cfg_scale=1.5).network_passes == 10


def test_wrong_input_is_named(teacher: NetworkTeacher, student: Student) -> None:
    with pytest.raises(pyard.InputError, match=r"\(2, 8, 8\)"):
        pyard.evaluate(student, tiny_teacher(), progress=False)
    other = tiny_teacher(in_channels=1, num_classes=7)
    with pytest.raises(pyard.InputError, match=r"10 classes; the teacher draws .* of 7"):
        pyard.evaluate(student, other, progress=False)
    with pytest.raises(pyard.InputError, match="students is an empty list"):
        pyard.evaluate([], progress=False)


@pytest.fixture
def rgb(tmp_path: Path) -> tuple[NetworkTeacher, Student]:
    """A teacher of 8 x 8 RGB images of 5 classes and a student of it, both in folders."""
    teacher = tiny_teacher(in_channels=3)
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 2, 6), history_layers=1, target="state")
    randomise(student, seed=3)
    teacher.save_pretrained(tmp_path / "teacher")
    student.eval().save_pretrained(tmp_path / "student")
    return teacher, student


@pytest.mark.slow
def test_any_teacher_is_measured_with_a_feature_file_and_adm_s_protocol(
    rgb: tuple[NetworkTeacher, Student], tmp_path: Path
) -> None:
    teacher, student = rgb
    network = save_torchscript(SmallInception(), tmp_path / "inception.pt")
    real = np.random.default_rng(1).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", real)
    words = ["--students", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "q.json")]
    words += ["--features", str(tmp_path / "inception.pt"), "--reference", str(tmp_path / "reference.npz")]
    words += ["--samples-npz", str(tmp_path / "samples.npz"), "--count", "50", "--batch-size", "16", "--teacher-steps", "3"]
    assert main(["evaluate", *words, "--feature-settings.quantise", "rounded", "--labels", "random"]) == 0
    content = json.loads((tmp_path / "q.json").read_text())

    # The sample file holds the student's own samples as bytes.
    labels = uniform_labels(1000, np.arange(50), 5)
    drawn = pyard.sample(student, labels, seed=1000).numpy()
    with np.load(tmp_path / "samples.npz") as archive:
        written = archive["arr_0"]
        assert archive["arr_1"].tolist() == labels.tolist()
        assert json.loads(str(archive["settings"]))["labels"] == "random"
    expected = np.clip(127.5 * drawn + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    assert np.abs(written.astype(int) - expected).max() <= 1
    assert (written == expected).mean() > 0.999

    # FID and sFID are those of its bytes.
    with torch.no_grad():
        pools = [network(torch.from_numpy(x.transpose(0, 3, 1, 2)), return_features=True).numpy() for x in (written, real)]
        places = [network.spatial(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()[:, :7] for x in (written, real)]
    row = content["rows"][1]
    fid = frechet_distance(*(GaussianStatistics.of(f) for f in pools))
    sfid = frechet_distance(*(GaussianStatistics.of(f.reshape(len(f), -1)) for f in places))
    assert row["frechet_to_data"] == pytest.approx(fid, rel=1e-3)
    assert row["spatial_frechet_to_data"] == pytest.approx(sfid, rel=1e-3)
    assert 1 < row["inception_score"] < 5
    assert 0 <= row["precision"] <= 1
    assert row["endpoint_mse"] > 0
    assert content["settings"]["features_settings"]["quantise"] == "rounded"
    assert content["settings"]["reference"] == "reference.npz"
    # Statistics of the reference alone give the same distance.
    statistics = GaussianStatistics.of(pools[1])
    np.savez(tmp_path / "statistics.npz", mu=statistics.mean, sigma=statistics.covariance)
    settings = FeatureSettings(quantise="rounded")
    again = pyard.evaluate(
        student, teacher, count=50, batch_size=16, teacher_steps=0, features=tmp_path / "inception.pt", labels="random",
        feature_settings=settings, reference=tmp_path / "statistics.npz", progress=False,
    )  # fmt: skip
    assert len(again.rows) == 1
    assert again.rows[0].frechet_to_data == pytest.approx(fid, rel=1e-3)
    assert again.rows[0].precision is None


def test_samples_are_written_without_any_features(rgb: tuple[NetworkTeacher, Student], tmp_path: Path) -> None:
    teacher, student = rgb
    found = pyard.evaluate(
        student, teacher, count=7, batch_size=3, samples_npz=tmp_path / "s.npz", teacher_steps=2, progress=False
    )
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["arr_0"].shape == (7, 8, 8, 3)
        assert archive["arr_1"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert found.rows[1].frechet_to_data is None
    assert found.rows[1].endpoint_mse > 0
    assert "Fréchet" not in found.table()
    with pytest.raises(pyard.InputError, match="one student; found 2"):
        pyard.evaluate([student, student], teacher, samples_npz=tmp_path / "s.npz")
    save_torchscript(SmallInception(), tmp_path / "inception.pt")
    with pytest.raises(pyard.InputError, match="no reference"):
        pyard.evaluate(student, teacher, features=tmp_path / "inception.pt", progress=False)


def test_students_in_latent_space_are_decoded(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), latent_channels=2, norm_num_groups=4, scaling_factor=0.5,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    teacher = tiny_teacher()
    teacher.codec = LatentCodec(vae)
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 2, 6), history_layers=1)
    randomise(student, seed=3)
    images = pyard.sample(student.eval(), np.arange(6) % 5, seed=1000).numpy()
    assert images.shape == (6, 3, 16, 16)
    assert images.std() > 0.01
    save_torchscript(SmallInception(), tmp_path / "inception.pt")
    np.savez(tmp_path / "reference.npz", np.random.default_rng(1).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8))
    found = pyard.evaluate(
        student, teacher, count=6, batch_size=4, teacher_steps=2, features=tmp_path / "inception.pt",
        reference=tmp_path / "reference.npz", samples_npz=tmp_path / "s.npz", progress=False,
    )  # fmt: skip
    with np.load(tmp_path / "s.npz") as archive:
        expected = np.clip((images + 1) * 127.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
        assert np.abs(archive["arr_0"].astype(int) - expected).max() <= 1
    assert found.rows[1].frechet_to_data > 0
    assert found.rows[1].endpoint_mse > 0


def test_exposure_bias_is_measured_on_trajectories(rgb: tuple[NetworkTeacher, Student], tmp_path: Path) -> None:
    teacher, student = rgb
    store = pyard.generate_trajectories(
        teacher,
        tmp_path / "store",
        12,
        num_steps=2,
        teacher_steps=6,
        cfg_scale=1.5,
        seed=4,
        batch_size=4,
        keep="both",
        progress=False,
    )
    options = dict(count=4, teacher_steps=2, samples_npz=tmp_path / "s.npz", progress=False)
    bias = pyard.evaluate(student, teacher, trajectories=store.path, batch_size=5, **options).rows[1].exposure_bias
    batch = pyard.TrajectoryReader(store, 12, target="state").gather(np.arange(12))
    with torch.no_grad():
        forced = student(batch.history, batch.condition)
        rolled = torch.stack(list(student.rollout(batch.history[:, 0], batch.condition)), dim=1)
    for found, predictions in ((bias.teacher_forced, forced), (bias.rollout, rolled)):
        np.testing.assert_allclose(found, (predictions - batch.target).square().mean(dim=(0, 2, 3, 4)).numpy(), rtol=1e-4)
    assert bias.rollout[1] != bias.teacher_forced[1]
    other = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 3, 6), history_layers=1)
    with pytest.raises(pyard.InputError, match=r"trajectories .*: times"):
        pyard.evaluate(other, teacher, trajectories=store.path, **options)
