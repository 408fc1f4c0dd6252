"""Handwritten digits that scikit-learn ships: real data without a download."""

from __future__ import annotations

import numpy as np

NUM_CLASSES = 10
DIGIT_SHAPE = (1, 8, 8)


def digits_data() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 handwritten digits that scikit-learn ships (UCI, Alpaydin & Kaynak 1998).

    Returns:
        (images float32 [1797, 1, 8, 8], -1 paper to 1 ink; labels int64 [1797], 0 to 9).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images / 8 - 1).astype(np.float32)  # 17 grey levels, 0 to 16
    return images[:, None], bunch.target.astype(np.int64)
