"""What a caption asks for, as a value that a picture can be checked against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyard.data.captioned_scenes.vocabulary import (
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    MAX_OBJECTS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Category,
    Split,
)
from pyard.errors import InputError


@dataclass(frozen=True)
class Thing:
    """One noun phrase: equal objects, such as "two small red discs".

    Args:
        shape: of `SHAPES`.
        colour: of `COLOURS`; None: any.
        size: of `SIZES`; None: any.
        count: how many, 1 to 3.
    """

    shape: str
    colour: str | None = None
    size: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        check_word("shape", self.shape, SHAPES)
        if self.colour is not None:
            check_word("colour", self.colour, COLOURS)
        if self.size is not None:
            check_word("size", self.size, SIZES)
        if not 1 <= self.count <= MAX_OBJECTS:
            raise InputError(f"count is {self.count}; expected 1 to {MAX_OBJECTS}")

    def sort_key(self) -> tuple[str, str, str]:
        """Orders things that no relation orders."""
        return self.shape, self.colour or "", self.size or ""


@dataclass(frozen=True)
class Prompt:
    """The meaning of a caption: exactly these objects and no others.

    Two captions mean the same exactly if their prompts are equal: "right of" is "left of" with the things exchanged, and
    things that are only joined by "and" are kept in a fixed order.

    Args:
        things: one thing, or two of count 1.
        relation: how the first of two things stands to the second, "left of" or "above"; None: not said.
        place: the corner where a single object is, of `PLACES`; None: not said.
    """

    things: tuple[Thing, ...]
    relation: str | None = None
    place: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.things) <= 2:
            raise InputError(f"a prompt of {len(self.things)} things; expected one or two")
        if len(self.things) == 2 and any(thing.count > 1 for thing in self.things):
            raise InputError("a prompt of two things, one of them more than once; expected a count of 1 for each")
        if self.relation is not None:
            check_word("relation", self.relation, RELATIONS)
            if len(self.things) == 1:
                raise InputError(f"relation {self.relation!r} with one thing; expected two")
        elif len(self.things) == 2:
            if self.things[0] == self.things[1]:
                raise InputError(f"the same thing twice ({self.things[0].shape}); expected one thing with a count of 2")
            object.__setattr__(self, "things", tuple(sorted(self.things, key=Thing.sort_key)))
        if self.place is not None:
            check_word("place", self.place, PLACES)
            if self.num_objects > 1:
                raise InputError(f"place {self.place!r} with {self.num_objects} objects; expected one")

    @property
    def num_objects(self) -> int:
        """How many objects the picture must have."""
        return sum(thing.count for thing in self.things)

    @property
    def category(self) -> Category:
        """Which of GenEval's six tasks this is; sizes may be named in each."""
        if self.relation is not None or self.place is not None:
            return "position"
        if len(self.things) == 2:
            return "attribute binding" if all(thing.colour for thing in self.things) else "two objects"
        if self.num_objects > 1:
            return "counting"
        return "colours" if self.things[0].colour else "single object"

    @property
    def split(self) -> Split:
        """`train`, or the kind of combination named here that no training picture shows (a pair, where it names both)."""
        if any((thing.shape, thing.colour) in HELD_OUT_PAIRS for thing in self.things):
            return "unseen pair"
        if self.relation is not None:
            first, second = self.things
            if (first.shape, self.relation, second.shape) in HELD_OUT_RELATIONS:
                return "unseen relation"
        return "train"


def check_word(name: str, found: str, known: Iterable[str]) -> None:
    """Raise an InputError if a word is not one of the known ones."""
    known = tuple(known)
    if found not in known:
        raise InputError(f"{name} is {found!r}; expected one of {', '.join(known)}")
