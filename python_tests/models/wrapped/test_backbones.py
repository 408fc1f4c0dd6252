"""Diffusers transformers as backbones: the wrapped model is the stock one, and its parallel pass is its cached rollout."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models import attention_dispatch

from pyard.conditions import Condition
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.teachers.network_teacher import NetworkTeacher

sys.path.append(str(Path(__file__).parent))
from tiny_transformers import NAMES, tiny_condition, tiny_network

FLOW = NoiseSchedule(kind="flow", prediction="velocity", shift=3.0)


class AnyPrompt:
    """Conditions of which nothing is asked here."""

    count, fingerprint, free_sizes = 2, "two prompts", {}


def student_of(name: str, steps: int = 3, seed: int = 0, **settings: Any) -> Student:
    teacher = NetworkTeacher(tiny_network(name, seed), FLOW, conditions=AnyPrompt())
    settings = {"history_layers": 2, "heads": "shared", "output": "jump", "history_bias": None, **settings}
    student = Student.from_teacher(teacher, TimeGrid.build(FLOW, steps, 6 * steps), **settings)
    if student.history_bias is not None:
        with torch.no_grad():
            student.history_bias.normal_(generator=torch.Generator().manual_seed(1))
    for number, head in enumerate(student.heads if len(student.heads) > 1 else ()):
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 0.1 * (number + 1) * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return student.eval()


def inputs(steps: int = 3, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(2, steps, 4, height, width, generator=torch.Generator().manual_seed(2))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def rolled_out(student: Student, history: torch.Tensor, condition: Condition) -> torch.Tensor:
    """The cached pass on a given history."""
    cache, predictions = student.new_cache(len(history), tuple(history.shape[2:])), []
    for step in range(history.shape[1]):
        prediction, cache = student.step(history[:, step], step, condition, cache)
        predictions.append(prediction)
    return torch.stack(predictions, dim=1)


def stock_call(name: str, transformer: Any, x: torch.Tensor, time: torch.Tensor, c: Condition) -> torch.Tensor:
    """The stock transformer called as its diffusers pipeline does, to a velocity; all texts of full length."""
    from torch.nn.functional import pixel_shuffle, pixel_unshuffle

    def unpacked(tokens: torch.Tensor) -> torch.Tensor:
        return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (x.shape[2] // 2, x.shape[3] // 2)), 2)

    packed = pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    if name == "pixart":
        nothing = {"resolution": None, "aspect_ratio": None}
        out = transformer(x, c["tokens"], time * 1000, nothing, encoder_attention_mask=c["mask"].float(), return_dict=False)[0]
        return out[:, :4]
    if name == "sd3":
        return transformer(x, c["tokens"], c["pooled"], time * 1000, return_dict=False)[0]
    if name == "aura_flow":
        return transformer(x, c["tokens"], time, return_dict=False)[0]
    if name == "flux":
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
        text_ids = torch.zeros(c["tokens"].shape[1], 3)
        return unpacked(
            transformer(packed, c["tokens"], c["pooled"], time, ids.flatten(0, 1), text_ids, c["guidance"], return_dict=False)[
                0
            ]
        )
    if name == "flux2":
        ids = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns), torch.arange(1))
        text_ids = torch.cartesian_prod(*[torch.arange(1)] * 3, torch.arange(c["tokens"].shape[1]))
        return unpacked(transformer(packed, c["tokens"], time, ids, text_ids, c["guidance"], return_dict=False)[0])
    if name == "qwen_image":
        shapes = [[(1, rows, columns)]] * len(x)
        return unpacked(transformer(packed, c["tokens"], None, time, shapes, return_dict=False)[0])
    out = transformer(list(x[:, :, None].unbind(0)), 1 - time, list(c["tokens"].unbind(0)), return_dict=False)[0]
    return -torch.stack([picture[:, 0] for picture in out])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_wrapped_is_the_stock_transformer(name: str) -> None:
    network, condition = tiny_network(name), tiny_condition(name, (4, 4))
    x, times = inputs(1)[:, 0], torch.tensor([0.9, 0.3])
    mine = network(x, times, condition)[:, :4]
    stock = network.trunk.stock(network.head)
    assert type(stock).__name__ == network.trunk.transformer_name
    theirs = stock_call(name, stock, x, times, condition)
    assert relative(mine, theirs) < 1e-5
    other = network(x, times.flip(0), condition)[:, :4]
    assert relative(other, mine) > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_parallel_pass_is_cached_rollout(name: str, steps: int) -> None:
    masks = (("causal", None), ("diagonal", None), ("window", 2), ("anchor", None))
    depth = tiny_network(name).config.depth
    for layers, (mask, window) in [(0, masks[0]), *((n, m) for m in masks for n in (2, depth))]:
        biased = mask == "causal" and layers == 2
        student = student_of(
            name, steps, history_layers=layers, mask=mask, window=window, history_bias=0.0 if biased else None,
            heads="per_step" if biased else "shared", output="direct" if biased else "jump",
        )  # fmt: skip
        history, condition = inputs(steps), tiny_condition(name)
        with torch.no_grad():
            parallel = student(history, condition)
        assert relative(rolled_out(student, history, condition), parallel) < 2e-5, (layers, mask)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_history_changes_later_steps_alone(name: str) -> None:
    student, plain = student_of(name), student_of(name, history_layers=0)
    history, condition = inputs(), tiny_condition(name)
    output = student(history, condition)
    assert relative(output[:, 0], plain(history, condition)[:, 0]) < 1e-5
    assert relative(output[:, 1:], plain(history, condition)[:, 1:]) > 1e-3
    changed = history.clone()
    changed[:, 1] += 1
    moved = (student(changed, condition) - output).abs().amax(dim=(0, 2, 3, 4))
    assert moved[0] == 0
    assert moved[1] > 1e-2
    assert moved[2] > 1e-4


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(name: str) -> None:
    student, history = student_of(name), inputs()
    both = tiny_condition(name)
    together = student(history, both)
    for row in range(2):
        length = int(both["mask"][row].sum())
        alone = Condition(
            {k: (v[row : row + 1, :length] if k in ("tokens", "mask") else v[row : row + 1]) for k, v in both.items()}
        )
        assert relative(student(history[row : row + 1], alone), together[row : row + 1]) < 2e-5
    other = Condition({**both, "tokens": both["tokens"].roll(1, dims=2)})
    assert relative(student(history, other), together) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_other_sizes_and_wrong_ones(name: str) -> None:
    student, condition = student_of(name), tiny_condition(name)
    wide = inputs(3, 4, 12)
    with torch.no_grad():
        parallel = student(wide, condition)
    assert parallel.shape == wide.shape
    assert relative(rolled_out(student, wide, condition), parallel) < 2e-5
    with pytest.raises(InputError, match="multiples of 2"):
        student(inputs(3, 4, 7), condition)


@pytest.mark.parametrize("name", NAMES)
def test_saved_student_is_read_back(name: str, tmp_path: Path) -> None:
    student, history, condition = student_of(name, heads="per_step"), inputs(), tiny_condition(name)
    student.conditions = None
    student.save_pretrained(tmp_path / "student")
    again = Student.from_pretrained(tmp_path / "student")
    assert again.config == student.config
    with torch.no_grad():
        assert torch.equal(again(history, condition), student(history, condition))


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    from pyard.models.history import ConcatenatingCache
    from pyard.training.regression import checkpoint_activations

    condition, history = tiny_condition(name), inputs()
    for through_cache in (False, True):
        plain = student_of(name, heads="per_step", history_bias=0.0)
        recomputed = copy.deepcopy(plain)
        checkpoint_activations(recomputed)
        gradients = []
        for student in (plain, recomputed):
            if through_cache:
                output = torch.stack(list(student.rollout(history[:, 0], condition, ConcatenatingCache())))
            else:
                output = student(history, condition)
            output.square().mean().backward()
            gradients.append({key: p.grad for key, p in student.named_parameters() if p.grad is not None})
        assert len(gradients[0]) == len(gradients[1]) > 20
        assert all(torch.allclose(gradients[1][key], grad, rtol=1e-4, atol=1e-7) for key, grad in gradients[0].items())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_and_conditioning(name: str) -> None:
    network, condition = tiny_network(name), tiny_condition(name)
    x, times = inputs(1)[:, 0], torch.tensor([0.9, 0.3])
    blocks = range(network.config.depth)
    features = network.trunk.features(x, times, condition, network.head, blocks)
    tokens = network.trunk.tokens_per_step()
    assert [f.shape for f in features] == [(2, tokens, network.trunk.hidden_size)] * len(blocks)
    vector = network.trunk.conditioning(times, condition)
    assert vector.shape == (2, network.trunk.conditioning_size(condition))
    assert not torch.allclose(vector, network.trunk.conditioning(times.flip(0), condition))
    last = network.trunk.last_linear(network.head)
    seen: list[torch.Tensor] = []
    handle = last.register_forward_hook(lambda module, args, out: seen.append(out))
    output = network(x, times, condition)
    handle.remove()
    assert relative(network.trunk.unembed(seen[0], (4, 8, 8)), output) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_a_gradient_are_known(name: str) -> None:
    """Data-parallel training waits for the gradients of all others."""
    student = student_of(name, history_bias=-1.0)
    student(inputs(), tiny_condition(name)).square().mean().backward()
    without = {part for part, parameter in student.named_parameters() if parameter.grad is None}
    assert without == {f"trunk.{part}" for part in student.trunk.unread_parameters()}


@pytest.fixture
def _native_attention() -> Iterator[None]:
    """`set_attention_backend` sets the default of all later models, too."""
    yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)


def skip_later_blocks(transformer: Any) -> None:
    transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))


def broadcast_attentions(transformer: Any) -> None:
    skips = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1000),
        current_timestep_callback=lambda: 500,
    )
    transformer.enable_cache(skips)


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda transformer: transformer.set_attention_backend("flex"), "called scaled_dot_product_attention 0 times"),
        (skip_later_blocks, "of the 2 attentions with a history have run.*disable_cache"),
        (broadcast_attentions, "of the 2 attentions with a history have run.*disable_cache"),
    ],
)
@pytest.mark.usefixtures("_native_attention")
def test_what_bypasses_the_history_is_refused(name: str, change: Any, message: str) -> None:
    student = student_of(name)
    condition, noise = tiny_condition(name), inputs()[:, 0]
    change(student.trunk.transformer)
    with torch.no_grad(), pytest.raises(InputError, match=message), student.trunk.transformer.cache_context("cond"):
        list(student.rollout(noise, condition))
