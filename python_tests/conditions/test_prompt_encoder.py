"""A table of a real text encoder: transformers' T5 with random weights, a tokenizer of its own, padded batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import randomise
from own_backbones import TextBackbone, TextConfig
from own_teachers import FLOW, student_of

from pyard.conditions import Encoded, PromptTable, read_prompts
from pyard.errors import InputError
from pyard.models.backbone import Denoiser
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.trajectories import TrajectoryReader, TrajectoryStore, generate_trajectories

transformers = pytest.importorskip("transformers")

PROMPTS = ["a red circle", "a blue square above a green circle", "red", "a red circle", "a circle left of a red red red square"]


class T5Encoder:
    """The last hidden states of a tiny T5 at the tokens that are no padding."""

    def __init__(self, max_length: int = 8, dtype: torch.dtype = torch.float32) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "green", "circle", "square", "above", "left", "of"]
        vocabulary = {word: number for number, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        width = TextConfig().text_size
        config = transformers.T5Config(
            vocab_size=len(words), d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0
        )
        self.network = transformers.T5EncoderModel(config).eval()
        randomise(self.network, 3, std=0.5)
        self.network.to(dtype)
        self.max_length, self.batches = max_length, 0

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.max_length} {sorted(self.tokenizer.get_vocab().items())}".encode())
        for tensor in self.network.state_dict().values():
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        self.batches += 1
        whole = self.tokenizer(list(texts))["input_ids"]
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        hidden = self.network(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        lengths = tokens["attention_mask"].sum(dim=1).tolist()
        return [
            Encoded({"tokens": row[:length]}, len(ids) > self.max_length)
            for row, length, ids in zip(hidden, lengths, whole, strict=True)
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_text_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = T5Encoder(dtype=dtype)
    stored: Any = "float32" if dtype == torch.float32 else "bfloat16"
    with pytest.warns(UserWarning, match="1 of 5 distinct texts are longer than the text encoder's limit"):
        table = PromptTable.build(
            encoder, read_prompts(PROMPTS), tmp_path / "t", dtype=stored, batch_size=3, shard_size=3, progress=False
        )
    assert encoder.batches == 2
    taken = table.take(range(5))
    assert taken["mask"].sum(dim=1).tolist() == [4, 8, 2, 4, 8]
    for i, prompt in enumerate(PROMPTS):
        ids = encoder.tokenizer(prompt, truncation=True, max_length=8, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            alone = encoder.network(ids).last_hidden_state[0].float()
        error = (taken["tokens"][i, : len(alone)] - alone).abs().max()
        assert error <= (1e-5 if dtype == torch.float32 else 0.05) * alone.abs().max()
    assert not torch.allclose(taken["tokens"][0, :2], taken["tokens"][1, :2])
    again = T5Encoder(dtype=dtype)
    PromptTable.build(again, read_prompts(PROMPTS), tmp_path / "t", dtype=stored, progress=False)
    assert again.batches == 0
    with torch.no_grad():
        next(encoder.network.parameters()).add_(1e-2)
    with pytest.raises(InputError, match="fingerprint of the text encoder"):
        PromptTable.build(encoder, read_prompts(PROMPTS), tmp_path / "t", dtype=stored, progress=False)


def test_a_store_of_prompts_from_texts_to_batches(tmp_path: Path) -> None:
    network = Denoiser(TextBackbone(TextConfig()))
    randomise(network, 0, std=0.3)
    store_path = tmp_path / "store"
    table = PromptTable.build(
        T5Encoder(max_length=32), read_prompts(PROMPTS), store_path / "conditions", shard_size=2, batch_size=2, progress=False
    )
    teacher = NetworkTeacher(network, FLOW, conditions=table)
    settings: dict = dict(num_steps=2, teacher_steps=4, cfg_scale=2.0, batch_size=4, progress=False)
    store = generate_trajectories(teacher, store_path, 8, labels="balanced", **settings)
    assert store.manifest.conditions == table.fingerprint
    assert store.manifest.num_classes == 5
    store.verify()
    # Each sample of a batch has the embedding of its own prompt: sample i that of prompt i mod 5.
    batch = next(iter(TrajectoryReader(TrajectoryStore.open(store_path), 8, target="state")))
    noise = torch.from_numpy(np.concatenate([store.tensors(shard)["noise"] for shard in store.shards]))
    samples = [int((noise == row).flatten(1).all(dim=1).nonzero()) for row in batch.history[:, 0]]
    assert sorted(samples) == list(range(8)) != samples
    wanted = table.take([sample % 5 for sample in samples])
    assert all(torch.equal(batch.condition[name], wanted[name]) for name in ("tokens", "mask"))
    # A student carries its prompts along.
    student = student_of(teacher, 2)
    student.save_pretrained(tmp_path / "student")
    assert (tmp_path / "student" / "conditions" / "prompts.jsonl").is_file()
    # Guidance leads away from the negative prompt: the empty text.
    other = PromptTable.build(
        T5Encoder(max_length=32), read_prompts(PROMPTS), tmp_path / "red", default_negative="red", progress=False
    )
    guided = generate_trajectories(
        NetworkTeacher(network, FLOW, conditions=other), tmp_path / "other", 8, labels="balanced", **settings
    )
    assert not np.array_equal(guided.tensors(guided.shards[0])["state"], store.tensors(store.shards[0])["state"])
    shard = next((store_path / "conditions" / "shards").iterdir())
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=shard.name):
        TrajectoryStore.open(store_path).verify()
