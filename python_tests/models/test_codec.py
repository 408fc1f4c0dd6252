"""Latents become the images that diffusers' own pipelines make of them, whatever the autoencoder and the packing."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, Flux2KleinPipeline, FluxPipeline, QwenImagePipeline
from models.autoencoders import MEAN, STD, flux2_vae, of_channels, patched_wan_vae, plain_vae, qwen_vae, wan_vae

from pyard.errors import InputError
from pyard.models.codec import AUTOENCODERS, LatentCodec


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_equal_images(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("shift", [None, 0.0609])
def test_scaling_and_shift_are_those_of_sd3_flux_z_image_and_pixart(shift: float | None) -> None:
    """pipeline_stable_diffusion_3, flux, z_image: latents / scaling_factor + shift_factor; pixart_alpha without the shift."""
    vae, z = plain_vae(shift_factor=shift), latents(9, 2, 4, 6)
    codec = LatentCodec(vae)
    unscaled = z / vae.config.scaling_factor
    unscaled = unscaled if shift is None else unscaled + vae.config.shift_factor
    images = vae.decode(unscaled, return_dict=False)[0]
    assert_equal_images(codec.decode(z, batch_size=4), images)
    assert codec.image_shape((2, 4, 6)) == tuple(images.shape[1:]) == (3, 8, 12)
    encoded = vae.encode(images).latent_dist
    assert_equal_images(codec.encode(images), (encoded.mode() - (shift or 0)) * 0.3)
    mean, std = codec.posterior(images, batch_size=4)
    assert_equal_images(mean, codec.encode(images))
    assert_equal_images(std, encoded.std * 0.3)


@torch.inference_mode()
def test_statistics_beside_a_scaling_are_those_of_stable_diffusion_xl() -> None:
    """pipeline_stable_diffusion_xl: latents * latents_std / scaling_factor + latents_mean, and its img2img reversed."""
    vae, z = plain_vae(latents_mean=MEAN, latents_std=STD), latents(3, 2, 4, 4)
    mean, std = (torch.tensor(values).view(1, 2, 1, 1) for values in (MEAN, STD))
    images = vae.decode(z * std / vae.config.scaling_factor + mean, return_dict=False)[0]
    codec = LatentCodec(vae)
    assert_equal_images(codec.decode(z), images)
    encoded = vae.encode(images).latent_dist
    assert_equal_images(codec.encode(images), (encoded.mode() - mean) * vae.config.scaling_factor / std)
    assert_equal_images(codec.posterior(images)[1], encoded.std * vae.config.scaling_factor / std)


@torch.inference_mode()
@pytest.mark.parametrize("make", [qwen_vae, wan_vae, patched_wan_vae])
def test_videos_of_one_frame_are_those_of_qwen_image_and_wan(make: Any) -> None:
    """pipeline_qwenimage, pipeline_wan: latents / (1 / latents_std) + latents_mean in five dimensions; frame 0 is the image."""
    vae, z = make(), latents(3, 2, 4, 6)
    inverse = 1.0 / of_channels(vae.config.latents_std)
    images = vae.decode(z[:, :, None] / inverse + of_channels(vae.config.latents_mean), return_dict=False)[0][:, :, 0]
    codec = LatentCodec(vae)
    assert_equal_images(codec.decode(z, batch_size=2), images)
    assert_equal_images(codec.decode(z[:, :, None]), images)
    assert codec.image_shape((2, 4, 6)) == codec.image_shape((2, 1, 4, 6)) == tuple(images.shape[1:])
    encoded = vae.encode(images[:, :, None]).latent_dist
    expected = (encoded.mode() - of_channels(MEAN)) * inverse
    assert_equal_images(codec.encode(images), expected[:, :, 0])
    assert_equal_images(codec.encode(images, sample_shape=(2, 1, 4, 6)), expected)
    assert_equal_images(codec.posterior(images)[1], (encoded.std * inverse)[:, :, 0])


@torch.inference_mode()
def test_packed_tokens_are_those_of_flux(tmp_path: Path) -> None:
    vae, z = plain_vae(shift_factor=0.1), latents(3, 2, 4, 6)
    codec = LatentCodec(vae, grid=(2, 3))
    tokens = FluxPipeline._pack_latents(z, 3, 2, 4, 6)  # [3, 6, 8]
    unpacked = FluxPipeline._unpack_latents(tokens, height=8, width=12, vae_scale_factor=2)
    images = vae.decode(unpacked / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    channels_first = tokens.transpose(1, 2).unflatten(2, (2, 3))  # [3, 8, 2, 3]
    for samples in (tokens, channels_first):
        shape = tuple(samples.shape[1:])
        assert_equal_images(codec.decode(samples), images)
        assert codec.image_shape(shape) == (3, 8, 12)
        again, _ = codec.posterior(images, sample_shape=shape)
        assert_equal_images(again, codec.encode(images, sample_shape=shape))
        assert again.shape == samples.shape
    expected = FluxPipeline._pack_latents(codec.encode(images).clone(), 3, 2, 4, 6)
    assert_equal_images(codec.encode(images, sample_shape=(6, 8)), expected)
    # Each token its own posterior: a wrong order of the deviations would pass a comparison of means.
    std = codec.posterior(images)[1].clone()
    assert_equal_images(codec.posterior(images, sample_shape=(6, 8))[1], FluxPipeline._pack_latents(std, 3, 2, 4, 6))

    codec.save(tmp_path)
    read = LatentCodec.beside(tmp_path)
    assert read is not None
    assert read.grid == (2, 3)
    assert_equal_images(read.decode(tokens), images)
    assert LatentCodec(AutoencoderKL.from_pretrained(tmp_path / "vae")).grid == (2, 3)  # a pipeline's component


@torch.inference_mode()
def test_statistics_of_packed_latents_are_those_of_flux2(tmp_path: Path) -> None:
    """pipeline_flux2_klein: packed latents times the batch norm's deviation plus its mean, unpacked; its _encode_vae_image."""
    vae, z = flux2_vae(), latents(3, 2, 4, 6)
    pipe = Flux2KleinPipeline(scheduler=None, vae=vae, text_encoder=None, tokenizer=None, transformer=None)
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
    unpacked = pipe._unpatchify_latents(pipe._patchify_latents(z) * std + mean)
    images = vae.decode(unpacked, return_dict=False)[0]
    codec = LatentCodec(vae)
    assert codec.image_shape((2, 4, 6)) == tuple(images.shape[1:]) == (3, 8, 12)
    assert_equal_images(codec.decode(z), images)
    assert_equal_images(codec.decode(pipe._patchify_latents(z)), images)  # samples may be packed as well
    encoded = pipe._encode_vae_image(images, None)
    assert_equal_images(codec.encode(images), pipe._unpatchify_latents(encoded))
    spread = pipe._unpatchify_latents(pipe._patchify_latents(vae.encode(images).latent_dist.std) / std)
    assert_equal_images(codec.posterior(images)[1], spread)
    vae.save_pretrained(tmp_path / "vae")
    assert_equal_images(LatentCodec(tmp_path / "vae").decode(z), images)
    before = codec.fingerprint()
    vae.bn.running_mean[3] += 0.1
    assert LatentCodec(vae).fingerprint() != before


