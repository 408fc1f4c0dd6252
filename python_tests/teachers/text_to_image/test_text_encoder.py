"""Text encoders of pipelines: what they give draws what the text draws, and what changes them changes their fingerprint."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_pipeline
from torch.nn.functional import pad

from pyard.conditions.prompts import Encoded
from pyard.errors import InputError
from pyard.teachers.text_to_image import PipelineTextEncoder, pipeline_family
from pyard.teachers.text_to_image.encoding import chat_texts

NAMES = ("pixart_alpha", "pixart_sigma", "sd3", "aura_flow", "flux", "flux2_klein", "qwen_image", "z_image")
PROMPT, NEGATIVE = "a large red circle above the blue square", "Small"
TEXTS = ["", "a red circle", PROMPT, 'Zigzag, 3 times; "quoted" & ünïcödé {braces} 50%', NEGATIVE]


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_pipeline(request.param, tmp_path / request.param)


def _pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _draw(pipeline: Any, family: Any, **more: Any) -> torch.Tensor:
    if family.backbone == "pixart":
        more["use_resolution_binning"] = False
        more.setdefault("negative_prompt", None)  # the default of "" counts as given beside embeddings
    known = inspect.signature(type(pipeline).__call__).parameters
    more["true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"] = 3.0
    generator = torch.Generator().manual_seed(0)
    return pipeline(num_inference_steps=2, height=32, width=48, generator=generator, output_type="latent", **more).images


def _as_arguments(encoded: Encoded, backbone: str, prefix: str, length: int) -> dict[str, Any]:
    """The pipeline's own arguments for an embedding, padded to a length where it wants a mask."""
    tokens = encoded.tensors["tokens"]
    if backbone == "z_image":
        return {f"{prefix}prompt_embeds": [tokens]}
    if "pooled" in encoded.tensors:
        name = f"{prefix}pooled_prompt_embeds"
        return {f"{prefix}prompt_embeds": tokens[None], name: encoded.tensors["pooled"][None]}
    if backbone == "flux2":
        return {f"{prefix}prompt_embeds": tokens[None]}
    length = len(tokens) if backbone == "aura_flow" else length  # which attends to padding
    padding = (0, 0, 0, length - len(tokens))
    mask = (torch.arange(length) < len(tokens)).long()[None]
    name = f"{prefix}prompt_attention_mask" if backbone in ("pixart", "aura_flow") else f"{prefix}prompt_embeds_mask"
    return {f"{prefix}prompt_embeds": pad(tokens, padding)[None], name: mask}


def test_embeddings_draw_what_the_text_draws(folder: Path) -> None:
    family, pipeline = pipeline_family(folder), _pipeline(folder)
    texts: dict[str, Any] = {"negative_prompt": NEGATIVE}
    if family.backbone == "flux2":  # takes its embedding alone
        texts = {"negative_prompt_embeds": pipeline.encode_prompt(NEGATIVE)[0]}
    expected = _draw(pipeline, family, prompt=PROMPT, **texts)
    positive, negative = PipelineTextEncoder(folder).encode([PROMPT, NEGATIVE])
    length = max(len(one.tensors["tokens"]) for one in (positive, negative)) + 3
    found = _draw(
        pipeline,
        family,
        **_as_arguments(positive, family.backbone, "", length),
        **_as_arguments(negative, family.backbone, "negative_", length),
    )
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    other = _draw(pipeline, family, prompt="a red circle", **texts)
    assert (other - expected).abs().max() > 100 * tolerance


def test_a_batch_gives_what_single_texts_give(folder: Path) -> None:
    encoder = PipelineTextEncoder(folder)
    batch = encoder.encode(TEXTS)
    assert len({one.tensors["tokens"].numpy().tobytes() for one in batch}) == len(TEXTS)
    for text, one in zip(TEXTS, batch, strict=True):
        (alone,) = encoder.encode([text])
        assert not one.cut
        assert one.tensors.keys() == alone.tensors.keys()
        for name, tensor in one.tensors.items():
            assert tensor.device.type == "cpu"
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            torch.testing.assert_close(tensor, alone.tensors[name], rtol=1e-4, atol=1e-5)
    assert encoder.encode([]) == []


