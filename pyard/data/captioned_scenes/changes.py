"""Prompts with exactly one thing changed, which a picture of the original one must not satisfy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pyard.data.captioned_scenes.prompt import Prompt, Thing
from pyard.data.captioned_scenes.vocabulary import COLOURS, MAX_OBJECTS, PLACES, RELATIONS, SHAPES, SIZES

Change = Literal["shape", "colour", "size", "count", "relation", "place", "binding"]
CHANGES: tuple[Change, ...] = ("shape", "colour", "size", "count", "relation", "place", "binding")


def changed_prompts(prompt: Prompt, kind: Change) -> tuple[Prompt, ...]:
    """All prompts that differ from this one in one thing of a kind; none if it names nothing of that kind.

    False of every scene of `draw_scene` with this prompt: its two things have different shapes, and one relation between them.

    Args:
        prompt: the original.
        kind: `binding` exchanges the colours of two things; the others replace one word by another of its kind.
    """
    if kind == "count":
        counts = range(1, MAX_OBJECTS + 1) if len(prompt.things) == 1 and prompt.place is None else ()
        return tuple(
            replace(prompt, things=(replace(prompt.things[0], count=n),)) for n in counts if n != prompt.num_objects
        )  # fmt: skip
    if kind == "place":
        return tuple(replace(prompt, place=place) for place in PLACES if place != prompt.place) if prompt.place else ()
    if kind == "relation":
        if prompt.relation is None:
            return ()
        orders = (prompt.things, prompt.things[::-1])
        every = [replace(prompt, things=things, relation=relation) for things in orders for relation in RELATIONS]
        return tuple(other for other in every if other != prompt)
    if kind == "binding":
        if len(prompt.things) < 2 or not all(thing.colour for thing in prompt.things):
            return ()
        first, second = prompt.things
        exchanged = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        return (replace(prompt, things=exchanged),) if first.colour != second.colour else ()
    return tuple(_with_other_word(prompt, kind))


def _with_other_word(prompt: Prompt, kind: Change) -> Iterator[Prompt]:
    known: tuple[str, ...] = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}[kind]
    for place, thing in enumerate(prompt.things):
        rest: tuple[Thing, ...] = prompt.things[:place] + prompt.things[place + 1 :]
        named = getattr(thing, kind)
        for word in known if named is not None else ():
            # The shape of the other thing would make them one thing, named twice.
            if word != named and not (kind == "shape" and any(word == other.shape for other in rest)):
                yield replace(
                    prompt, things=(*prompt.things[:place], _with_word(thing, kind, word), *prompt.things[place + 1 :])
                )


def _with_word(thing: Thing, kind: Change, word: str) -> Thing:
    if kind == "shape":
        return replace(thing, shape=word)
    return replace(thing, colour=word) if kind == "colour" else replace(thing, size=word)