@torch.inference_mode()
def test_packed_tokens_are_those_of_qwen_image() -> None:
    vae, z = qwen_vae(), latents(2, 2, 4, 4)
    tokens = QwenImagePipeline._pack_latents(z, 2, 2, 4, 4)
    unpacked = QwenImagePipeline._unpack_latents(tokens, height=8, width=8, vae_scale_factor=2)
    mean, std = (of_channels(values) for values in (MEAN, STD))
    expected = vae.decode(unpacked / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
    assert_equal_images(LatentCodec(vae).decode(tokens), expected)  # four tokens are a square: no grid is needed


@torch.inference_mode()
@pytest.mark.parametrize("make", [plain_vae, qwen_vae, wan_vae])
def test_a_folder_is_read_as_the_class_that_it_names(make: Any, tmp_path: Path) -> None:
    vae, z = make(), latents(1, 2, 4, 4)
    LatentCodec(vae).save(tmp_path / "first")
    once = LatentCodec.beside(tmp_path / "nothing", tmp_path / "first")
    assert once is not None
    assert_equal_images(once.decode(z), LatentCodec(vae).decode(z))
    assert type(once.vae) is type(vae)
    assert not any(parameter.requires_grad for parameter in once.vae.parameters())
    assert once.fingerprint() == LatentCodec(vae).fingerprint()
    (tmp_path / "second").mkdir()
    LatentCodec.beside(tmp_path / "first").save(tmp_path / "second")  # type: ignore[union-attr]  # without reading it
    again = LatentCodec(tmp_path / "second" / "vae")
    assert_equal_images(again.decode(z), once.decode(z))
    assert copy.deepcopy(again) is again
    assert LatentCodec.beside(tmp_path) is None


def test_fingerprints_tell_weights_and_scalings_apart() -> None:
    vaes = [
        plain_vae(),
        plain_vae(scaling_factor=0.31),
        plain_vae(shift_factor=0.1),
        plain_vae(latents_mean=MEAN, latents_std=STD),
    ]
    other = plain_vae()
    with torch.no_grad():
        other.decoder.conv_in.bias += 1
    digests = [LatentCodec(vae).fingerprint() for vae in (*vaes, other)]
    assert all(a != b for a, b in itertools.combinations(digests, 2))


def test_unknown_classes_are_refused_by_name(tmp_path: Path) -> None:
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,), decoder_block_out_channels=(8,), num_encoder_blocks=(1,),
                           num_decoder_blocks=(1,), latent_channels=2)  # fmt: skip
    known = "expected one of AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan"
    assert known.removeprefix("expected one of ").split(", ") == list(AUTOENCODERS)
    codec = LatentCodec(tiny)
    for _ in range(2):
        with pytest.raises(InputError, match=f"the VAE is a AutoencoderTiny; {known}"):
            codec.decode(latents(1, 2, 4, 4))
    tiny.save_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match=f"the VAE is a AutoencoderTiny; {known}"):
        LatentCodec(tmp_path / "vae").check((2, 4, 4))


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": "no"})])
def test_damaged_folders_are_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no config\.json"):
        LatentCodec(tmp_path / "nowhere").check((2, 4, 4))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=str(tmp_path)) as refused:
        LatentCodec(tmp_path).check((2, 4, 4))
    assert "\n" not in str(refused.value)