def test_padding_stays_where_the_transformer_attends_to_it(folder: Path) -> None:
    family = pipeline_family(folder)
    lengths = [len(one.tensors["tokens"]) for one in PipelineTextEncoder(folder, max_sequence_length=100).encode(TEXTS)]
    if family.backbone == "sd3":
        assert lengths == [77 + 100] * len(TEXTS)
    elif family.backbone in ("flux", "flux2", "aura_flow"):
        assert lengths == [100] * len(TEXTS)
    else:
        assert len(set(lengths)) == len(TEXTS)
        assert max(lengths) < 100


def test_a_text_beyond_the_limit_is_cut(folder: Path) -> None:
    pipeline = _pipeline(folder)
    backbone = pipeline_family(folder).backbone
    tokenizer = (
        pipeline.tokenizer_3 if backbone == "sd3" else pipeline.tokenizer_2 if backbone == "flux" else pipeline.tokenizer
    )
    around = {
        "qwen_image": "<|im_end|>\n<|im_start|>assistant\n",
        "z_image": "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n",
    }
    special = len(tokenizer(around.get(backbone, "")).input_ids)
    word = len(tokenizer("red red").input_ids) - len(tokenizer("red").input_ids)
    assert word == 1
    limit = special + 3
    if backbone == "flux2":
        limit = len(tokenizer(chat_texts(tokenizer, ["red red red"], thinking=False)[0]).input_ids)
    fits, longer = PipelineTextEncoder(folder, max_sequence_length=limit).encode(["red red red", "red red red blue"])
    if backbone in ("qwen_image", "z_image"):  # the first word has no space in front
        (one,) = PipelineTextEncoder(folder, max_sequence_length=limit).encode(["red"])
        assert len(one.tensors["tokens"]) == special + len(tokenizer("red").input_ids)
        limit = len(one.tensors["tokens"]) + 2
        fits, longer = PipelineTextEncoder(folder, max_sequence_length=limit).encode(["red red red", "red red red blue"])
    assert (fits.cut, longer.cut) == (False, True)
    clip = 77 if backbone == "sd3" else 0
    assert len(fits.tensors["tokens"]) == len(longer.tensors["tokens"]) == limit + clip


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_text_that_clip_cuts_is_cut(name: str, tmp_path: Path) -> None:
    encoder = PipelineTextEncoder(tiny_pipeline(name, tmp_path))
    assert [one.cut for one in encoder.encode([" ".join(["red"] * n) for n in (75, 76)])] == [False, True]


