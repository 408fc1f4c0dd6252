"""The analytic teacher: exact predictions, trajectories that end on the mixture, and a network fitted to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from factories import randomise

from pyard.data.mixture import GaussianMixture, mixture_2d
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import DiT
from pyard.models.student import Student
from pyard.teachers import Teacher, load_teacher
from pyard.teachers.guidance import endpoints, guided_prediction
from pyard.teachers.mixture_teacher import MixtureTeacher, fit
from pyard.trajectories import generate_trajectories

TINY = {"patch_size": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "batch_size": 8, "progress": False}


def teacher_of(mixture: GaussianMixture, schedule: NoiseSchedule | None = None, seed: int = 0) -> MixtureTeacher:
    channels, size, _ = mixture.sample_shape
    network = DiT(DiTConfig(size, channels, 1, hidden_size=16, depth=2, num_heads=2, num_classes=mixture.num_classes))
    randomise(network, seed)
    return MixtureTeacher(mixture, network, schedule)


def one_gaussian() -> GaussianMixture:
    random = np.random.default_rng(0)
    factors = random.normal(0, 0.4, (1, 1, 4, 2))
    return GaussianMixture((1, 2, 2), random.normal(0, 0.5, (1, 1, 4)), np.ones((1, 1)), np.full((1, 1), 0.1), factors)


@pytest.mark.parametrize("schedule", [NoiseSchedule(), NoiseSchedule(kind="flow", prediction="velocity")])
def test_the_ode_of_one_gaussian_converges_to_its_exact_solution(schedule: NoiseSchedule) -> None:
    mixture = one_gaussian()
    teacher = teacher_of(mixture, schedule)
    noise, labels = torch.randn(8, 1, 2, 2, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    # Along an eigenvector of the covariance, (x_t - alpha_t m) / sqrt(alpha_t^2 variance + sigma_t^2) is constant.
    variance, basis = np.linalg.eigh(mixture.covariance())
    alpha, sigma = schedule.alpha(schedule.noisiest_time), schedule.sigma(schedule.noisiest_time)
    gain = basis * np.sqrt(variance / (alpha**2 * variance + sigma**2)) @ basis.T
    exact = mixture.mean() + (noise.numpy().reshape(8, 4) - alpha * mixture.mean()) @ gain
    coarse, fine = (np.abs(endpoints(teacher, noise, labels, n).numpy().reshape(8, 4) - exact).max() for n in (100, 400))
    assert fine < 0.03
    assert fine < 0.35 * coarse  # first order: a quarter


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule(),
        NoiseSchedule(prediction="v_prediction"),
        NoiseSchedule(prediction="denoised"),
        NoiseSchedule(kind="flow", prediction="velocity"),
    ],
)
def test_predictions_mean_what_the_schedule_says_and_never_run_the_network(schedule: NoiseSchedule) -> None:
    mixture = mixture_2d()
    teacher, other = teacher_of(mixture, schedule), teacher_of(mixture, schedule, seed=1)
    assert isinstance(teacher, Teacher)
    x, labels = torch.randn(27, 2, 1, 1), torch.arange(27) % 9
    time = 500.0 if schedule.kind == "ddpm" else 0.6
    output = teacher.predict(x, time, labels)
    assert output.dtype == torch.float32
    assert torch.equal(output, other.predict(x, time, labels))
    p, q, r, s = schedule.output_map(time)
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    denoised = mixture.denoised(x, alpha, sigma, labels)
    torch.testing.assert_close(p * x + q * output, denoised.float(), rtol=1e-5, atol=1e-5)
    eps = ((x.double() - alpha * denoised) / sigma).float()
    torch.testing.assert_close(r * x + s * output, eps, rtol=1e-5, atol=1e-5)


def test_guidance_leads_away_from_the_unconditional_mixture() -> None:
    teacher = teacher_of(mixture_2d())
    x, labels = torch.randn(8, 2, 1, 1), torch.arange(8)
    conditional, unconditional = (teacher.predict(x, 700.0, y) for y in (labels, torch.full((8,), 8)))
    table = teacher.conditions
    guided = guided_prediction(teacher, x, 700.0, table.take(labels), table.take(table.null(labels)), 2.0)
    torch.testing.assert_close(guided, 2 * conditional - unconditional)
    assert (conditional - unconditional).abs().max() > 0.01


def test_trajectories_end_on_the_mixture(tmp_path: Path) -> None:
    mixture = mixture_2d()
    teacher = teacher_of(mixture)
    store = generate_trajectories(
        teacher, tmp_path / "t", count=400, num_steps=4, teacher_steps=100, cfg_scale=1.0, progress=False
    )
    assert store.manifest.teacher_fingerprint == teacher.fingerprint
    (tensors,) = (store.tensors(shard) for shard in store.shards)
    ends, labels = tensors["state"][:, -1], tensors["label"]
    assert (mixture.classify(ends) == labels).mean() > 0.98
    x, classes = mixture.sample(0, range(20000))
    for label in range(8):
        theirs, ours = ends[labels == label], x[classes == label]
        spread = ours.std(axis=0)
        assert (np.abs(theirs.mean(axis=0) - ours.mean(axis=0)) < 5 * spread / np.sqrt(50)).all()


def test_the_network_learns_the_exact_eps_and_a_student_starts_with_it(tmp_path: Path) -> None:
    mixture = mixture_2d()
    settings = {**TINY, "hidden_size": 32, "batch_size": 128, "ema_decay": 0.98, "learning_rate": 5e-3}
    teacher = fit(mixture, tmp_path / "t", max_steps=300, **settings)
    images, classes = mixture.sample(0, range(500))
    labels = torch.from_numpy(classes)
    for time, share in ((700.0, 0.02), (300.0, 0.15)):
        alpha, sigma = teacher.schedule.alpha(time), teacher.schedule.sigma(time)
        x = alpha * torch.from_numpy(images) + sigma * torch.randn(500, 2, 1, 1)
        eps = teacher.predict(x, time, labels)
        with torch.no_grad():
            error = (teacher.network(x, torch.full((500,), time), labels) - eps).square().mean()
        # A constant's error is the variance, and a network without labels would do hardly better.
        assert error < share * eps.var()
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 4, 25), history_layers=0)
    assert student.config.teacher_fingerprint == teacher.fingerprint
    assert torch.equal(student.trunk.patch_embed.weight, teacher.network.trunk.patch_embed.weight)


def test_a_folder_gives_the_same_teacher(tmp_path: Path) -> None:
    teacher = teacher_of(one_gaussian())
    teacher.save_pretrained(tmp_path / "t")
    for loaded in (MixtureTeacher.from_pretrained(tmp_path / "t"), load_teacher(tmp_path / "t")):
        assert isinstance(loaded, MixtureTeacher)
        assert loaded.fingerprint == teacher.fingerprint
        assert loaded.mixture.fingerprint == teacher.mixture.fingerprint
        x = torch.randn(3, 1, 2, 2)
        assert torch.equal(loaded.predict(x, 10.0, torch.zeros(3).long()), teacher.predict(x, 10.0, torch.zeros(3).long()))
    with pytest.raises(InputError, match="schedule"):
        load_teacher(tmp_path / "t", schedule=NoiseSchedule(kind="flow", prediction="velocity"))


def test_mixture_and_network_both_count_for_the_fingerprint() -> None:
    first, second = mixture_2d(), mixture_2d(seed=1)
    teachers = [teacher_of(first), teacher_of(second), teacher_of(first, seed=1), teacher_of(first, NoiseSchedule("flow"))]
    assert len({teacher.fingerprint for teacher in teachers}) == 4
    assert teacher_of(mixture_2d()).fingerprint == teachers[0].fingerprint


def test_a_fitted_teacher_is_loaded_and_another_mixture_refused(tmp_path: Path) -> None:
    first = fit(mixture_2d(), tmp_path / "t", max_steps=3, **TINY)
    assert fit(mixture_2d(), tmp_path / "t", max_steps=3, **TINY).fingerprint == first.fingerprint
    with pytest.raises(InputError, match="mixture: "):
        fit(mixture_2d(seed=1), tmp_path / "t", max_steps=3, **TINY)
    with pytest.raises(InputError, match="expected the same"):
        MixtureTeacher(one_gaussian(), first.network)
