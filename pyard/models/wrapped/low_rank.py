"""Expresses what a student learned as low-rank additions to its base's matrices, for programs that read LoRA files.

W base's matrix [m, n] · D difference to it · D = up @ down, up [m, r], down [r, n]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from pyard.errors import InputError
from pyard.storage.tensor_files import read_safetensors

# Larger matrices are decomposed by random projection.
_WHOLE_SVD = 512
_FIRST_SKETCH = 128
# Additions are low-rank if they have at most this fraction of the matrices' elements.
_LOW = 0.5


class Factors(NamedTuple):
    """An addition to a matrix: up @ down."""

    down: torch.Tensor  # [r, n]
    up: torch.Tensor  # [m, r]


@dataclass(frozen=True)
class LowRank:
    """Additions that turn a base into its student.

    Attributes:
        factors: additions by the name of the linear layer.
        left_out: tensors that differ but are not matrices of linear layers; the base's values are kept for them.
        error: || student - base - additions || / || student - base ||, over all tensors.
    """

    factors: Mapping[str, Factors]
    left_out: tuple[str, ...]
    error: float

    def beside(self, others: Mapping[str, Factors]) -> LowRank:
        """These additions and others, to the same base: where a layer has both, as one of the sum of their ranks."""
        both = dict(others)
        for name, own in self.factors.items():
            other = both.get(name)
            both[name] = own if other is None else Factors(torch.cat([own.down, other.down]), torch.cat([own.up, other.up], 1))
        return LowRank(both, self.left_out, self.error)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank r by the name of the layer."""
        return {name: len(factors.down) for name, factors in self.factors.items()}


def low_rank(
    student: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
    *,
    linear: frozenset[str],
    rank: int | None = None,
    stored: Mapping[str, Factors] | None = None,
) -> LowRank:
    """The difference of two models as additions of low rank, found by singular value decomposition.

    Args:
        student, base: tensors by name, of the same shapes; the base in the dtype from which the student's training started.
        linear: names of the linear layers whose `.weight` may get an addition.
        rank: largest rank to keep; None: the rank of the difference up to rounding, which must be low.
        stored: additions that were trained as such; they are used unchanged if they equal the difference.

    Raises:
        InputError: the models have different shapes; or, without `rank`, the difference is not of low rank or is in other
            tensors.
    """
    layers: dict[str, _Difference] = {}
    left_out: list[str] = []
    others = 0.0
    _check_names(student, base)
    for name, tensor in student.items():
        layer = name.removesuffix(".weight")
        trained = (stored or {}).get(layer) if name.endswith(".weight") else None
        # Merged into half precision, a small addition may round to nothing.
        if torch.equal(tensor, base[name].to(tensor.dtype)) and (trained is None or not trained.up.any()):
            continue
        if name.endswith(".weight") and layer in linear:
            layers[layer] = _difference(tensor, base[name], rank, trained)
        else:
            left_out.append(name)
            others += float((tensor.double() - base[name].double()).square().sum())
    if rank is None and left_out:
        raise InputError(
            f"a LoRA can only hold matrices of linear layers, but {_count(left_out)} of the student also differs from its "
            "base: use --to transformer, or train with lora_rank and the output layers as LoRA or frozen"
        )
    found = LowRank({name: d.factors for name, d in layers.items() if len(d.factors.down)}, tuple(left_out), 0.0)
    whole = sum(d.square for d in layers.values()) + others
    rest = sum(d.rest(len(d.factors.down)) for d in layers.values()) + others
    if rank is None:
        _check_low(layers, found, whole)
    return LowRank(found.factors, found.left_out, (rest / whole) ** 0.5 if whole else 0.0)


def stored_factors(file: Path, places: Mapping[str, str]) -> dict[str, Factors]:
    """Additions in a safetensors file, under PEFT's names: `<layer>.lora_A.<adapter>.weight`, with or without an adapter.

    Args:
        file: file with a student's weights.
        places: prefixes of names in the transformer, by the prefixes of the same layers in the file.
    """
    pattern = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_safetensors(file).items():
        match = pattern.fullmatch(key)
        place = next((place for place in places if key.startswith(place)), None)
        if match is not None and place is not None:
            layer = places[place] + match[1][len(place) :]
            sides.setdefault(layer, {})[match[2]] = tensor
    return {layer: Factors(pair["A"], pair["B"]) for layer, pair in sides.items() if pair.keys() == {"A", "B"}}


