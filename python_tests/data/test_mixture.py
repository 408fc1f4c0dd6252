"""Gaussian mixtures against closed forms, numerical integration, automatic differentiation and their own samples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from pyard.data.mixture import GaussianMixture, mixture_2d, mixture_16
from pyard.errors import InputError


def random_mixture(sample_shape: tuple[int, int, int], rank: int, seed: int = 0) -> GaussianMixture:
    """3 classes of 2 components, everything random; broad enough for a grid to integrate."""
    random = np.random.default_rng(seed)
    dim = int(np.prod(sample_shape))
    return GaussianMixture(
        sample_shape=sample_shape,
        means=random.normal(0, 0.7, (3, 2, dim)),
        weights=random.dirichlet(np.ones(2), 3),
        variances=random.uniform(0.02, 0.2, (3, 2)),
        factors=random.normal(0, 0.3, (3, 2, dim, rank)),
    )


def density(mixture: GaussianMixture, points: np.ndarray, label: int | None) -> np.ndarray:  # [n, D] -> [n]
    """log p(x_0 | class) by scipy, from the definition of a component's covariance."""
    classes = range(mixture.num_classes) if label is None else [label]
    terms = []
    for k in classes:
        for m in range(mixture.means.shape[1]):
            covariance = mixture.factors[k, m] @ mixture.factors[k, m].T + mixture.variances[k, m] * np.eye(points.shape[1])
            log_weight = np.log(mixture.weights[k, m] / len(classes))
            terms.append(multivariate_normal(mixture.means[k, m], covariance).logpdf(points) + log_weight)
    return logsumexp(terms, axis=0)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_log_density_is_the_sum_of_its_gaussians(rank: int) -> None:
    mixture = random_mixture((1, 2, 3), rank)
    points = np.random.default_rng(1).normal(size=(7, 6))
    x = torch.from_numpy(points).view(7, 1, 2, 3)
    for label in range(4):
        expected = density(mixture, points, None if label == 3 else label)
        found = mixture.log_density(x, 1.0, 0.0, torch.full((7,), label)).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("label", [0, 2, 3])
def test_denoised_is_the_posterior_mean_of_numerical_integration(label: int) -> None:
    mixture = random_mixture((2, 1, 1), rank=1)
    axis = np.linspace(-5, 5, 801)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)  # x_0
    prior = density(mixture, grid, None if label == 3 else label)
    alpha, sigma = 0.6, 0.8
    x = np.array([[0.3, -0.2], [1.5, 1.0], [-0.8, 0.4]])
    for point in x:
        log_posterior = prior - np.square(point - alpha * grid).sum(axis=1) / (2 * sigma**2)
        weight = np.exp(log_posterior - log_posterior.max())
        expected = weight @ grid / weight.sum()
        found = mixture.denoised(torch.from_numpy(point).view(1, 2, 1, 1), alpha, sigma, torch.tensor([label]))
        np.testing.assert_allclose(found.numpy().ravel(), expected, atol=1e-9)


