"""Class-conditional Gaussian mixtures: data whose score has a closed form, so that a student's errors are its own."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pyard.diffusion.noise import check_labels, sample_generator
from pyard.errors import InputError

# Streams of `sample_generator`: a mixture's samples, the parameters of the built-in ones.
_SAMPLE_STREAM = 2
_PARAMETER_STREAM = 3


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Data x_0 of K equally frequent classes, each a mixture of M Gaussians of dimension D.

    Component m of class k is N(means[k, m], factors[k, m] factors[k, m]^T + variances[k, m] I).

        K classes · M components a class · D = C H W dimensions · R rank of the factors · B batch · J = K M components

    Args:
        sample_shape: (C, H, W) of one sample; D values.
        means: float64 [K, M, D].
        weights: shares of the components within a class, float64 [K, M]; rows sum to 1.
        variances: isotropic part of the covariances, float64 [K, M], above 0.
        factors: low-rank part of the covariances, float64 [K, M, D, R]; R may be 0.
    """

    sample_shape: tuple[int, ...]
    means: np.ndarray
    weights: np.ndarray
    variances: np.ndarray
    factors: np.ndarray

    def __post_init__(self) -> None:
        for name in ("means", "weights", "variances", "factors"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=np.float64))
        object.__setattr__(self, "sample_shape", tuple(int(size) for size in self.sample_shape))
        shapes = (self.means.shape, self.weights.shape, self.variances.shape, self.factors.shape)
        lead, dim, rank = self.means.shape[:-1], math.prod(self.sample_shape), self.factors.shape[-1]
        if len(lead) != 2 or shapes != ((*lead, dim), lead, lead, (*lead, dim, rank)):
            raise InputError(
                f"mixture of samples {self.sample_shape}: means, weights, variances and factors have shapes {shapes}; "
                f"expected [K, M, {dim}], [K, M], [K, M] and [K, M, {dim}, R]"
            )
        if not np.allclose(self.weights.sum(axis=1), 1) or (self.weights < 0).any():
            raise InputError(f"mixture: weights of a class sum to {self.weights.sum(axis=1)}; expected 1, and none below 0")
        if not (self.variances > 0).all():
            raise InputError(f"mixture: the smallest variance is {self.variances.min()}; expected more than 0")

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.means)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of shapes and parameters."""
        digest = hashlib.sha256(repr((self.sample_shape, self.factors.shape)).encode())
        for array in (self.means, self.weights, self.variances, self.factors):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def sample(
        self, seed: int, indices: Sequence[int] | np.ndarray, labels: Sequence[int] | np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw samples; sample i of a seed depends on (seed, i) and its label alone.

        Args:
            seed: 0 to 2**64 - 1.
            indices: n sample indices.
            labels: n classes; None draws them uniformly.

        Returns:
            (x_0 float32 [n, C, H, W], labels int64 [n]).
        """
        uniform, normal = np.empty((len(indices), 2)), np.empty((len(indices), self._dim + self._rank))
        for row, index in enumerate(indices):
            random = sample_generator(seed, int(index), _SAMPLE_STREAM)
            uniform[row], normal[row] = random.random(2), random.standard_normal(normal.shape[1])
        drawn = (
            (uniform[:, 0] * self.num_classes).astype(np.int64) if labels is None else check_labels(labels, self.num_classes)
        )
        if len(drawn) != len(indices):
            raise InputError(f"mixture: {len(drawn)} labels for {len(indices)} indices")
        chosen = tuple(torch.from_numpy(array) for array in (drawn, uniform[:, 1], normal))
        return self.transform(*chosen).numpy(), drawn

    def transform(self, labels: torch.Tensor, uniform: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        """Random numbers to samples.

        Args:
            labels: int64 [B].
            uniform: float64 [B], 0 to 1; chooses the component.
            normal: float64 [B, D + R], standard normal.

        Returns:
            x_0, float32 [B, C, H, W].
        """
        p = self._tensors(labels.device)
        ends = p.weights.view(self.num_classes, -1).cumsum(dim=1) * self.num_classes  # [K, M]
        # The last end may be rounded to just below 1.
        component = (uniform[:, None] >= ends[labels, :-1]).sum(dim=1)
        chosen = labels * ends.shape[1] + component  # [B], in J
        isotropic, factor = normal.split([self._dim, self._rank], dim=1)
        spread = (p.directions[chosen] * p.scales[chosen][:, None] @ factor[:, :, None])[:, :, 0]
        x = p.means[chosen] + p.variances[chosen].sqrt()[:, None] * isotropic + spread
        return x.float().view(-1, *self.sample_shape)

    def denoised(
        self,
        x: torch.Tensor,  # [B, C, H, W], x_t
        alpha: float | torch.Tensor,
        sigma: float | torch.Tensor,
        labels: torch.Tensor,  # [B] int64; K: any class
    ) -> torch.Tensor:  # [B, C, H, W] float64
        """The posterior mean E[x_0 | x_t, class] for x_t = alpha x_0 + sigma eps; alpha and sigma are numbers or [B]."""
        p = self._tensors(x.device)
        alpha, sigma = _column(alpha, x.device), _column(sigma, x.device)
        flat = x.double().flatten(1)  # [B, D]
        along = self._along_factors(flat, alpha, p)  # [B, J, R]
        share = self._log_joint(flat, along, alpha, sigma, labels, p).softmax(dim=1)  # [B, J]
        # Of component j: m + a (d - Q Q^T d) + Q c Q^T d with d = x - alpha m, the gain a across its factors and c along them.
        across_gain = alpha * p.variances / (alpha**2 * p.variances + sigma**2)  # [B, J]
        variance = p.scales**2 + p.variances[:, None]  # [J, R], along the factors
        gain = alpha[..., None] * variance / (alpha[..., None] ** 2 * variance + sigma[..., None] ** 2)  # [B, J, R]
        result = (share * (1 - alpha * across_gain)) @ p.means + (share * across_gain).sum(dim=1, keepdim=True) * flat
        coefficients = share[..., None] * (gain - across_gain[..., None]) * along
        result = result + torch.einsum("bjr,jdr->bd", coefficients, p.directions)
        return result.view_as(x)

    def log_density(
        self, x: torch.Tensor, alpha: float | torch.Tensor, sigma: float | torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:  # [B] float64
        """log p(x_t | class); arguments as in `denoised`, and sigma may be 0."""
        p = self._tensors(x.device)
        alpha, sigma = _column(alpha, x.device), _column(sigma, x.device)
        flat = x.double().flatten(1)
        return self._log_joint(flat, self._along_factors(flat, alpha, p), alpha, sigma, labels, p).logsumexp(dim=1)

    def classify(self, images: np.ndarray) -> np.ndarray:
        """The likeliest class of each x_0 (Bayes' rule): [n, C, H, W] to int64 [n]."""
        x = torch.tensor(images)  # a copy, as what was read from a file may not be written to
        each = [
            self.log_density(x, 1.0, 0.0, torch.full((len(x),), label, dtype=torch.int64)) for label in range(self.num_classes)
        ]
        return torch.stack(each).argmax(dim=0).numpy()

    def mean(self, label: int | None = None) -> np.ndarray:
        """E[x_0] of a class, or of all: float64 [D]."""
        classes = self._classes(label)
        return np.einsum("km,kmd->d", self.weights[classes], self.means[classes]) / len(self.means[classes])

    def covariance(self, label: int | None = None) -> np.ndarray:
        """Cov[x_0] of a class, or of all: float64 [D, D]."""
        classes = self._classes(label)
        weights = self.weights[classes] / len(self.weights[classes])
        centred = self.means[classes] - self.mean(label)
        factors = self.factors[classes]
        between = np.einsum("km,kmd,kme->de", weights, centred, centred, optimize=True)
        within = np.einsum("km,kmdr,kmer->de", weights, factors, factors, optimize=True)
        return between + within + (weights * self.variances[classes]).sum() * np.eye(self._dim)

    def _log_joint(
        self,
        flat: torch.Tensor,  # [B, D]
        along: torch.Tensor,  # [B, J, R]
        alpha: torch.Tensor,  # [B or 1, 1]
        sigma: torch.Tensor,  # [B or 1, 1]
        labels: torch.Tensor,  # [B]
        p: _Parameters,
    ) -> torch.Tensor:  # [B, J]
        """log p(component, x_t | class); -inf for components of other classes."""
        noise = alpha**2 * p.variances + sigma**2  # [B, J]
        square = (
            flat.square().sum(dim=1, keepdim=True) - 2 * alpha * flat @ p.means.T + alpha**2 * p.means.square().sum(dim=1)
        )  # |x - alpha m|^2
        signal = alpha[..., None] ** 2 * p.scales**2  # [B, J, R]
        ratio = signal / noise[..., None]
        mahalanobis = (square - (ratio / (1 + ratio) * along.square()).sum(dim=2)) / noise  # Woodbury's identity
        log_determinant = self._dim * noise.log() + ratio.log1p().sum(dim=2)
        log_density = -0.5 * (mahalanobis + log_determinant + self._dim * math.log(2 * math.pi))
        owner = torch.arange(self.num_classes, device=flat.device).repeat_interleave(self.means.shape[1])
        any_class = (labels == self.num_classes)[:, None]
        belongs = (owner == labels[:, None]) | any_class
        log_weight = p.weights.log() + math.log(self.num_classes) * (~any_class).double()
        return (log_density + log_weight).masked_fill(~belongs, -torch.inf)

    def _along_factors(self, flat: torch.Tensor, alpha: torch.Tensor, p: _Parameters) -> torch.Tensor:  # [B, D] -> [B, J, R]
        projected = torch.einsum("bd,jdr->bjr", flat, p.directions)
        return projected - alpha[..., None] * torch.einsum("jd,jdr->jr", p.means, p.directions)

    def _classes(self, label: int | None) -> slice:
        return slice(None) if label is None else slice(label, label + 1)

    @property
    def _dim(self) -> int:
        return self.means.shape[2]

    @property
    def _rank(self) -> int:
        return min(self.factors.shape[2:])

    @functools.cache  # noqa: B019 - mixtures are few and live as long as the process
    def _tensors(self, device: torch.device) -> _Parameters:
        # An inference tensor, were this first called while sampling, would be no good for a gradient later.
        with torch.inference_mode(False):
            directions, scales, _ = np.linalg.svd(self.factors, full_matrices=False)
            arrays = (self.means, self.weights / self.num_classes, self.variances, directions, scales)
            return _Parameters(*(torch.from_numpy(array).flatten(0, 1).to(device) for array in arrays))


@dataclass(frozen=True)
class _Parameters:
    """A mixture's J = K M components as float64 tensors on a device; factors = directions diag(scales) rotation."""

    means: torch.Tensor  # [J, D]
    weights: torch.Tensor  # [J], of all classes together
    variances: torch.Tensor  # [J]
    directions: torch.Tensor  # [J, D, R], orthonormal columns
    scales: torch.Tensor  # [J, R]


def mixture_2d(seed: int = 0) -> GaussianMixture:
    """Points of the plane, samples (2, 1, 1): 8 classes of 4 narrow components each, 32 places of a jittered 6 x 6 grid.

    A class's components lie anywhere on the grid, so the flow of its ODE has to tear noise apart.
    """
    random = sample_generator(seed, 0, _PARAMETER_STREAM)
    rows, columns = np.divmod(np.arange(36), 6)
    grid = np.stack([columns, rows], axis=1) / 2.5 - 1  # -1 to 1
    places = 0.8 * grid[np.abs(grid).sum(axis=1) < 2]  # without the corners
    places = random.permutation(places + random.uniform(-0.04, 0.04, places.shape))
    angle = random.uniform(0, math.pi, (8, 4))
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=2)
    return GaussianMixture(
        sample_shape=(2, 1, 1),
        means=places.reshape(8, 4, 2),
        weights=random.dirichlet(np.full(4, 5.0), 8),
        variances=np.full((8, 4), 0.015**2),
        factors=0.05 * direction[..., None],
    )


def mixture_16(seed: int = 0) -> GaussianMixture:
    """Smooth grey images, samples (1, 16, 16): 10 classes of 4 components each, and a little noise.

    Means and factors are random fields of low spatial frequency. The components of a class share a part of their means. All
    vary in the same 12 directions, each class with the directions' variances in another order.
    """
    random = sample_generator(seed, 0, _PARAMETER_STREAM)
    shared = _smooth_fields(random, (10, 1), cycles=1.2)
    means = 0.34 * (shared + _smooth_fields(random, (10, 4), cycles=1.5)) / math.sqrt(2)
    # Spectrum as of natural images: the k-th direction has a variance in proportion to 1 / k.
    strengths = random.permuted(np.tile(1 / np.sqrt(np.arange(1, 13)), (10, 1)), axis=1)
    strengths = 0.2 * strengths / np.linalg.norm(strengths, axis=1, keepdims=True)
    factors = _smooth_fields(random, (12,), cycles=2.5).T * strengths[:, None, None]  # [10, 1, 256, 12]
    return GaussianMixture(
        sample_shape=(1, 16, 16),
        means=means,
        weights=random.dirichlet(np.full(4, 5.0), 10),
        variances=np.full((10, 4), 0.04**2),
        factors=np.broadcast_to(factors, (10, 4, 256, 12)),
    )


def _smooth_fields(random: np.random.Generator, lead: tuple[int, ...], cycles: float) -> np.ndarray:
    """Gaussian random fields [*lead, 256] of mean square 1 on 16 x 16 pixels; amplitudes fall off beyond `cycles` an image."""
    # Twice the image, of which a quarter is kept: the fields are periodic, images are not.
    frequency = np.fft.fftfreq(32, d=1 / 16)
    radius = np.hypot(frequency[:, None], frequency)
    spectrum = np.fft.fft2(random.standard_normal((*lead, 32, 32))) * np.exp(-((radius / cycles) ** 2))
    fields = np.fft.ifft2(spectrum).real[..., :16, :16].reshape(*lead, 256)
    return fields / np.sqrt(np.square(fields).mean(axis=-1, keepdims=True))


def _column(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:  # number or [B] -> [1 or B, 1]
    return torch.as_tensor(value, dtype=torch.float64, device=device).reshape(-1, 1)
