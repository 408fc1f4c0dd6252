"""The one source of randomness of trajectories, sampling and the ONNX runtime: the same bits on every machine.

Sample i of seed s is a function of (s, i) alone: not of the batch, the order, the process or the device it is drawn in.
Raw bits come from Philox 4x64-10 (Salmon et al. 2011), whose stream numpy guarantees; they become normal numbers
through the inverse of the normal distribution, computed with the IEEE operations + - * / sqrt alone: a library's log or
erfinv may differ in the last bit from one machine to the next, these may not.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from pyard.errors import InputError

_NOISE_STREAM = 0
_LABEL_STREAM = 1
_ORDER_STREAM = 2

# Wichura 1988, algorithm AS 241, routine PPND16: the normal quantile to about 1e-16. (numerator, denominator), lowest
# power first, of rational functions of r in the centre (|p - 1/2| <= 0.425), the tails (r <= 5) and the far tails.
_CENTRE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_TAIL = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
_FAR_TAIL = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
     2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)  # fmt: skip


def standard_normal(
    seed: int, indices: Sequence[int] | NDArray[np.integer[Any]], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Standard normal noise, one independent array for each sample index.

    Args:
        seed: 0 to 2**64 - 1.
        indices: n sample indices, 0 to 2**64 - 1, in any order; equal indices give equal noise.
        shape: shape of one sample, usually (C, H, W).

    Returns:
        float32 [n, *shape].

    Raises:
        InputError: a seed or an index out of range or no whole number, or a negative size.
    """
    seed, numbers = _whole_number("seed", seed), _sample_indices(indices)
    if any(size < 0 for size in shape):
        raise InputError(f"noise: shape {tuple(shape)}; expected sizes of 0 or more")
    size = int(np.prod(shape, dtype=np.int64))
    raw = np.empty((len(numbers), size), dtype=np.uint64)
    for row, index in zip(raw, numbers, strict=True):
        row[:] = _generator(seed, index, _NOISE_STREAM).random_raw(size)
    # Centres of 2**52 equal cells of (0, 1): exact in float64, symmetric, never 0 or 1.
    probability = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return normal_quantile(probability).astype(np.float32).reshape(len(numbers), *shape)


def uniform_labels(seed: int, indices: Sequence[int] | NDArray[np.integer[Any]], num_classes: int) -> NDArray[np.int64]:
    """Class labels drawn uniformly, independent of the noise of the same indices.

    Args:
        seed: 0 to 2**64 - 1.
        indices: n sample indices, 0 to 2**64 - 1.
        num_classes: labels are 0 to num_classes - 1.

    Returns:
        int64 [n].

    Raises:
        InputError: a seed or an index out of range or no whole number, or no class at all.
    """
    seed, numbers = _whole_number("seed", seed), _sample_indices(indices)
    if num_classes < 1:
        raise InputError(f"labels: {num_classes} classes; expected at least 1")
    # Lemire 2019: the high word of a 64-bit random number times num_classes; its bias is below num_classes / 2**64.
    labels = [_generator(seed, index, _LABEL_STREAM).random_raw() * num_classes >> 64 for index in numbers]
    return np.array(labels, dtype=np.int64)


def check_labels(labels: object, num_classes: int) -> NDArray[np.int64]:
    """Class labels that a caller gave, as int64 [n].

    Args:
        labels: one integer or a list, tuple, numpy array or tensor of n of them.
        num_classes: labels are 0 to num_classes - 1.

    Raises:
        InputError: not integers, more than one dimension, or a label out of range.
    """
    try:
        found = np.atleast_1d(np.asarray(labels))
    except ValueError:
        raise InputError(f"labels: found {labels!r:.100}; expected a list of integers") from None
    if isinstance(labels, list | tuple) or found.dtype == object:
        found = _integers_of_any_kind(found, labels)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise InputError(f"labels: found shape {found.shape} of {found.dtype}; expected a list of integers")
    wrong = found[(found < 0) | (found >= num_classes)]
    if wrong.size:
        raise InputError(f"label {wrong[0]}: expected 0 to {num_classes - 1} ({num_classes} classes)")
    return found.astype(np.int64)


def _integers_of_any_kind(found: NDArray[Any], labels: Any) -> NDArray[Any]:
    """Labels of several kinds as integers: numpy makes floats of uint64 and int64 together, and integers of switches."""
    if found.dtype.kind not in "fOiu" or found.ndim != 1 or not found.size:
        return found
    items = labels if isinstance(labels, list | tuple) else found.tolist()
    if any(isinstance(item, bool | np.bool_) for item in items):
        raise InputError(f"labels: found {items!r:.100}; expected a list of integers")
    if found.dtype.kind in "iu":
        return found
    with contextlib.suppress(TypeError, OverflowError):
        return np.array([operator.index(item) for item in items], dtype=np.int64)
    return found


def normal_quantile(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x with P(X <= x) = probability for a standard normal X; AS 241 with a logarithm of our own.

    Args:
        probability: float64, any shape, strictly between 0 and 1.

    Returns:
        float64, the same shape; relative error about 1e-15.
    """
    from_centre = probability - 0.5
    in_tail = np.abs(from_centre) > 0.425
    result = from_centre * _rational(_CENTRE, 0.180625 - from_centre * from_centre)
    tail = np.minimum(probability[in_tail], 1.0 - probability[in_tail])
    r = np.sqrt(-_log(tail))
    magnitude = np.where(r <= 5.0, _rational(_TAIL, r - 1.6), _rational(_FAR_TAIL, r - 5.0))
    result[in_tail] = np.where(from_centre[in_tail] < 0.0, -magnitude, magnitude)
    return result


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm by log m = 2 artanh((m - 1) / (m + 1)), m the mantissa moved into [sqrt(1/2), sqrt(2))."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, 2.0 * mantissa, mantissa)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    # |s| < 0.172: the first term left out is below 2e-19 of the sum.
    series = _polynomial(tuple(1.0 / (2 * k + 1) for k in range(12)), s * s)
    return (exponent - low) * 0.6931471805599453 + 2.0 * s * series


def _rational(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: NDArray[np.float64]) -> NDArray[np.float64]:
    return _polynomial(coefficients[0], x) / _polynomial(coefficients[1], x)


def _polynomial(coefficients: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    # A ufunc for each multiplication and each addition, which no compiler can contract into fused ones.
    result = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result *= x
        result += coefficient
    return result


def _generator(seed: int, index: int, stream: int) -> np.random.Philox:
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], dtype=np.uint64))


def _sample_indices(indices: Sequence[int] | NDArray[np.integer[Any]]) -> list[int]:
    values = indices.tolist() if isinstance(indices, np.ndarray) else list(indices)
    return [_whole_number("sample index", value) for value in values]


def _whole_number(name: str, value: SupportsIndex) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"noise: {name} is {value!r}; expected a whole number") from None
    if not 0 <= number < 2**64:
        raise InputError(f"noise: {name} is {number}; expected 0 to 2**64 - 1")
    return number


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of 0 ... count - 1 that is the same on every machine and with every numpy.

    numpy keeps the raw stream of Philox, not what `Generator.permutation` makes of it; hence the order of raw numbers,
    ties (one in 2**64 per pair) by index.
    """
    key, counter = np.array([seed, epoch], dtype=np.uint64), np.array([0, 0, 0, _ORDER_STREAM], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(count), kind="stable").astype(np.int64)


def sample_generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """What sample `index` of a seed is drawn from, whatever else is drawn; streams 0 and 1 are `pyard.diffusion.noise`'s."""
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], dtype=np.uint64)))
