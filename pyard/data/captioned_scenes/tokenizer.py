"""The grammar's words as a tokenizer that text encoders of `transformers` can use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyard.data.captioned_scenes.vocabulary import words
from pyard.data.captioned_scenes.wording import longest_caption

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
MAX_TOKENS = longest_caption() + 1  # with the end


def tokenizer_tokens() -> tuple[str, ...]:
    """All tokens, in the order of their ids: the special ones as T5 has them, then the words of captions."""
    return (PAD, END, UNKNOWN, *words())


def build_tokenizer() -> Tokenizer:
    """A token for each word, T5's `</s>` at the end; an empty prompt is `</s>` alone, other words are `<unk>`.

    It pads to the longest text of a batch and cuts texts at `MAX_TOKENS`. `transformers.PreTrainedTokenizerFast` takes it as
    `tokenizer_object`, with `pad_token`, `eos_token` and `unk_token` as named here.

    Raises:
        ImportError: `tokenizers` is not installed.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {token: number for number, token in enumerate(tokenizer_tokens())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(".", "")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, ids[END])])
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    tokenizer.enable_padding(pad_id=ids[PAD], pad_token=PAD)
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer
