"""Which scene number i of a seed is: the same on every machine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from pyard.data.captioned_scenes.prompt import Prompt, Thing, check_word
from pyard.data.captioned_scenes.scene import Scene, SceneObject, SceneSetting
from pyard.data.captioned_scenes.vocabulary import (
    CATEGORIES,
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    MAX_OBJECTS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Category,
    Split,
)
from pyard.data.captioned_scenes.wording import caption
from pyard.errors import InputError

_STREAM = 5  # of Philox; streams 0 to 4 are noise, labels, the order of an epoch, flips and the class-conditional scenes
_ALL_PAIRS = tuple(itertools.product(SHAPES, COLOURS))
_TRAIN_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair not in HELD_OUT_PAIRS)
_UNSEEN_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair in HELD_OUT_PAIRS)
_UNSEEN_RELATIONS = tuple(sorted(HELD_OUT_RELATIONS))
_SPLIT_CATEGORIES: dict[Split, tuple[Category, ...]] = {
    "train": CATEGORIES,
    "unseen pair": ("counting", "colours", "position", "attribute binding"),
    "unseen relation": ("position",),
}

_Cell = tuple[int, int]  # row and column
_Kind = tuple[str, str, str]  # shape, colour and size
_T = TypeVar("_T")


class Draws:
    """Random choices that depend on (seed, index) alone, made from the raw bits of Philox, which numpy guarantees."""

    def __init__(self, seed: int, index: int, stream: int = _STREAM):
        for name, number in (("seed", seed), ("index", index)):
            if not 0 <= number < 2**64:
                raise InputError(f"scenes: {name} is {number}; expected 0 to 2**64 - 1")
        key = np.array([seed, index], dtype=np.uint64)
        self._bits = np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], dtype=np.uint64))

    def below(self, count: int) -> int:
        """A whole number, 0 to count - 1."""
        return int(self._bits.random_raw()) * count >> 64

    def one_of(self, options: Sequence[_T]) -> _T:
        """One of several options."""
        return options[self.below(len(options))]

    def fraction(self) -> float:
        """A number in [0, 1)."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53


def draw_scene(
    seed: int,
    index: int,
    setting: SceneSetting | None = None,
    *,
    split: Split = "train",
    category: Category | None = None,
) -> Scene:
    """Scene `index` of a seed.

    Pictures and captions of the split `train` never show a combination of `HELD_OUT_PAIRS` or `HELD_OUT_RELATIONS`, whether
    the caption names it or not. Each scene of `unseen pair` has one of those pairs and no such relation; each of
    `unseen relation` has such a relation and no such pair; their captions name it. The scene's content does not depend on
    `setting.size`.

    Args:
        seed, index: 0 to 2**64 - 1 each.
        setting: None: the default one.
        split: of `SPLITS`.
        category: of `CATEGORIES`; None: each with the same probability.

    Raises:
        InputError: a number out of range, an unknown split, or a category that the split does not have.
    """
    setting = setting or SceneSetting()
    check_word("split", split, SPLITS)
    if category is not None:
        check_word(f"category of the split {split!r}", category, _SPLIT_CATEGORIES[split])
    draws = Draws(seed, index)
    drawn = draws.one_of(_SPLIT_CATEGORIES[split]) if category is None else category
    draw = {"two objects": _draw_two, "attribute binding": _draw_two, "position": _draw_position}.get(drawn, _draw_equal)
    kinds, cells, prompt = draw(draws, setting, split, drawn)
    objects = tuple(
        SceneObject(*kind, *(setting.coordinate(number, kind[2], draws.fraction()) for number in (column, row)))
        for kind, (row, column) in zip(kinds, cells, strict=True)
    )
    return Scene(setting, objects, prompt, caption(prompt, draws.below))


_Drawn = tuple[list[_Kind], Sequence[_Cell], Prompt]


