"""Captions, their parser, the prompts between them, and the tokenizer."""

import pytest

from pyard.data.captioned_scenes import (
    CATEGORIES,
    Prompt,
    Thing,
    build_tokenizer,
    captions,
    draw_scene,
    parse_caption,
    tokenizer_tokens,
    words,
)
from pyard.data.captioned_scenes.changes import CHANGES, changed_prompts
from pyard.data.captioned_scenes.tokenizer import END, MAX_TOKENS, PAD, UNKNOWN
from pyard.errors import InputError


@pytest.mark.parametrize(
    ("text", "prompt", "category"),
    [
        ("a disc", Prompt((Thing("disc"),)), "single object"),
        ("One little Circle.", Prompt((Thing("disc", size="small"),)), "single object"),
        ("two small red discs", Prompt((Thing("disc", "red", "small", 2),)), "counting"),
        ("three crosses", Prompt((Thing("cross", count=3),)), "counting"),
        ("a white triangle", Prompt((Thing("triangle", "white"),)), "colours"),
        ("a cross and a disc", Prompt((Thing("disc"), Thing("cross"))), "two objects"),
        ("a red cross and a blue disc", Prompt((Thing("disc", "blue"), Thing("cross", "red"))), "attribute binding"),
        (
            "a green cross left of a blue square",
            Prompt((Thing("cross", "green"), Thing("square", "blue")), relation="left of"),
            "position",
        ),
        (
            "a blue square to the right of a green cross",
            Prompt((Thing("cross", "green"), Thing("square", "blue")), relation="left of"),
            "position",
        ),
        ("a disc under a big square", Prompt((Thing("square", size="large"), Thing("disc")), relation="above"), "position"),
        ("a disc at the top left", Prompt((Thing("disc"),), place="top left"), "position"),
    ],
)
def test_captions_mean_what_they_say(text, prompt, category):
    assert parse_caption(text) == prompt
    assert prompt.category == category


def test_every_wording_of_a_scene_is_read_back_as_its_prompt():
    seen = set()
    for index in range(300):
        prompt = draw_scene(0, index).prompt
        for text in captions(prompt):
            assert parse_caption(text) == prompt
            seen.update(text.split())
    assert seen == set(words())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a pink disc", "unknown word 'pink'"),
        ("", "expected a count"),
        ("red disc", "expected a count"),
        ("a red", "expected a size, a colour or a shape"),
        ("a red small disc", "found 'small disc'"),
        ("two disc", "2 with the singular"),
        ("a discs", "1 with the plural"),
        ("a disc and", "found the end"),
        ("a disc a square", "found 'a square'"),
        ("a disc and a square and a cross", "expected the end"),
        ("a disc and a disc", "the same thing twice"),
        ("two discs and a square", "expected a count of 1"),
        ("two discs in the top left corner", "with 2 objects"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_caption(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Thing("ring"),
        lambda: Thing("disc", "pink"),
        lambda: Thing("disc", size="huge"),
        lambda: Thing("disc", count=4),
        lambda: Prompt(()),
        lambda: Prompt((Thing("disc"),), relation="above"),
        lambda: Prompt((Thing("disc"), Thing("cross")), relation="below"),
        lambda: Prompt((Thing("disc"),), place="middle"),
    ],
)
def test_prompts_check_themselves(make):
    with pytest.raises(InputError):
        make()


def test_changed_prompts_change_one_thing():
    prompt = parse_caption("a small green cross left of a blue square")
    changed = {kind: changed_prompts(prompt, kind) for kind in CHANGES}
    assert {kind: len(found) for kind, found in changed.items()} == {
        "shape": 4, "colour": 10, "size": 1, "count": 0, "relation": 3, "place": 0, "binding": 1,
    }  # fmt: skip
    assert changed["size"] == (parse_caption("a large green cross left of a blue square"),)
    assert changed["binding"] == (parse_caption("a small blue cross left of a green square"),)
    assert parse_caption("a small green cross right of a blue square") in changed["relation"]
    assert changed_prompts(parse_caption("two discs"), "count") == (parse_caption("a disc"), parse_caption("three discs"))
    assert len(changed_prompts(parse_caption("a disc at the top left"), "place")) == 3


def test_the_tokenizer_knows_every_caption():
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = build_tokenizer()
    tokens = tokenizer_tokens()
    assert tokens[:3] == (PAD, END, UNKNOWN)
    assert len(set(tokens)) == len(tokens) == tokenizer.get_vocab_size()
    texts = [text for index in range(100) for text in captions(draw_scene(1, index).prompt)]
    for text, encoded in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert [token for token in encoded.tokens if token != PAD] == [*text.split(), END]
        assert len(encoded.ids) <= MAX_TOKENS
    assert tokenizer.encode("").tokens == [END]
    assert tokenizer.encode("A pink disc.").tokens == ["a", UNKNOWN, "disc", END]


def test_transformers_takes_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(), pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=MAX_TOKENS
    )
    wrapped.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoded = again(["two red discs", ""], padding="max_length", max_length=MAX_TOKENS, truncation=True)
    assert [len(ids) for ids in encoded["input_ids"]] == [MAX_TOKENS] * 2
    assert again.convert_ids_to_tokens(encoded["input_ids"][0])[:4] == ["two", "red", "discs", END]
    assert [sum(mask) for mask in encoded["attention_mask"]] == [4, 1]


def test_all_categories_are_drawn():
    assert {draw_scene(0, index).prompt.category for index in range(100)} == set(CATEGORIES)
