"""What scenes consist of, the words for it, and the combinations that training never shows."""

from __future__ import annotations

from typing import Literal

SHAPES = ("disc", "square", "triangle", "cross")
# RGB, 0 to 1. Any two differ from each other, seen from the background, far more than noise or blur can shift them.
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.65, 0.15, 0.80),
    "white": (0.98, 0.98, 0.98),
}
BACKGROUND = (0.25, 0.25, 0.25)
SIZES = {"small": 0.625, "large": 0.875}  # diameter in cells
COUNTS = ("a", "two", "three")
MAX_OBJECTS = len(COUNTS)
RELATIONS = ("left of", "above")  # "right of" and "below" are these two, the other way round
PLACES = ("top left", "top right", "bottom left", "bottom right")

Category = Literal["single object", "two objects", "counting", "colours", "position", "attribute binding"]
# The six tasks of GenEval (Ghosh et al. 2023).
CATEGORIES: tuple[Category, ...] = ("single object", "two objects", "counting", "colours", "position", "attribute binding")

Split = Literal["train", "unseen pair", "unseen relation"]
SPLITS: tuple[Split, ...] = ("train", "unseen pair", "unseen relation")
# No training picture has an object of one of these shapes in this colour: each shape and four of the colours once.
HELD_OUT_PAIRS = frozenset({("disc", "green"), ("square", "yellow"), ("triangle", "red"), ("cross", "blue")})
# No training picture has the first shape left of, or above, the second one: each shape comes first once and second once.
HELD_OUT_RELATIONS = frozenset(
    {
        ("cross", "left of", "square"),
        ("triangle", "left of", "disc"),
        ("disc", "above", "cross"),
        ("square", "above", "triangle"),
    }
)

# The first word of each tuple is the name used in the code; the others are further wordings of it.
COUNT_WORDS = {1: ("a", "one"), 2: ("two",), 3: ("three",)}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
NOUNS = {"disc": ("disc", "circle"), "square": ("square",), "triangle": ("triangle",), "cross": ("cross",)}
RELATION_WORDS = {"left of": ("left of", "to the left of"), "above": ("above", "over")}
CONVERSE_WORDS = {"left of": ("right of", "to the right of"), "above": ("below", "under")}
PLACE_WORDS = {place: (f"in the {place} corner", f"at the {place}") for place in PLACES}
CONJUNCTION = "and"


def plural(noun: str) -> str:
    """The plural of a shape's noun."""
    return noun + ("es" if noun.endswith("s") else "s")


def words() -> tuple[str, ...]:
    """Every word a caption can contain, once each, in a fixed order."""
    nouns = [noun for forms in NOUNS.values() for noun in forms]
    phrases = [
        *(word for forms in (COUNT_WORDS, SIZE_WORDS) for alternatives in forms.values() for word in alternatives),
        *COLOURS,
        *nouns,
        *map(plural, nouns),
        CONJUNCTION,
        *(phrase for forms in (RELATION_WORDS, CONVERSE_WORDS, PLACE_WORDS) for group in forms.values() for phrase in group),
    ]
    return tuple(dict.fromkeys(word for phrase in phrases for word in phrase.split()))