def _draw_equal(draws: Draws, setting: SceneSetting, split: Split, category: Category) -> _Drawn:
    count = 2 + draws.below(MAX_OBJECTS - 1) if category == "counting" else 1
    kind = _kind(draws, _first_pairs(split))
    name_colour = split == "unseen pair" or category == "colours" or (category == "counting" and draws.below(4) > 0)
    cells = draws.one_of(list(itertools.combinations(_cells(setting), count)))
    return [kind] * count, cells, Prompt((_thing(draws, kind, name_colour, count),))


def _draw_two(draws: Draws, setting: SceneSetting, split: Split, category: Category) -> _Drawn:
    first = _kind(draws, _first_pairs(split))
    binding = category == "attribute binding"
    others = [pair for pair in _TRAIN_PAIRS if pair[0] != first[0] and not (binding and pair[1] == first[1])]
    kinds = [first, _kind(draws, others)]
    cells = draws.one_of(
        [pair for pair in itertools.permutations(_cells(setting), 2) if not _shows_held_out(kinds[0][0], kinds[1][0], *pair)]
    )
    return kinds, cells, Prompt(tuple(_thing(draws, kind, name_colour=binding) for kind in kinds))


def _draw_position(draws: Draws, setting: SceneSetting, split: Split, category: Category) -> _Drawn:
    name_colour = split == "unseen pair" or draws.below(4) > 0
    if split != "unseen relation" and draws.below(10) < 3:
        place = draws.one_of(PLACES)
        kind = _kind(draws, _first_pairs(split))
        vertical, horizontal = place.split()
        last = setting.cells - 1
        cell = (last if vertical == "bottom" else 0, last if horizontal == "right" else 0)
        return [kind], [cell], Prompt((_thing(draws, kind, name_colour),), place=place)

    if split == "unseen relation":
        shape, relation, other_shape = draws.one_of(_UNSEEN_RELATIONS)
        kinds = [_kind(draws, [pair for pair in _TRAIN_PAIRS if pair[0] == name]) for name in (shape, other_shape)]
    else:
        relation = draws.one_of(RELATIONS)
        one = _kind(draws, _first_pairs(split))
        # Which of the two comes first must not tell which pair is held out.
        one_is_first = draws.below(2) == 0

        def allowed(other: str) -> bool:
            first, second = (one[0], other) if one_is_first else (other, one[0])
            return first != second and (first, relation, second) not in HELD_OUT_RELATIONS

        other = _kind(draws, [pair for pair in _TRAIN_PAIRS if allowed(pair[0])])
        kinds = [one, other] if one_is_first else [other, one]
    # In one row or one column, so that one relation holds and the other does not.
    axis, across = (1, 0) if relation == "left of" else (0, 1)
    cells = draws.one_of(
        [
            (a, b)
            for a, b in itertools.permutations(_cells(setting), 2)
            if a[across] == b[across] and a[axis] < b[axis]
        ]
    )  # fmt: skip
    return kinds, cells, Prompt(tuple(_thing(draws, kind, name_colour) for kind in kinds), relation=relation)


def _first_pairs(split: Split) -> tuple[tuple[str, str], ...]:
    return _UNSEEN_PAIRS if split == "unseen pair" else _TRAIN_PAIRS


def _kind(draws: Draws, pairs: Sequence[tuple[str, str]]) -> _Kind:
    return (*draws.one_of(pairs), draws.one_of(tuple(SIZES)))


def _thing(draws: Draws, kind: _Kind, name_colour: bool, count: int = 1) -> Thing:
    shape, colour, size = kind
    return Thing(shape, colour if name_colour else None, size if draws.below(2) else None, count)


def _cells(setting: SceneSetting) -> list[_Cell]:
    return list(itertools.product(range(setting.cells), range(setting.cells)))


def _shows_held_out(shape: str, other_shape: str, cell: _Cell, other_cell: _Cell) -> bool:
    for axis, relation in ((1, "left of"), (0, "above")):
        if cell[axis] != other_cell[axis]:
            before = cell[axis] < other_cell[axis]
            first, second = (shape, other_shape) if before else (other_shape, shape)
            if (first, relation, second) in HELD_OUT_RELATIONS:
                return True
    return False
