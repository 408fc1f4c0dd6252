"""The Inception Score, from what a classifier says of generated samples."""

from __future__ import annotations

import numpy as np

from pyard.errors import InputError


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """exp of the mean KL divergence of p(class | sample) from p(class) (Salimans et al. 2016, section 4), in float64.

    As in ADM's protocol the samples are split in their order into parts of `split_size`, each with a p(class) of its own, and
    the scores of the parts are averaged. The samples' order must therefore not sort them by class.

    Args:
        probabilities: p(class | sample), [n, classes], rows sum to 1.
        split_size: samples a part; the last part may be smaller.

    Returns:
        The score, 1 to the number of classes.

    Raises:
        InputError: no samples, or rows that are no distributions.
    """
    if probabilities.ndim != 2 or not probabilities.size or split_size < 1:
        raise InputError(
            f"Inception Score: probabilities of shape {probabilities.shape} in parts of {split_size}; expected [n, classes], "
            "n and the parts at least 1"
        )
    probabilities = probabilities.astype(np.float64)
    if not (probabilities >= 0).all() or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
        raise InputError("Inception Score: rows are not distributions over classes; expected softmax outputs, not logits")
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size]
        # p log p and p log q vanish where p does.
        logarithms = np.log(part, out=np.zeros_like(part), where=part > 0)
        marginal = part.mean(axis=0)
        logarithms -= np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
        scores.append(np.exp((part * logarithms).sum(axis=1).mean()))
    return float(np.mean(scores))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [n, classes] to probabilities, in float64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
