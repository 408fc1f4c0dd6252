"""What pyard says of each pipeline class, against the running pipeline: defaults, sizes, scheduler calls, guidance."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_pipeline

from pyard.errors import InputError
from pyard.teachers.text_to_image import PIPELINES, PipelineConfigs, PipelineFamily, pipeline_family

NAMES = (
    "pixart_alpha", "pixart_alpha_1024", "pixart_sigma", "sd3", "aura_flow", "flux", "flux2_klein", "qwen_image", "z_image",
)  # fmt: skip


class _Opened:
    """A tiny pipeline with what pyard says of it."""

    def __init__(self, folder: Path):
        from diffusers import DiffusionPipeline

        self.family = pipeline_family(folder)
        self.configs = PipelineConfigs.read(folder)
        self.pipeline: Any = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
        self.pipeline.set_progress_bar_config(disable=True)

    def draw(self, height: int | None = 32, width: int | None = 32, **more: Any) -> torch.Tensor:
        if self.family.backbone == "pixart":
            more.setdefault("use_resolution_binning", False)
        size = {} if height is None else {"height": height, "width": width}
        generator = torch.Generator().manual_seed(0)
        return self.pipeline(prompt="a red circle", generator=generator, output_type="latent", **size, **more).images


@pytest.fixture(params=NAMES)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> _Opened:
    return _Opened(tiny_pipeline(request.param, tmp_path / request.param))


class _StopError(Exception):
    pass


def _recorded(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, stop: bool = False) -> list[tuple[Any, ...]]:
    """(arguments, keyword arguments, result) of each call of a method."""
    calls: list[tuple[Any, ...]] = []
    method = getattr(owner, name)

    @functools.wraps(method)  # pipelines look at the parameters
    def record(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        calls.append((args, kwargs, result))
        if stop:
            raise _StopError
        return result

    monkeypatch.setattr(owner, name, record)
    return calls


def test_every_family_is_tested(tmp_path: Path) -> None:
    assert {pipeline_family(tiny_pipeline(name, tmp_path / name)).pipeline for name in NAMES} == set(PIPELINES)


def test_defaults_are_the_pipelines_own(opened: _Opened) -> None:
    family, signature = opened.family, inspect.signature(type(opened.pipeline).__call__).parameters
    default = {name: parameter.default for name, parameter in signature.items()}
    guidance = default["true_cfg_scale" if "true_cfg_scale" in default else "guidance_scale"]
    assert family.cfg_scale == guidance + (family.guidance == "z_image")
    assert family.num_steps == default["num_inference_steps"]
    assert family.max_sequence_length == default["max_sequence_length"]
    if family.guidance == "z_image":
        assert family.cfg_normalization == default["cfg_normalization"] == 0
        assert family.cfg_truncation == default["cfg_truncation"]
    if family.backbone == "flux":
        assert family.embedded_guidance(opened.configs) == default["guidance_scale"]
    else:
        assert family.embedded_guidance(opened.configs) is None
    if family.backbone not in ("qwen_image", "flux2"):  # that does not guide without one; this takes none
        assert (default["negative_prompt"] or "") == family.negative_prompt


def test_a_flux_without_embedded_guidance_has_none(tmp_path: Path) -> None:
    opened = _Opened(tiny_pipeline("flux", tmp_path))
    schnell = dataclasses.replace(opened.configs, transformer={**opened.configs.transformer, "guidance_embeds": False})
    assert opened.family.embedded_guidance(schnell) is None


def test_a_guidance_without_a_default_is_asked_for(tmp_path: Path) -> None:
    opened = _Opened(tiny_pipeline("qwen_image", tmp_path))
    told = dataclasses.replace(opened.configs, transformer={**opened.configs.transformer, "guidance_embeds": True})
    with pytest.raises(InputError, match="embedded guidance, which has no default"):
        opened.family.embedded_guidance(told)


@pytest.mark.parametrize("size", [(32, 32), (48, 64), None], ids=str)
def test_sample_shape_is_that_of_the_latents(
    opened: _Opened, size: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _recorded(monkeypatch, opened.pipeline, "prepare_latents", stop=True)
    with pytest.raises(_StopError):
        opened.draw(*(size or (None, None)))
    ((_, _, found),) = calls
    shape = opened.family.sample_shape(opened.configs, *(size or (None, None)))
    found = found[0] if isinstance(found, tuple) else found
    if opened.family.backbone == "flux2":  # packs what it is given into [4C, h/2, w/2]
        assert found.shape == (1, shape[1] * shape[2] // 4, shape[0] * 4)
        assert shape[0] == opened.pipeline.vae.config.latent_channels
    elif opened.family.packs:
        assert found.shape == (1, shape[1] * shape[2] // 4, shape[0] * 4)
        assert (
            shape[0] == opened.pipeline.vae.config[{"flux": "latent_channels", "qwen_image": "z_dim"}[opened.family.backbone]]
        )
        height, width = size or opened.family.default_pixels(opened.configs)
        assert shape[1:] == (height // 4, width // 4)
    else:
        assert found.shape == (1, *shape)


def test_a_size_between_patches_is_treated_as_the_pipeline_does(opened: _Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    if opened.family.sizes == "refused":
        with pytest.raises(InputError, match=r"width: 44 pixels; .* multiples of 8: give 48"):
            opened.family.sample_shape(opened.configs, 32, 44)
        with pytest.raises((ValueError, RuntimeError)):
            opened.draw(32, 44, num_inference_steps=2)
    else:
        shape = opened.family.sample_shape(opened.configs, 32, 44)
        assert shape == (4, 8, 10)
        drawn = opened.draw(32, 44, num_inference_steps=2).shape
        assert drawn == ((1, *shape) if opened.family.backbone == "flux2" else (1, 20, 16))
    with pytest.raises(InputError, match="height: 0 pixels"):
        opened.family.sample_shape(opened.configs, 0, 32)


def test_without_a_vae_samples_are_pixels(opened: _Opened) -> None:
    pixels = dataclasses.replace(opened.configs, vae=None)
    channels = opened.family.sample_shape(opened.configs, 32, 32)[0]
    assert opened.family.sample_shape(pixels, 16, 24) == (channels, 16, 24)
    side = opened.configs.transformer["sample_size"] if opened.family.default_size == "sample_size" else 128
    assert opened.family.default_pixels(pixels) == (side, side)


def test_sd3_refuses_what_its_position_embedding_does_not_reach(tmp_path: Path) -> None:
    opened = _Opened(tiny_pipeline("sd3", tmp_path))
    assert opened.family.sample_shape(opened.configs, 32, 192) == (4, 8, 48)
    with pytest.raises(InputError, match="200 pixels: the transformer's position embedding ends at 192"):
        opened.family.sample_shape(opened.configs, 32, 200)


SCHEDULERS = {
    "pixart": [{}],
    "sd3": [{}, {"use_dynamic_shifting": True, "max_shift": 1.3, "max_image_seq_len": 64}],
    "aura_flow": [{}, {"shift": 3.0}],
    "flux": [{}, {"use_dynamic_shifting": False, "shift": 1.0}],
    "flux2": [{}, {"use_dynamic_shifting": False, "shift": 1.0}],
    "qwen_image": [{}, {"use_dynamic_shifting": False, "shift_terminal": None}],
    "z_image": [{}, {"use_dynamic_shifting": True, "base_shift": 0.3}],
}


@pytest.mark.parametrize(("num_steps", "size"), [(1, (32, 32)), (3, (32, 48)), (7, (64, 32))])
def test_the_scheduler_is_called_as_the_pipeline_calls_it(
    opened: _Opened, num_steps: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = opened.family
    for settings in SCHEDULERS[family.backbone]:
        scheduler = opened.pipeline.scheduler = type(opened.pipeline.scheduler).from_config(
            opened.pipeline.scheduler.config, **settings
        )
        call = family.scheduler_call(scheduler.config, num_steps, family.sample_shape(opened.configs, *size))
        calls = _recorded(monkeypatch, scheduler, "set_timesteps", stop=True)
        with pytest.raises(_StopError):
            opened.draw(*size, num_inference_steps=num_steps)
        ((args, kwargs, _),) = calls
        kwargs.pop("device")
        args = tuple(arg for arg in args if arg is not None)
        if "sigmas" in call:
            assert args[:1] in ((), (num_steps,))
            assert list(kwargs.pop("sigmas")) == call["sigmas"]
        else:
            assert args[0] == num_steps
            assert kwargs.pop("sigmas", None) is None
        assert kwargs.pop("mu", None) == call.get("mu")
        assert not any(value is not None for value in kwargs.values())
        visited = scheduler.timesteps
        fresh = type(scheduler).from_config(scheduler.config)
        fresh.set_timesteps(**call) if "sigmas" in call else fresh.set_timesteps(num_steps, **call)
        # One step of a schedule with a terminal shift is 0 / 0, in the pipeline as well.
        torch.testing.assert_close(fresh.timesteps, visited, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(fresh.sigmas, scheduler.sigmas, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("side", [64, 160])  # the fit is another one above 4300 tokens: 1024 pixels have 4096
def test_flux2s_shift_is_its_pipelines(side: int, tmp_path: Path) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    family = pipeline_family(tiny_pipeline("flux2_klein", tmp_path))
    for steps in (1, 4, 50):
        call = family.scheduler_call({}, steps, (4, 2 * side, 2 * side))
        assert call["mu"] == compute_empirical_mu(side * side, steps)


def test_flux_leaves_sigmas_to_a_scheduler_of_flows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DPMSolverMultistepScheduler

    opened = _Opened(tiny_pipeline("flux", tmp_path))
    opened.pipeline.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True, time_shift_type="exponential"
    )
    calls = _recorded(monkeypatch, opened.pipeline.scheduler, "set_timesteps", stop=True)
    with pytest.raises(_StopError):
        opened.draw(num_inference_steps=3)
    call = opened.family.scheduler_call(opened.pipeline.scheduler.config, 3, (4, 8, 8))
    ((args, kwargs, _),) = calls
    assert args[0] == 3
    assert "sigmas" not in call
    assert call["mu"] == kwargs["mu"]


def test_sd3_has_its_own_largest_shift_where_the_scheduler_names_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DPMSolverMultistepScheduler

    opened = _Opened(tiny_pipeline("sd3", tmp_path))
    opened.pipeline.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True, time_shift_type="exponential"
    )
    calls = _recorded(monkeypatch, opened.pipeline.scheduler, "set_timesteps", stop=True)
    with pytest.raises(_StopError):
        opened.draw(num_inference_steps=3)
    call = opened.family.scheduler_call(opened.pipeline.scheduler.config, 3, (4, 8, 8))
    assert call == {"mu": calls[0][1]["mu"]}


def _combined(
    family: PipelineFamily, guided: torch.Tensor, unguided: torch.Tensor, sigma: float, s: float, truncation: float, most: float
) -> torch.Tensor:
    """The definition in `PipelineFamily`, of predictions [B, C, h, w]."""
    if family.guidance == "z_image" and 1 - sigma > truncation:
        return guided
    combined = unguided + s * (guided - unguided)
    if family.guidance == "norm":
        patches = [x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)) for x in (guided, combined)]
        norms = [x.square().sum(dim=(1, 3, 5), keepdim=True).sqrt() for x in patches]
        return (patches[1] * norms[0] / norms[1]).reshape_as(combined)
    if family.guidance == "z_image" and most:
        norms = [x.flatten(1).norm(dim=1)[:, None, None, None] for x in (guided, combined)]
        return combined * (most * norms[0] / norms[1]).clamp(max=1)
    return combined


@pytest.mark.parametrize(("truncation", "most"), [(1.0, 0.0), (0.3, 1.2)])
def test_guidance_combines_predictions_as_defined(
    opened: _Opened, truncation: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, pipeline = opened.family, opened.pipeline
    outputs: list[torch.Tensor] = []

    def hook(module: Any, args: Any, result: Any) -> None:
        found = result[0]
        outputs.append(torch.stack(found) if isinstance(found, list) else found)

    pipeline.transformer.register_forward_hook(hook)
    taken = _recorded(monkeypatch, pipeline.scheduler, "step")
    more: dict[str, Any] = {} if family.backbone == "flux2" else {"negative_prompt": "a blue square"}
    s = 3.0
    known = inspect.signature(type(pipeline).__call__).parameters
    more["true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"] = s - (family.guidance == "z_image")
    if family.guidance == "z_image":
        more |= {"cfg_truncation": truncation, "cfg_normalization": most}
    opened.draw(48, 32, num_inference_steps=4, **more)
    scheduler = pipeline.scheduler
    guided_steps = 0
    for step, (args, _, _) in enumerate(taken):
        sigma = float(args[1]) / scheduler.config.num_train_timesteps
        if family.packs:
            found, other = outputs.pop(0), outputs.pop(0)
            found, other, expected = (_unpacked(x, 12, 8) for x in (found, other, args[0]))
        else:
            pair, expected = outputs.pop(0), args[0]
            pair = -pair.squeeze(2) if family.guidance == "z_image" else pair
            pair = pair[:, : expected.shape[1]]
            if len(pair) == 1:
                assert torch.equal(pair, expected), step
                assert 1 - sigma > truncation
                continue
            found, other = pair.chunk(2) if family.guidance == "z_image" else pair.chunk(2)[::-1]
        guided_steps += 1
        ours = _combined(family, found, other, sigma, s, truncation, most)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, expected, rtol=1e-2)
    assert guided_steps == 4 or (family.guidance == "z_image" and truncation < 1 and 0 < guided_steps < 4)
    assert not outputs


def _unpacked(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """[B, T, 4C] to [B, C, h, w]."""
    return (
        tokens.unflatten(1, (h // 2, w // 2)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, h, w)
    )


def test_a_pipeline_that_is_distilled_already_is_refused(tmp_path: Path) -> None:
    folder = tiny_pipeline("flux2_klein", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    with pytest.raises(InputError, match=r"is distilled already.*FLUX\.2-klein-base-4B"):
        pipeline_family(folder)


def test_a_pipeline_of_another_class_is_refused_by_name(tmp_path: Path) -> None:
    for name, reason in (
        ("SanaPipeline", ": its attention is linear: without a softmax there are no keys and values"),
        ("FluxFillPipeline", ": it starts from a picture"),
        ("KolorsPipeline", ""),
        (None, ""),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({} if name is None else {"_class_name": name}))
        with pytest.raises(InputError) as caught:
            pipeline_family(tmp_path)
        message = str(caught.value)
        assert f"is a {name}, which pyard cannot use as a teacher{reason}" in message
        assert all(known in message for known in PIPELINES)
        assert "\n" not in message


def test_what_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the folder of a diffusers pipeline; there is no model_index\.json"):
        pipeline_family(tmp_path)
    for text, expected in (("[1]", "expected the index of a diffusers pipeline"), ("{", "not valid JSON")):
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(InputError, match=expected):
            pipeline_family(tmp_path)


def test_a_folder_with_a_part_missing_is_refused(tmp_path: Path) -> None:
    for part in ("transformer", "vae"):
        folder = tiny_pipeline("sd3", tmp_path / part)
        (folder / part / "config.json").unlink()
        with pytest.raises(InputError, match=rf"{part}/config.json: missing"):
            PipelineConfigs.read(folder)
    folder = tiny_pipeline("sd3", tmp_path / "other")
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(InputError, match="the VAE is a AutoencoderTiny; expected one of AutoencoderKL"):
        pipeline_family(folder).sample_shape(PipelineConfigs.read(folder))
    (folder / "transformer" / "config.json").write_text('{"sample_size": 8}')
    with pytest.raises(InputError, match="the transformer's configuration: in_channels is None; expected a whole number"):
        pipeline_family(folder).sample_shape(dataclasses.replace(PipelineConfigs.read(folder), vae=None))
