"""Bytes and resizing, against what the protocols' own formulas give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pyard.errors import InputError
from pyard.evaluation.pixels import resized, to_bytes


def test_both_formulas_at_their_edges() -> None:
    values = np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0, 3 / 127.5 - 1 + 1e-4, 3.6 / 127.5 - 1], np.float32)[None, None, None]
    assert to_bytes(values, "adm").ravel().tolist() == [0, 0, 127, 254, 255, 255, 3, 3]
    assert to_bytes(values, "rounded").ravel().tolist() == [0, 0, 128, 255, 255, 255, 3, 4]


def test_both_formulas_are_those_of_the_published_scripts() -> None:
    x = torch.empty(2, 3, 9, 9).uniform_(-1.3, 1.3)
    adm = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    dit = torch.clamp(127.5 * x + 128.0, 0, 255).to(torch.uint8)
    assert (to_bytes(x.numpy(), "adm") == adm.numpy()).all()
    assert (to_bytes(x.numpy(), "rounded") == dit.numpy()).all()
    assert (adm != dit).float().mean() > 0.3


def test_bytes_stay_and_nan_is_an_error() -> None:
    images = np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2)
    assert to_bytes(images) is images
    with pytest.raises(InputError, match="NaN"):
        to_bytes(np.full((1, 1, 2, 2), np.nan, np.float32))
    with pytest.raises(InputError, match="quantise is 'floor'"):
        to_bytes(np.zeros((1, 1, 2, 2), np.float32), "floor")  # type: ignore[arg-type]


def test_tensorflow_1_puts_pixel_i_at_i_times_the_scale() -> None:
    # A ramp stays a ramp: pixel i of the result is at i H / size, up to the last source pixel.
    ramp = torch.arange(6.0).repeat(4, 1)[None, None]  # [1, 1, 4, 6]
    found = resized(ramp, 9, "tf1")[0, 0]
    expected = (torch.arange(9) * 6 / 9).clamp(max=5)
    torch.testing.assert_close(found, expected.repeat(9, 1))
    tall = resized(ramp.transpose(2, 3).contiguous(), 3, "tf1")[0, 0]
    torch.testing.assert_close(tall, torch.tensor([0.0, 2.0, 4.0])[:, None].repeat(1, 3))


def test_tensorflow_1_equals_grid_sampling_with_its_half_pixel_shift() -> None:
    x = torch.rand(2, 3, 20, 31)
    theta = torch.eye(2, 3).repeat(2, 1, 1)
    theta[:, 0, 2] = 1 / 31 - 1 / 17
    theta[:, 1, 2] = 1 / 20 - 1 / 17
    grid = torch.nn.functional.affine_grid(theta, [2, 3, 17, 17], align_corners=False)
    expected = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(resized(x, 17, "tf1"), expected, rtol=1e-4, atol=1e-5)


def test_antialias_is_pillow_s_filter_and_plain_bilinear_is_not() -> None:
    x = torch.rand(1, 1, 40, 40)
    pillow = np.asarray(Image.fromarray(x[0, 0].numpy()).resize((11, 11), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(resized(x, 11, "antialias")[0, 0].numpy(), pillow, atol=1e-5)
    assert np.abs(resized(x, 11, "bilinear")[0, 0].numpy() - pillow).max() > 0.05
