from __future__ import annotations

import pytest
import torch
from factories import randomise
from torch import nn

from pyard.errors import InputError
from pyard.models.discriminator import Discriminator, DiscriminatorHead, VirtualBatchNorm


def head(**changes) -> DiscriminatorHead:
    made = DiscriminatorHead(**{"hidden_size": 12, "width": 6, "depth": 2, "kernel_size": 5, "group": 4, **changes})
    randomise(made, std=0.5)
    return made


def test_virtual_batch_norm_is_batch_norm_of_each_group():
    ours, theirs = VirtualBatchNorm(6, 4), nn.BatchNorm1d(6, track_running_stats=False)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(12, 6, 9) * 3 + 1
    expected = torch.cat([theirs(group) for group in x.split(4)])
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="virtual batches of 4 samples do not fit a batch of 6"):
        ours(x[:6])


def test_logits_of_a_group_depend_on_no_other_group():
    made = head()
    features, condition = torch.randn(8, 16, 12), torch.randn(8, 12)
    made.eval()  # spectral norm's power iteration stands still
    both, _ = made(features, condition)
    first, _ = made(features[:4], condition[:4])
    torch.testing.assert_close(both[:4], first)


def test_every_convolution_has_spectral_norm_1():
    made = head()
    for _ in range(60):
        made(torch.randn(4, 16, 12), torch.randn(4, 12))
    convolutions = [module for module in made.modules() if isinstance(module, nn.Conv1d)]
    assert [conv.kernel_size for conv in convolutions] == [(1,), (5,), (5,), (1,)]
    for conv in convolutions:
        assert float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)) == pytest.approx(1.0, rel=1e-2)


def test_tokens_are_a_ring():
    made = head().eval()
    features, condition = torch.randn(4, 16, 12), torch.randn(4, 12)
    logits, _ = made(features, condition)
    rolled, _ = made(features.roll(5, dims=1), condition)
    torch.testing.assert_close(rolled, logits.roll(5, dims=1), rtol=1e-4, atol=1e-5)


def test_logits_are_projected_on_the_conditioning():
    """Logits are linear in the conditioning, but for the projection's bias."""
    made = head().eval()
    features, a, b = torch.randn(4, 16, 12), torch.randn(4, 12), torch.randn(4, 12)
    of = {name: made(features, c)[0] for name, c in (("a", a), ("b", b), ("both", a + b), ("none", torch.zeros(4, 12)))}
    torch.testing.assert_close(of["both"] + of["none"], of["a"] + of["b"], rtol=1e-3, atol=1e-4)
    assert (of["a"] - of["b"]).abs().mean() > 0.1 * of["a"].abs().mean()


@pytest.mark.parametrize(("depth", "width"), [(0, 4), (1, 6), (3, 10)])
def test_heads_of_any_depth_and_width(depth, width):
    made = Discriminator(3, 12, width=width, depth=depth, kernel_size=9, group=2)
    features = [torch.randn(4, 16, 12) for _ in range(3)]
    logits, hidden = made(features, torch.randn(4, 12))
    assert logits.shape == (4, 3, 16)
    assert [h.shape for h in hidden] == [(4, width, 16)] * 3
    logits.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in made.named_parameters() if not name.endswith("conv.bias")
    )


def test_even_kernels_are_refused():
    with pytest.raises(InputError, match="expected an odd number"):
        Discriminator(1, 12, width=4, depth=1, kernel_size=4, group=2)
