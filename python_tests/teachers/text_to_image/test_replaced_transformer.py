"""A transformer in place of a pipeline's own: its settings count, as they do for the stock pipeline that is given it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import randomise, tiny_pipeline
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

import pyard
from pyard.errors import InputError
from pyard.teachers import load_teacher

PROMPTS = ["a red circle", "two small blue squares above a cross"]


def saved_transformer(kind: Any, folder: Path, place: Path, **changes: Any) -> Path:
    """A random transformer with the settings of the one in a pipeline's folder, but for the changes."""
    config = {**kind.load_config(folder / "transformer"), **changes}
    randomise(kind.from_config(config), 9).save_pretrained(place)
    return place


def endpoints(teacher: Any, out: Path, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise and the ends of two trajectories."""
    store = pyard.generate_trajectories(
        teacher, out, 2, prompts=PROMPTS, num_steps=4, teacher_steps=4, keep="state", progress=False, **settings
    )
    batch = pyard.TrajectoryReader(store, 2, target="state").gather([0, 1])
    return batch.history[:, 0], batch.target[:, -1]


@pytest.mark.parametrize("left", ["nothing", "an index that names none"])
def test_of_a_folder_without_a_transformer(left: str, tmp_path: Path) -> None:
    """PixArt-Sigma's own instructions put the transformer of one repository into the pipeline of another, which has none."""
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    folder = tiny_pipeline("pixart_sigma", tmp_path / "pipeline")
    place = saved_transformer(PixArtTransformer2DModel, folder, tmp_path / "transformer", sample_size=16)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(InputError, match="transformer"):
        load_teacher(folder)
    if left != "nothing":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "transformer": [None, None]}))
    teacher: Any = load_teacher(folder, transformer=place)
    pipe = PixArtSigmaPipeline.from_pretrained(folder, transformer=PixArtTransformer2DModel.from_pretrained(place))
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor  # what it draws by default
    assert teacher.shape_of(None, None) == (4, 16, 16)
    assert side == 64
    noise, ends = endpoints(teacher, tmp_path / "store")
    drawn = pipe(
        PROMPTS, num_inference_steps=4, height=side, width=side, latents=noise, output_type="latent", clean_caption=False,
        use_resolution_binning=False,
    ).images  # fmt: skip
    # Embeddings in the store are bfloat16.
    assert (ends - drawn).abs().max() < 0.05 * drawn.abs().max()


@pytest.mark.parametrize("embeds", [True, False])
def test_with_and_without_embedded_guidance(embeds: bool, tmp_path: Path) -> None:
    """FLUX.1-dev's transformer in schnell's pipeline, and the other way."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    folder = tiny_pipeline("flux", tmp_path / "pipeline")  # which embeds it
    if embeds:
        shutil.move(
            saved_transformer(FluxTransformer2DModel, folder, tmp_path / "without", guidance_embeds=False), tmp_path / "own"
        )
        shutil.rmtree(folder / "transformer")
        shutil.move(tmp_path / "own", folder / "transformer")
    place = saved_transformer(FluxTransformer2DModel, folder, tmp_path / "transformer", guidance_embeds=embeds)
    teacher: Any = load_teacher(folder, transformer=place)
    assert teacher.constants(None) == ({"guidance": 3.5} if embeds else {})
    pipe = FluxPipeline.from_pretrained(folder, transformer=FluxTransformer2DModel.from_pretrained(place))
    more = {"embedded_guidance": 2.0} if embeds else {}
    noise, ends = endpoints(teacher, tmp_path / "store", height=32, width=32, **more)
    drawn = pipe(
        PROMPTS, num_inference_steps=4, height=32, width=32, output_type="latent", guidance_scale=2.0,
        latents=pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2),
    ).images  # fmt: skip
    drawn = pixel_shuffle(drawn.transpose(1, 2).unflatten(2, (4, 4)), 2)
    assert (ends - drawn).abs().max() < 0.05 * drawn.abs().max()
    if not embeds:
        with pytest.raises(InputError, match=r"embedded_guidance is 2, but the transformer .* takes none"):
            endpoints(teacher, tmp_path / "other", height=32, width=32, embedded_guidance=2.0)


def test_sd3_without_t5_takes_the_width_of_the_transformer_that_is_used(tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    folder = tiny_pipeline("sd3", tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    none = {"tokenizer_3": [None, None], "text_encoder_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps({**index, **none}))
    place = saved_transformer(SD3Transformer2DModel, folder, tmp_path / "transformer", joint_attention_dim=52)
    shutil.rmtree(folder / "transformer")
    teacher: Any = load_teacher(folder, transformer=place)
    (encoded,) = teacher.text_encoder.encode(["a red circle"])
    assert encoded.tensors["tokens"].shape[1] == 52
