"""Precision and recall of generated samples, from nearest neighbours in a feature space."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from pyard.errors import InputError

_CHUNK_ELEMENTS = 2**20  # distances that are held at once: 8 MiB, which stay in the processor's cache
# Distances come from |a|^2 + |b|^2 - 2 a.b, which leaves of two equal vectors' distance some units in the last place of |a|^2.
_ROUNDING = 1e-12


class PrecisionRecall(NamedTuple):
    """Share of the generated samples that look real, and share of the real ones that the generator covers; both 0 to 1."""

    precision: float
    recall: float


def precision_recall(
    real_features: np.ndarray, fake_features: np.ndarray, k: int = 3, *, device: torch.device | str | None = None
) -> PrecisionRecall:
    """Precision and recall of Kynkäänniemi et al. 2019, equations 1 and 2.

    Each set's manifold is the union of balls around its vectors, each of which reaches to its vector's k-th nearest neighbour
    in its own set. Precision is the share of generated vectors in the real manifold, recall the share of real vectors in the
    generated one. Exact, in float64, in chunks of a few MiB. Both numbers depend on the sets' sizes and compare only under
    equal ones.

    Args:
        real_features: [m, D], m > k.
        fake_features: [n, D], n > k.
        k: which neighbour sets the radius; 3 in the paper and in ADM's protocol.
        device: where distances are computed; None: CUDA where there is one.

    Returns:
        (precision, recall).

    Raises:
        InputError: shapes that do not go together, too few vectors, or values that are not finite.
    """
    for name, features in (("real_features", real_features), ("fake_features", fake_features)):
        if features.ndim != 2 or len(features) <= k:
            raise InputError(
                f"precision and recall: {name} of shape {features.shape}; expected [n, D] with n > k, and k is {k}"
            )
        if not np.isfinite(features).all():
            raise InputError(f"precision and recall: {name} contain NaN or infinity; look for them in the images")
    if real_features.shape[1] != fake_features.shape[1]:
        raise InputError(
            f"precision and recall: {real_features.shape[1]} real and {fake_features.shape[1]} generated features; expected "
            "the same network for both"
        )
    if k < 1:
        raise InputError(f"precision and recall: k is {k}; expected at least 1")
    # Distances do not change with the origin, their rounding does.
    origin = real_features.mean(axis=0, dtype=np.float64)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    real, fake = (torch.from_numpy(f.astype(np.float64) - origin).to(device) for f in (real_features, fake_features))
    real_reach, fake_reach = _squared_radii(real, k), _squared_radii(fake, k)
    precise = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in _chunks(len(fake), len(real)):
        squared = _squared_distances(fake[rows], real)  # [rows, m]
        precise[rows] = (squared <= real_reach).any(dim=1)
        recalled |= (squared <= fake_reach[rows, None]).any(dim=0)
    return PrecisionRecall(float(precise.double().mean()), float(recalled.double().mean()))


def _squared_radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """The squared distance of each of [n, D] to its k-th nearest neighbour, itself excluded, rounded up: float64 [n]."""
    radii = torch.empty(len(features), dtype=torch.float64, device=features.device)
    for rows in _chunks(len(features), len(features)):
        squared = _squared_distances(features[rows], features)
        squared.diagonal(rows.start).fill_(torch.inf)
        radii[rows] = squared.topk(k, dim=1, largest=False).values[:, -1]
    return radii + _ROUNDING * (radii + features.square().sum(dim=1))


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a_i - b_j|^2 of [n, D] and [m, D], [n, m]."""
    norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    return torch.addmm(norms, a, b.T, alpha=-2).clamp_(min=0)


def _chunks(rows: int, columns: int) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // columns)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
