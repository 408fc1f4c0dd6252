"""Sizes that no transformer has are refused before anything is allocated."""

from __future__ import annotations

import numpy as np
import pytest
from factories import tiny_config

from pyard.errors import InputError


@pytest.mark.parametrize(("name", "value"), [
    ("num_heads", -2), ("num_heads", 0), ("depth", 10**9), ("depth", 0), ("depth", 2.5), ("patch_size", 0),
    ("hidden_size", "32"),
    ("num_classes", -1), ("input_size", -8), ("mlp_ratio", float("nan")), ("mlp_ratio", -1.0), ("norm_eps", float("nan")),
    ("time_scale", float("inf")), ("in_channels", 10**12), ("frequency_size", True),
])  # fmt: skip
def test_sizes_out_of_range_are_one_line(name, value):
    with pytest.raises(InputError, match=f"DiT: {name} is ") as refusal:
        tiny_config(**{name: value})
    assert "\n" not in str(refusal.value)


def test_whole_numbers_of_any_kind_are_sizes():
    config = tiny_config(depth=np.int64(2))
    assert (config, type(config.depth)) == (tiny_config(depth=2), int)