@dataclass(frozen=True)
class _Difference:
    """The difference of one matrix: its additions, its squared norm, and its leading singular values."""

    factors: Factors
    square: float
    values: torch.Tensor
    shape: tuple[int, int]

    def rest(self, rank: int) -> float:
        """Squared norm of the part that additions of a rank leave out."""
        return max(self.square - float(self.values[:rank].square().sum()), 0.0)


def _difference(
    student: torch.Tensor, base: torch.Tensor, rank: int | None, stored: Factors | None
) -> _Difference:  # [m, n] both
    difference = student.double() - base.double()
    m, n = difference.shape
    # Rounding errors are at most eps / 2 of a weight; as a random matrix their largest singular value is about this.
    rms = float(student.double().square().mean().sqrt())
    rounding = torch.finfo(student.dtype).eps / 2 * rms * (m**0.5 + n**0.5)
    square = float(difference.square().sum())
    # PixArt's output layer loses its predicted variance in a student: what was trained there has fewer rows than the base.
    if stored is not None and rank is None and len(stored.up) == m:
        addition = stored.up.double() @ stored.down.double()
        rest, whole = float((difference - addition).square().sum()), float(addition.square().sum())
        if rest**0.5 <= 1e-2 * square**0.5 + torch.finfo(student.dtype).eps * rms * (m * n) ** 0.5:
            # The rest is the rounding of the weights to which they were added, and none of what was trained.
            return _Difference(stored, whole, torch.tensor([whole**0.5], dtype=torch.float64), (m, n))
    u, values, v = _svd(difference, rounding, rank)
    significant = int((values > rounding).sum())
    kept = significant if rank is None else min(significant, rank)
    root = values[:kept].sqrt()
    factors = Factors((v[:, :kept] * root).T.to(student.dtype), (u[:, :kept] * root).to(student.dtype))
    return _Difference(factors, square, values, (m, n))


def _svd(matrix: torch.Tensor, small: float, rank: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular vectors and values of a matrix: `rank` of them, or all that are not small."""
    smaller = min(matrix.shape)
    if smaller > _WHOLE_SVD:
        sketch = _FIRST_SKETCH if rank is None else rank + 16
        while sketch < smaller * _LOW:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.svd_lowrank(matrix, sketch, niter=4)
            if rank is not None or float(found[1][-1]) <= small:
                return found
            sketch *= 2
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, values, vh.T


def _check_low(layers: Mapping[str, _Difference], found: LowRank, whole: float) -> None:
    held = sum(factors.down.numel() + factors.up.numel() for factors in found.factors.values())
    full = sum(d.shape[0] * d.shape[1] for d in layers.values())
    if held <= _LOW * full:
        return
    worst = max(layers, key=lambda name: len(layers[name].factors.down) / min(layers[name].shape))
    m, n = layers[worst].shape
    try_rank = max(1, min(64, min(min(d.shape) for d in layers.values()) // 4))
    rest = sum(d.rest(try_rank) for d in layers.values())
    raise InputError(
        f"the student's difference from its base has rank {len(layers[worst].factors.down)} in {worst} ({m} x {n}), so it was "
        "trained in full and is not a LoRA: use --to transformer, train with lora_rank, or accept an approximation: --rank "
        f"{try_rank} leaves {(rest / whole) ** 0.5:.0%} of the difference out"
    )


def _check_names(student: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> None:
    if student.keys() != base.keys():
        differing = sorted(student.keys() ^ base.keys())
        raise InputError(f"the base is another model: {differing[0]} is in only one of them ({len(differing)} such tensors)")
    for name, tensor in student.items():
        if tensor.shape != base[name].shape:
            raise InputError(f"the base has a different size: {name} is {tuple(base[name].shape)}, here {tuple(tensor.shape)}")


def _count(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