def test_denoised_is_tweedies_formula_of_the_log_density() -> None:
    mixture = random_mixture((1, 3, 4), rank=2)
    x = torch.randn(40, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(40) % 4
    angle = torch.linspace(0.05, 1.5, 40, dtype=torch.float64)  # from almost clean to almost noise
    alpha, sigma = angle.cos(), angle.sin()
    (score,) = torch.autograd.grad(mixture.log_density(x, alpha, sigma, labels).sum(), x)
    expected = (x + sigma[:, None, None, None] ** 2 * score) / alpha[:, None, None, None]  # Robbins 1956
    torch.testing.assert_close(mixture.denoised(x, alpha, sigma, labels), expected, rtol=1e-9, atol=1e-9)


def test_gradients_work_after_a_first_call_in_inference_mode() -> None:
    mixture = random_mixture((2, 1, 1), rank=1)
    x, labels = torch.zeros(1, 2, 1, 1), torch.tensor([0])
    with torch.inference_mode():
        mixture.denoised(x, 0.6, 0.8, labels)
    x.requires_grad_()
    mixture.denoised(x, 0.6, 0.8, labels).sum().backward()
    assert x.grad is not None


def test_a_sample_depends_on_its_seed_index_and_label_alone() -> None:
    mixture = random_mixture((1, 2, 2), rank=2)
    images, labels = mixture.sample(7, range(20))
    assert images.shape == (20, 1, 2, 2)
    assert images.dtype == np.float32
    some, their_labels = mixture.sample(7, [13, 2])
    np.testing.assert_array_equal(some, images[[13, 2]])
    np.testing.assert_array_equal(their_labels, labels[[13, 2]])
    np.testing.assert_array_equal(mixture.sample(7, range(20), labels)[0], images)
    assert not np.array_equal(mixture.sample(8, range(20), labels)[0], images)
    with pytest.raises(InputError, match="label 3"):
        mixture.sample(0, [0], [3])
    with pytest.raises(InputError, match="2 labels for 1"):
        mixture.sample(0, [0], [1, 1])


def test_samples_have_the_mixtures_moments() -> None:
    mixture = random_mixture((1, 2, 2), rank=2)
    count = 20000
    for label in (None, 1):
        images, _ = mixture.sample(0, range(count), None if label is None else np.full(count, label))
        flat = images.reshape(count, -1).astype(np.float64)
        spread = np.sqrt(np.diag(mixture.covariance(label)))
        # Five standard errors of a mean; of a covariance, whose error is about 1 / sqrt(n) of the variances, seven.
        assert np.abs((flat.mean(axis=0) - mixture.mean(label)) / spread).max() < 5 / np.sqrt(count)
        error = (np.cov(flat.T) - mixture.covariance(label)) / np.outer(spread, spread)
        assert np.abs(error).max() < 7 / np.sqrt(count)


def test_classes_are_told_apart_as_well_as_can_be() -> None:
    mixture = random_mixture((1, 2, 2), rank=1)
    images, labels = mixture.sample(0, range(2000))
    flat = images.reshape(2000, -1).astype(np.float64)
    likeliest = np.argmax([density(mixture, flat, k) for k in range(3)], axis=0)
    np.testing.assert_array_equal(mixture.classify(images), likeliest)
    assert 0.5 < (likeliest == labels).mean() < 1


@pytest.mark.parametrize(("make", "shape", "classes"), [(mixture_2d, (2, 1, 1), 8), (mixture_16, (1, 16, 16), 10)])
def test_built_in_mixtures(make, shape, classes) -> None:
    mixture = make()
    assert (mixture.sample_shape, mixture.num_classes) == (shape, classes)
    images, labels = mixture.sample(0, range(2000))
    assert (np.abs(images) <= 1).mean() > 0.98  # pictures are clipped to -1 ... 1
    assert 0.3 < images.std() < 0.6
    assert (mixture.classify(images) == labels).mean() > 0.99
    assert make().fingerprint == mixture.fingerprint
    assert make(seed=1).fingerprint != mixture.fingerprint


def test_every_parameter_counts_for_the_fingerprint() -> None:
    mixture = random_mixture((2, 1, 1), rank=1)
    changed = [dataclasses.replace(mixture, **{name: getattr(mixture, name)[::-1]}) for name in
               ("means", "weights", "variances", "factors")]  # fmt: skip
    assert len({other.fingerprint for other in (mixture, *changed)}) == 5


def test_wrong_parameters_are_refused() -> None:
    mixture = random_mixture((2, 1, 1), rank=1)
    with pytest.raises(InputError, match=r"expected \[K, M, 3\]"):
        dataclasses.replace(mixture, sample_shape=(3, 1, 1))
    with pytest.raises(InputError, match="weights of a class sum to"):
        dataclasses.replace(mixture, weights=mixture.weights * 2)
    with pytest.raises(InputError, match="smallest variance is 0"):
        dataclasses.replace(mixture, variances=mixture.variances * 0)
