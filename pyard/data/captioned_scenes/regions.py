"""Connected regions of many small pictures at once."""

from __future__ import annotations

import numpy as np


def label_regions(mask: np.ndarray) -> np.ndarray:
    """Number the connected regions of pictures, neighbours being the eight around a pixel.

    Args:
        mask: bool [n, P, P].

    Returns:
        int64 [n, P, P]: 0 where the mask is false, else 1 to K, another number for every region, in the order of the pictures.
    """
    # Every pixel takes the largest number around it until none changes: as many rounds as the longest path, which is short.
    numbers = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = np.where(mask, _largest_around(numbers), 0)
        if np.array_equal(spread, numbers):
            break
        numbers = spread
    present, dense = np.unique(numbers, return_inverse=True)
    return dense.reshape(mask.shape) + (0 if present.size and present[0] == 0 else 1)


def grown(regions: np.ndarray) -> np.ndarray:
    """Regions with the pixels around them; one between two regions goes to the one with the larger number.

    Args:
        regions: int64 [n, P, P], 0 where there is none.
    """
    return np.where(regions > 0, regions, _largest_around(regions))


def _largest_around(numbers: np.ndarray) -> np.ndarray:
    padded = np.pad(numbers, ((0, 0), (1, 1), (1, 1)))
    rows = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    return np.maximum(np.maximum(rows[:, :, :-2], rows[:, :, 1:-1]), rows[:, :, 2:])