def test_the_caller_hears_nothing_of_single_cut_texts(
    folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers.utils import logging as diffusers_logging

    before = diffusers_logging.get_verbosity()
    (one,) = PipelineTextEncoder(folder).encode(["red blue " * 600])
    assert one.cut
    assert diffusers_logging.get_verbosity() == before
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert not caplog.records


def test_dtype_and_weights_in_half_precision(folder: Path) -> None:
    exact = PipelineTextEncoder(folder).encode([PROMPT])[0].tensors
    half = PipelineTextEncoder(folder, dtype=torch.bfloat16).encode([PROMPT])[0].tensors
    for name, tensor in half.items():
        assert exact[name].dtype == torch.float32
        assert tensor.dtype == torch.bfloat16
        assert tensor.shape == exact[name].shape
        assert not torch.equal(tensor.float(), exact[name])
        assert (tensor.float() - exact[name]).norm() < 0.1 * exact[name].norm()


def test_only_the_text_encoders_are_read_and_free_drops_them(folder: Path) -> None:
    encoder = PipelineTextEncoder(folder)
    for part in ("vae", "transformer", "scheduler"):
        shutil.rmtree(folder / part)
    assert encoder._pipeline is None
    before = encoder.encode([PROMPT])
    assert encoder._pipeline is not None
    encoder.free()
    assert encoder._pipeline is None
    torch.testing.assert_close(encoder.encode([PROMPT])[0].tensors, before[0].tensors, rtol=0, atol=0)


def test_sd3_without_t5_pads_as_the_pipeline_does(tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    whole = StableDiffusion3Pipeline.from_pretrained(
        str(tiny_pipeline("sd3", tmp_path / "whole")), text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    folder = tmp_path / "without"
    whole.save_pretrained(str(folder))
    assert not (folder / "text_encoder_3").exists()
    whole.set_progress_bar_config(disable=True)
    expected = _draw(whole, pipeline_family(folder), prompt=PROMPT, negative_prompt=NEGATIVE)
    encoder = PipelineTextEncoder(folder)
    positive, negative = encoder.encode([PROMPT, NEGATIVE])
    assert positive.tensors["tokens"].shape == (77 + 256, 44)
    arguments = {**_as_arguments(positive, "sd3", "", 0), **_as_arguments(negative, "sd3", "negative_", 0)}
    torch.testing.assert_close(_draw(whole, encoder.family, **arguments), expected, rtol=1e-5, atol=1e-5)


def _variant_alone(folder: Path, part: str, variant: str, shard_size: str) -> None:
    """Rewrite an encoder's weights as one variant, in half precision, with none without a variant beside it."""
    import transformers

    kind = json.loads((folder / "model_index.json").read_text())[part][1]
    encoder = getattr(transformers, kind).from_pretrained(str(folder / part), dtype=torch.float16)
    (folder / part / "model.safetensors").unlink()
    encoder.save_pretrained(str(folder / part), variant=variant, max_shard_size=shard_size)


def test_sharded_weights_and_variants(folder: Path) -> None:
    exact = PipelineTextEncoder(folder)
    expected, one_file = exact.encode([PROMPT])[0].tensors, exact.fingerprint
    # The half that a variant rounds away shows which weights were read.
    parts = [name for name in exact.family.encoders if name.startswith("text_encoder")]
    for part in parts:
        shutil.copytree(folder / part, folder / f"{part}_kept")
        _variant_alone(folder, part, "fp16", "6KB")
        assert list((folder / part).glob("model.fp16-*.safetensors"))
        (folder / part / "model.safetensors.index.fp16.json").stat()
    alone = PipelineTextEncoder(folder)  # there are no others
    named = PipelineTextEncoder(folder, variant="fp16")
    rounded = named.encode([PROMPT])[0].tensors
    for name, tensor in rounded.items():
        assert not torch.equal(tensor, expected[name])
        torch.testing.assert_close(tensor, expected[name], rtol=0.05, atol=0.02)
        assert torch.equal(tensor, alone.encode([PROMPT])[0].tensors[name])
    assert alone.fingerprint == named.fingerprint != one_file
    for part in parts:
        shutil.copy(folder / f"{part}_kept" / "model.safetensors", folder / part / "model.safetensors")
    both = PipelineTextEncoder(folder)
    assert torch.equal(both.encode([PROMPT])[0].tensors["tokens"], expected["tokens"])
    assert torch.equal(PipelineTextEncoder(folder, variant="fp16").encode([PROMPT])[0].tensors["tokens"], rounded["tokens"])
    with pytest.raises(InputError, match="no file of the variant 'fp61'; found fp16, weights without a variant"):
        PipelineTextEncoder(folder, variant="fp61")


def test_a_component_without_the_variant_is_read_as_it_is(tmp_path: Path) -> None:
    folder = tiny_pipeline("flux", tmp_path)
    _variant_alone(folder, "text_encoder_2", "fp16", "1GB")
    PipelineTextEncoder(folder, variant="fp16").encode([PROMPT])
    (folder / "text_encoder_2" / "model.fp16.safetensors").unlink()
    with pytest.raises(InputError, match=r"text_encoder_2: expected the weights of a text encoder, model\.safetensors"):
        PipelineTextEncoder(folder)


def test_the_fingerprint_follows_what_decides_embeddings(folder: Path, tmp_path: Path) -> None:
    first = PipelineTextEncoder(folder).fingerprint
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    assert PipelineTextEncoder(copy).fingerprint == first
    limit = PipelineTextEncoder(folder).max_sequence_length
    assert PipelineTextEncoder(folder, max_sequence_length=limit).fingerprint == first
    changed = [
        PipelineTextEncoder(folder, max_sequence_length=limit - 1).fingerprint,
        PipelineTextEncoder(folder, dtype=torch.bfloat16).fingerprint,
    ]
    for name in PipelineTextEncoder(folder).family.encoders:
        files = ["tokenizer.json"] if name.startswith("tokenizer") else ["config.json", "model.safetensors"]
        for file in files:
            place = copy / name / file
            content = place.read_bytes()
            place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            changed.append(PipelineTextEncoder(copy).fingerprint)
            place.write_bytes(content)
    assert PipelineTextEncoder(copy).fingerprint == first
    assert len({first, *changed}) == 1 + len(changed)
    # What does not encode text does not count.
    (copy / "scheduler" / "scheduler_config.json").write_text("{}")
    assert PipelineTextEncoder(copy).fingerprint == first


def test_the_fingerprint_follows_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import QwenImagePipeline

    folder = tiny_pipeline("qwen_image", tmp_path / "qwen")
    first = PipelineTextEncoder(folder).fingerprint
    built = QwenImagePipeline.__init__

    def changed(self: Any, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any) -> None:
        built(self, scheduler, vae, text_encoder, tokenizer, transformer)
        self.prompt_template_encode = self.prompt_template_encode.replace("Describe", "Show")

    monkeypatch.setattr(QwenImagePipeline, "__init__", changed)
    assert PipelineTextEncoder(folder).fingerprint != first
    folder = tiny_pipeline("pixart_alpha", tmp_path / "pixart")
    plain = PipelineTextEncoder(folder).fingerprint
    # Whether captions are cleaned depends on what is installed.
    monkeypatch.setattr("diffusers.utils.is_bs4_available", lambda: True)
    monkeypatch.setattr("diffusers.utils.is_ftfy_available", lambda: True)
    assert PipelineTextEncoder(folder).fingerprint != plain


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder"])
def test_a_missing_component_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=rf"the pipeline has no {part} to encode prompts with: .*/{part} is missing or empty"):
        PipelineTextEncoder(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, part: [None, None]}))
    with pytest.raises(InputError, match=rf"has no {part} to encode prompts with: model_index\.json names none"):
        PipelineTextEncoder(folder)
    (folder / "model_index.json").write_text(json.dumps({**index, part: "T5"}))
    with pytest.raises(InputError, match=rf"{part} is 'T5'; expected the names of a library and a class"):
        PipelineTextEncoder(folder)