def test_weights_that_are_missing_or_cut_off_are_one_line(tmp_path: Path) -> None:
    plain_vae().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for _ in range(2):
        with pytest.raises(InputError, match=r"cannot read this AutoencoderKL|cannot be read") as refused:
            LatentCodec(tmp_path).check((2, 4, 4))
        assert "\n" not in str(refused.value)
        weights.unlink(missing_ok=True)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 2, 4, 4), (4, 2), (2, 4), (5, 8)])
def test_shapes_that_hold_no_latents_are_refused(shape: tuple[int, ...]) -> None:
    codec = LatentCodec(plain_vae())
    with pytest.raises(InputError, match=r"latents of 2 channels|5 packed tokens do not form a square"):
        codec.check(shape)
    with pytest.raises(InputError, match=r"latents of 2 channels|5 packed tokens do not form a square"):
        codec.decode(torch.zeros(1, *shape))


def test_sizes_that_do_not_fit_are_refused() -> None:
    codec = LatentCodec(plain_vae(), grid=(2, 3))
    with pytest.raises(InputError, match="4 packed tokens; this codec's grid is 2 x 3"):
        codec.check((4, 8))
    with pytest.raises(InputError, match=r"these images have latents of 4 x 4; samples of shape .* hold 4 x 6"):
        codec.encode(torch.zeros(1, 3, 8, 8), sample_shape=(6, 8))
    with pytest.raises(InputError, match="expected an even height and width"):
        codec.encode(torch.zeros(1, 3, 6, 6), sample_shape=(8, 2, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": MEAN}, "latents_std has none; expected one for each of 2 channels"),
        ({"latents_mean": MEAN, "latents_std": (1.0, 2.0, 3.0)}, "latents_std has 3 values"),
        ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1}, "both latents_mean and a shift_factor"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LatentCodec(plain_vae(**changes)).check((2, 4, 4))
