from __future__ import annotations

import pytest
import torch
from factories import randomise, tiny_config, tiny_teacher

from pyard.errors import InputError
from pyard.models.dit.network import DiT, patchify, sincos_position_embedding, unpatchify


def test_patches_are_read_row_by_row():
    image = torch.arange(2 * 4 * 4).view(2, 4, 4)  # C, H, W
    tokens = patchify(image, 2)
    assert tokens.shape == (4, 8)
    # Token 1 is the top right patch: channel 0 rows 0-1 of columns 2-3, then channel 1.
    assert tokens[1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


def test_unpatchify_puts_channels_last_in_a_token():
    tokens = torch.zeros(4, 8)
    tokens[2, 5] = 1.0  # bottom left patch; (p, q, c) = (1, 0, 1)
    image = unpatchify(tokens, 2, 2)
    assert image.nonzero().tolist() == [[1, 3, 0]]


def test_patchify_and_unpatchify_agree_on_one_channel():
    image = torch.randn(3, 1, 8, 8)
    assert torch.equal(unpatchify(patchify(image, 4), 4, 1), image)


def test_position_embedding_encodes_columns_in_its_first_half():
    embedding = sincos_position_embedding(4, 16).view(4, 4, 16)
    assert torch.equal(embedding[0, :, :8], embedding[3, :, :8])
    assert torch.equal(embedding[:, 0, 8:], embedding[:, 3, 8:])
    assert torch.allclose(embedding[2, 3, :4], torch.sin(3.0 * 10000.0 ** (-torch.arange(4) / 4)))


def test_fresh_network_outputs_zeros_and_a_random_one_does_not():
    network = DiT(tiny_config())
    x, times, labels = torch.randn(2, 2, 8, 8), torch.tensor([3.0, 990.5]), torch.tensor([0, 5])
    assert network(x, times, labels).abs().max() == 0
    randomise(network)
    first = network(x, times, labels)
    assert first.abs().max() > 1e-2
    assert (network(x, times + 100, labels) - first).abs().max() > 1e-3


def test_unconditional_label_needs_label_dropout():
    teacher = tiny_teacher(has_null_label=False)
    with pytest.raises(InputError, match="label dropout"):
        teacher.predict(torch.randn(1, 2, 8, 8), 5.0, torch.tensor([5]))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="not a multiple of patch_size"):
        tiny_config(input_size=9)
    with pytest.raises(InputError, match="num_heads"):
        tiny_config(num_heads=3)
