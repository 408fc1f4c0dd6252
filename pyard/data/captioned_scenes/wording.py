"""Prompts to captions, in several wordings, and captions back to prompts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

from pyard.data.captioned_scenes.prompt import Prompt, Thing
from pyard.data.captioned_scenes.vocabulary import (
    COLOURS,
    CONJUNCTION,
    CONVERSE_WORDS,
    COUNT_WORDS,
    NOUNS,
    PLACE_WORDS,
    RELATION_WORDS,
    SIZE_WORDS,
    plural,
    words,
)
from pyard.errors import InputError

Alternatives = tuple[str, ...]  # phrases of which a wording takes one


def captions(prompt: Prompt) -> tuple[str, ...]:
    """All wordings of a prompt, the plainest one first."""
    return tuple(" ".join(choice) for sentence in _sentences(prompt) for choice in itertools.product(*sentence))


def caption(prompt: Prompt, pick: Callable[[int], int] = lambda count: 0) -> str:
    """One wording of a prompt.

    Args:
        prompt: what to say.
        pick: given how many alternatives there are, the number of the one to take; default: always the first.
    """
    sentences = _sentences(prompt)
    return " ".join(alternatives[pick(len(alternatives))] for alternatives in sentences[pick(len(sentences))])


def parse_caption(text: str) -> Prompt:
    """What a caption asks for.

    Args:
        text: a caption in any wording that `captions` gives; case and a final full stop do not matter.

    Raises:
        InputError: a word that is not in the vocabulary, or words in an order that means nothing here.

    Example:
        >>> parse_caption("a blue square right of a small cross").things[0]
        Thing(shape='cross', colour=None, size='small', count=1)
    """
    tokens = text.lower().strip().removesuffix(".").split()
    unknown = [token for token in tokens if token not in _known_words()]
    if unknown:
        raise InputError(f"prompt {text!r}: unknown word {unknown[0]!r}; the words are {', '.join(_known_words())}")
    try:
        return _parse(tokens)
    except InputError as error:
        raise InputError(f"prompt {text!r}: {error}") from None


def longest_caption() -> int:
    """The largest number of words in a caption."""
    thing = Thing("disc", "red", "small")
    prompts = [Prompt((thing, thing), relation="left of"), Prompt((thing,), place="top left")]
    return max(len(text.split()) for prompt in prompts for text in captions(prompt))


def _sentences(prompt: Prompt) -> list[list[Alternatives]]:
    """The orders in which a prompt can be put, each a list of what its parts may be called."""
    things = [_thing_words(thing) for thing in prompt.things]
    if len(things) == 1:
        return [things[0] + ([PLACE_WORDS[prompt.place]] if prompt.place else [])]
    first, second = things
    if prompt.relation is None:
        return [[*first, (CONJUNCTION,), *second], [*second, (CONJUNCTION,), *first]]
    return [
        [*first, RELATION_WORDS[prompt.relation], *second],
        [*second, CONVERSE_WORDS[prompt.relation], *first],
    ]


def _thing_words(thing: Thing) -> list[Alternatives]:
    nouns = NOUNS[thing.shape] if thing.count == 1 else tuple(map(plural, NOUNS[thing.shape]))
    size = [SIZE_WORDS[thing.size]] if thing.size else []
    colour = [(thing.colour,)] if thing.colour else []
    return [COUNT_WORDS[thing.count], *size, *colour, nouns]


@functools.cache
def _known_words() -> tuple[str, ...]:
    return words()


@functools.cache
def _phrases() -> dict[str, dict[tuple[str, ...], tuple[str | int, bool]]]:
    """By part of speech: the words of a phrase, its meaning, and a mark (plural nouns, converse relations)."""
    return {
        "count": {(w,): (count, False) for count, group in COUNT_WORDS.items() for w in group},
        "size": {(w,): (size, False) for size, group in SIZE_WORDS.items() for w in group},
        "colour": {(colour,): (colour, False) for colour in COLOURS},
        "noun": {
            (plural(w) if several else w,): (shape, several)
            for shape, group in NOUNS.items()
            for w in group
            for several in (False, True)
        },
        "relation": {
            tuple(phrase.split()): (relation, converse)
            for forms, converse in ((RELATION_WORDS, False), (CONVERSE_WORDS, True))
            for relation, group in forms.items()
            for phrase in group
        },
        "place": {tuple(phrase.split()): (place, False) for place, group in PLACE_WORDS.items() for phrase in group},
        "conjunction": {(CONJUNCTION,): (CONJUNCTION, False)},
    }


class _Reader:
    """A position in a caption's words."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens

    def take(self, part: str) -> tuple[str | int, bool] | None:
        """The meaning of a phrase of this part of speech if one comes next, which is then behind us."""
        for phrase, meaning in _phrases()[part].items():
            if tuple(self.tokens[: len(phrase)]) == phrase:
                self.tokens = self.tokens[len(phrase) :]
                return meaning
        return None

    def expected(self, what: str) -> InputError:
        """An error that says what should come next."""
        found = repr(" ".join(self.tokens)) if self.tokens else "the end"
        return InputError(f"expected {what}, found {found}")


def _parse(tokens: list[str]) -> Prompt:
    reader = _Reader(tokens)
    first = _parse_thing(reader)
    if not reader.tokens:
        return Prompt((first,))
    place = reader.take("place")
    if place is not None:
        prompt = Prompt((first,), place=str(place[0]))
    elif reader.take("conjunction"):
        prompt = Prompt((first, _parse_thing(reader)))
    else:
        relation = reader.take("relation")
        if relation is None:
            raise reader.expected(f"the end, a place, a relation or {CONJUNCTION!r}")
        name, converse = relation
        second = _parse_thing(reader)
        prompt = Prompt((second, first) if converse else (first, second), relation=str(name))
    if reader.tokens:
        raise reader.expected("the end")
    return prompt


def _parse_thing(reader: _Reader) -> Thing:
    count = reader.take("count")
    if count is None:
        raise reader.expected("a count (a, one, two, three)")
    size, colour, noun = reader.take("size"), reader.take("colour"), reader.take("noun")
    if noun is None:
        raise reader.expected("a size, a colour or a shape, in this order")
    number = int(count[0])
    shape, several = noun
    if several != (number > 1):
        raise InputError(f"{number} with the {'plural' if several else 'singular'} of {shape!r}")
    return Thing(str(shape), str(colour[0]) if colour else None, str(size[0]) if size else None, number)
