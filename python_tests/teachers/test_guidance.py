"""Guidance of the families against their own pipelines' loops, on small transformers of random weights."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from factories import randomise
from golden import relative_error

from pyard.conditions import ClassConditions, Condition
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.scheduler_times import Visits, visited
from pyard.errors import InputError
from pyard.teachers.guidance import combine, endpoints, scale_at, truncation_interval

# Two prompts, and the negative one in the row for "no class".
PROMPTS = ClassConditions(2)
NUMBERS = torch.tensor([1, 0])
STEPS = 6


class Teacher:
    """A transformer as a teacher whose numbers are prompts."""

    schedule = NoiseSchedule(kind="flow", prediction="velocity")
    conditions = PROMPTS
    fingerprint = "a transformer"
    device = torch.device("cpu")

    def __init__(self, transformer: Any, tokens: torch.Tensor, guidance: str, **settings: Any):
        self.transformer, self.tokens, self.guidance = transformer, tokens, guidance  # tokens: [3, n, D]
        self.sample_shape = (4, 8, 12)
        for name, value in settings.items():
            setattr(self, name, value)


class QwenImage(Teacher):
    def predict(self, x: torch.Tensor, time: float, condition: Condition) -> torch.Tensor:
        batch, channels, height, width = x.shape
        packed = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        output = self.transformer(
            packed.reshape(batch, height * width // 4, 4 * channels),
            timestep=torch.full((batch,), time),
            encoder_hidden_states=self.tokens[condition["label"]],
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
        ).sample
        output = output.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return output.reshape(x.shape)


class ZImage(Teacher):
    def predict(self, x: torch.Tensor, time: float, condition: Condition) -> torch.Tensor:
        tokens = list(self.tokens[condition["label"]])
        times = torch.full((len(x),), 1 - time)
        output = self.transformer(list(x[:, :, None]), times, tokens, return_dict=False)[0]
        return -torch.stack(output)[:, :, 0]


def qwen_image() -> tuple[Any, torch.Tensor]:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    randomise(transformer, 4, std=0.3)
    return transformer, torch.randn(3, 5, 16, generator=torch.manual_seed(1))


def z_image() -> tuple[Any, torch.Tensor]:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    ).eval()  # fmt: skip
    randomise(transformer, 4, std=0.3)
    return transformer, torch.randn(3, 5, 16, generator=torch.manual_seed(1))


def drawn(pipeline: Any, **settings: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipeline(
        num_inference_steps=STEPS, height=64, width=96, output_type="latent", **settings
    ).images  # fmt: skip
    return images


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
@torch.inference_mode()
def test_qwen_images_guidance_keeps_each_tokens_length(cfg_scale):
    transformer, tokens = qwen_image()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    pipeline = diffusers.QwenImagePipeline(scheduler, None, None, None, transformer)
    noise = torch.randn(2, 4, 8, 12)
    theirs = drawn(
        pipeline,
        prompt_embeds=tokens[NUMBERS],
        negative_prompt_embeds=tokens[[2, 2]],
        true_cfg_scale=cfg_scale,
        latents=pipeline._pack_latents(noise, 2, 4, 8, 12),
    )
    theirs = pipeline._unpack_latents(theirs, 64, 96, 8)[:, :, 0]
    # mu of 24 tokens: Flux's line through 0.5 at 256 and 1.15 at 4096.
    visits = visited(scheduler, STEPS, sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=0.5 + (24 - 256) * 0.65 / 3840)
    ours = endpoints(QwenImage(transformer, tokens, "norm"), noise, NUMBERS, visits, cfg_scale=cfg_scale)
    assert relative_error(ours, theirs) < 1e-5
    plain = endpoints(QwenImage(transformer, tokens, "plain"), noise, NUMBERS, visits, cfg_scale=cfg_scale)
    assert (relative_error(plain, theirs) < 1e-5) is (cfg_scale == 1)


@pytest.mark.parametrize(("guidance_scale", "truncation", "normalization"), [
    (0.0, 1.0, False), (5.0, 1.0, False), (5.0, None, False), (5.0, 0.6, False), (5.0, 0.5, False), (5.0, 0.0, False),
    (5.0, 1.0, True), (5.0, 0.6, 1.3),
])  # fmt: skip
@torch.inference_mode()
def test_z_images_guidance_is_truncated_and_normalised(guidance_scale, truncation, normalization):
    transformer, tokens = z_image()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = diffusers.ZImagePipeline(scheduler, None, None, None, transformer)
    noise = torch.randn(2, 4, 8, 12)
    theirs = drawn(
        pipeline,
        prompt_embeds=list(tokens[NUMBERS]),
        negative_prompt_embeds=list(tokens[[2, 2]]),
        guidance_scale=guidance_scale,
        cfg_truncation=truncation,
        cfg_normalization=normalization,
        latents=noise,
    )
    visits = visited(scheduler, STEPS, sigmas=torch.linspace(1, 1 / STEPS, STEPS).tolist())
    teacher = ZImage(transformer, tokens, "z_image", cfg_normalization=float(normalization))

    def ours(interval: Any) -> torch.Tensor:
        return endpoints(teacher, noise, NUMBERS, visits, cfg_scale=guidance_scale + 1, cfg_interval=interval)

    interval = truncation_interval(truncation, visits)
    assert relative_error(ours(interval), theirs) < 1e-5
    assert (relative_error(ours(None), theirs) < 1e-5) is (guidance_scale == 0 or truncation in (None, 1.0))


@pytest.mark.parametrize("truncation", [0.0, 0.2, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5, None])
@pytest.mark.parametrize("n", [4, 5, 8, 10, 20])
def test_truncation_guides_the_steps_that_the_pipeline_guides(truncation, n):
    scheduler = FlowMatchEulerDiscreteScheduler()
    visits = visited(scheduler, n, sigmas=np.linspace(1, 1 / n, n))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
    # As the pipeline computes it; on these grids a float32 time is often a hair beside the bound.
    times = ((1000 - scheduler.timesteps.float()) / 1000).tolist()
    guided = [not (truncation is not None and truncation <= 1 and time > truncation) for time in times]
    interval = truncation_interval(truncation, visits)
    assert [scale_at(time, 5.0, interval) == 5.0 for time in visits.embed_times] == guided


def test_nothing_is_guided_where_every_time_is_too_late():
    visits = Visits((0.6, 0.3, 0.0), (0.6, 0.3))
    interval = truncation_interval(0.2, visits)
    assert [scale_at(time, 5.0, interval) for time in visits.embed_times] == [1.0, 1.0]
    with pytest.raises(InputError, match="cfg_truncation is -1; expected 0 to 1"):
        truncation_interval(-1, visits)


def test_the_combinations_are_their_formulas():
    c, u = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    plain = u + 3 * (c - u)
    assert torch.equal(combine(c, u, 3.0), plain)
    assert torch.equal(combine(c, u, 3.0, "z_image"), plain)
    normed = combine(c, u, 3.0, "norm")
    token = (slice(1, 2), slice(None), slice(2, 4), slice(4, 6))  # the third of the second row
    torch.testing.assert_close(normed[token], plain[token] * (c[token].norm() / plain[token].norm()))
    torch.testing.assert_close(normed[token].norm(), c[token].norm())
    # Each sample by itself, and only those that are too long.
    both = combine(torch.cat([c, c]), torch.cat([u, c]), 3.0, "z_image", 1.0)
    for guided, conditional in zip(both[:2], c, strict=True):
        torch.testing.assert_close(guided.norm(), conditional.norm())
    torch.testing.assert_close(both[2:], c)


@pytest.mark.parametrize(("shape", "kind", "settings", "message"), [
    ((2, 3, 4, 4), "rescaled", {}, "guidance is 'rescaled'; expected one of"),
    ((2, 3, 4, 4), "plain", {"cfg_normalization": 1.0}, "only guidance 'z_image' uses it, not 'plain'"),
    ((2, 3, 5, 4), "norm", {}, r"tokens of 2 x 2 latents; found samples \[C, h, w\] of \(3, 5, 4\)"),
    ((2, 3), "norm", {}, r"found samples \[C, h, w\] of \(3,\)"),
])  # fmt: skip
def test_combinations_that_do_not_fit_are_refused(shape, kind, settings, message):
    with pytest.raises(InputError, match=message):
        combine(torch.randn(shape), torch.randn(shape), 2.0, kind, **settings)