def test_components_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    whole = tiny_pipeline("sd3", tmp_path / "whole")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    index = json.loads((whole / "model_index.json").read_text())
    for named, expected in (
        (["my_package", "Encoder"], r"text_encoder is a my_package\.Encoder; expected a transformers class"),
        (["transformers", "NoSuchModel"], r"has no class NoSuchModel"),
    ):
        folder = copy(named[1])
        (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": named}))
        with pytest.raises(InputError, match=expected):
            PipelineTextEncoder(folder).encode([PROMPT])
    folder = copy("no configuration")
    (folder / "text_encoder_2" / "config.json").unlink()
    with pytest.raises(InputError, match=r"text_encoder_2: expected a text encoder; there is no config\.json"):
        PipelineTextEncoder(folder)
    for part, file in (("text_encoder_3", "model.safetensors"), ("tokenizer", "tokenizer.json")):
        folder = copy(f"damaged {part}")
        (folder / part / file).write_bytes((folder / part / file).read_bytes()[:100])
        refused = rf"damaged {part}/{part}(: transformers cannot read this|/model\.safetensors cannot be read)"
        with pytest.raises(InputError, match=refused) as caught:
            PipelineTextEncoder(folder).encode([PROMPT])
        assert "\n" not in str(caught.value)
    folder = copy("a shard is missing")
    _variant_alone(folder, "text_encoder_3", "fp16", "6KB")
    next((folder / "text_encoder_3").glob("model.fp16-00002*")).unlink()
    with pytest.raises(InputError, match="missing, though an index of weights names it"):
        _ = PipelineTextEncoder(folder).fingerprint


@pytest.mark.parametrize(("name", "length"), [("sd3", 513), ("flux", 513), ("qwen_image", 1025), ("pixart_alpha", 0)])
def test_a_limit_that_the_pipeline_does_not_take_is_refused(name: str, length: int, tmp_path: Path) -> None:
    folder = tiny_pipeline(name, tmp_path)
    with pytest.raises(InputError, match=f"max_sequence_length is {length}; .*Pipeline takes 1"):
        PipelineTextEncoder(folder, max_sequence_length=length)
    if length:
        PipelineTextEncoder(folder, max_sequence_length=length - 1)


def test_a_tokenizer_that_is_a_sentencepiece_file(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tiny_pipeline("pixart_alpha", tmp_path / "pixart")
    (tmp_path / "corpus.txt").write_text("\n".join(["a red circle above the blue square"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=40, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=5,
    )  # fmt: skip
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    shutil.copy(tmp_path / "spiece.model", folder / "tokenizer" / "spiece.model")
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    (one,) = PipelineTextEncoder(folder).encode([PROMPT])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert len(one.tensors["tokens"]) == len(processor.encode(PROMPT)) + 1
