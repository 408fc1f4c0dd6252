"""How many samples a teacher computes together unless it is told."""

from __future__ import annotations

from pyard.models.backbone import Backbone

USUAL = 64
_MOST_BYTES = 4 * 2**30


def default_batch_size(trunk: Backbone, sample_shape: tuple[int, ...]) -> int:
    """64, or the largest power of two of samples whose activations are below about 4 GiB, but at least 1.

    What a block holds at once is counted as 8 D numbers a token in bfloat16: the 4 D of its MLP and about as much again for
    its attention, both for the two halves of guidance. It depends on sizes alone, so that every machine writes the same bytes.

    Args:
        trunk: the teacher's.
        sample_shape: [C, ...] of the samples.
    """
    sample_bytes = 2 * 2 * 8 * trunk.hidden_size * trunk.tokens_per_step(sample_shape)
    fits = max(1, _MOST_BYTES // sample_bytes)
    return int(min(USUAL, 2 ** (fits.bit_length() - 1)))
