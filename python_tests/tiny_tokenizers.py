"""Tokenizers of a few hundred entries in the classes that text-to-image pipelines load, built in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import pre_tokenizers

_WORDS = ("a", "an", "the", "red", "green", "blue", "large", "small", "circle", "square", "above", "below", "of", "and")
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-"
# Of Qwen-Image's system prompt, in the published vocabulary one entry a word: the pipeline drops a fixed number of tokens.
_TEMPLATE = (
    *("the", "image", "by", "detailing", "color", "shape", "size", "texture", "quantity", "text", "spatial", "relationships"),
    *("of", "objects", "and", "background"),
)


def t5_tokenizer() -> Any:
    """T5Tokenizer: whole words where it knows them, single characters elsewhere."""
    from transformers import T5Tokenizer

    pieces = {f"▁{word}": -2.0 for word in _WORDS} | dict.fromkeys(_LETTERS, -6.0)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *pieces.items()]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """CLIPTokenizer of 77 tokens; the end of a text has the highest number, as in the published vocabulary."""
    from transformers import CLIPTokenizer

    alphabet = _alphabet()
    merges = _merges([[*word[:-1], f"{word[-1]}</w>"] for word in _WORDS])
    names = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *_merged(merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab=_numbered(names), merges=merges, pad_token=pad_token, model_max_length=77)


def qwen_tokenizer() -> Any:
    """Qwen2Tokenizer with the chat template of Qwen3, without tools and thoughts."""
    from transformers import Qwen2Tokenizer

    words = [["Ġ", *word] for word in [*_TEMPLATE, *_WORDS]] + [
        list(word) for word in ("Describe", "system", "user", "assistant")
    ]
    merges = _merges(words)
    vocab = _numbered([*_alphabet(), *_merged(merges), "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=4096,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
    )
    return tokenizer


def _alphabet() -> list[str]:
    """The letters that stand for the 256 bytes; "!" is number 0, as in the published vocabularies."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _merges(words: Iterable[list[str]]) -> list[tuple[str, str]]:
    """Merges that put these words together from left to right."""
    found: dict[tuple[str, str], None] = {}
    for word in words:
        for end in range(1, len(word)):
            found["".join(word[:end]), word[end]] = None
    return list(found)


def _merged(merges: list[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(left + right for left, right in merges))


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}
