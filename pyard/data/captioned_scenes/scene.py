"""A captioned scene, its self-check, and how hard scenes are."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from pyard.data.captioned_scenes.prompt import Prompt, check_word
from pyard.data.captioned_scenes.vocabulary import COLOURS, MAX_OBJECTS, SHAPES, SIZES
from pyard.errors import InputError

_CELL_PIXELS = 8  # below this, small shapes are hard to tell apart
_GAP = 0.15625  # between the objects of neighbouring cells, in cells: 1.25 pixels of 8


@dataclass(frozen=True)
class SceneSetting:
    """How large scenes are and how hard they are to learn.

    Every object stands in a cell of its own. The defaults are for a small network and a few hours on two cores: four cells, and
    objects near the middle of their cells. More jitter makes positions freer; more cells make objects smaller in relation to
    the picture.

    Args:
        size: side of the picture in pixels, 16 to 32.
        cells: cells along a side, each of at least 8 pixels.
        jitter: how far objects may be from the middle of their cell, from 0 (not at all) to 1 (as far as the cell has room).
    """

    size: int = 16
    cells: int = 2
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if not 16 <= operator.index(self.size) <= 32:
            raise InputError(f"scenes: size is {self.size}; expected 16 to 32 pixels")
        if not 2 <= operator.index(self.cells) <= self.size // _CELL_PIXELS:
            raise InputError(
                f"scenes: {self.cells} cells along {self.size} pixels; expected 2 to {self.size // _CELL_PIXELS}, "
                f"so that each has {_CELL_PIXELS} pixels"
            )
        if not 0 <= self.jitter <= 1:
            raise InputError(f"scenes: jitter is {self.jitter}; expected 0 to 1")

    @property
    def cell(self) -> float:
        """Side of a cell as a fraction of the picture's."""
        return 1 / self.cells

    def diameter(self, size: str) -> float:
        """Width and height of an object of this size word, as a fraction of the picture's side."""
        return SIZES[size] / self.cells

    def coordinate(self, number: int, size: str, where: float) -> float:
        """A centre inside a cell.

        Args:
            number: of the column or row.
            size: the object's size word.
            where: 0 to 1, from one end of the space that `jitter` allows to the other.

        Returns:
            A fraction of the picture's side.
        """
        free = (self.cells - (self.cells - 1) * _GAP) / self.cells  # of a cell, without the gaps
        room = free - SIZES[size]
        start = number * (free + _GAP) + room * (0.5 + self.jitter * (where - 0.5))
        return (start + SIZES[size] / 2) / self.cells


@dataclass(frozen=True)
class SceneObject:
    """One object in a picture.

    Args:
        shape, colour, size: of `SHAPES`, `COLOURS` and `SIZES`.
        x, y: centre of its bounding box as fractions of the picture's side, from the top left.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float

    def __post_init__(self) -> None:
        check_word("shape", self.shape, SHAPES)
        check_word("colour", self.colour, COLOURS)
        check_word("size", self.size, SIZES)
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise InputError(f"an object at ({self.x}, {self.y}); expected fractions of the picture's side, 0 to 1")


@dataclass(frozen=True)
class Scene:
    """A picture's objects, and a caption that is true of them.

    Args:
        setting: what sizes and distances refer to.
        objects: 1 to 3, apart from each other and inside the picture.
        prompt: what the caption asks for; exactly what the objects are.
        caption: one of the prompt's wordings.
    """

    setting: SceneSetting
    objects: tuple[SceneObject, ...]
    prompt: Prompt
    caption: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise InputError(f"a scene of {len(self.objects)} objects; expected 1 to {MAX_OBJECTS}")
        half = {size: self.setting.diameter(size) / 2 for size in SIZES}
        for found in self.objects:
            if not all(half[found.size] - 1e-9 <= centre <= 1 - half[found.size] + 1e-9 for centre in (found.x, found.y)):
                raise InputError(
                    f"a {found.size} {found.shape} at ({found.x:.3f}, {found.y:.3f}) is partly outside the picture"
                )
        for a, b in itertools.combinations(self.objects, 2):
            apart = max(abs(a.x - b.x), abs(a.y - b.y)) - half[a.size] - half[b.size]
            if apart < _GAP * self.setting.cell - 1e-9:
                raise InputError(f"a {a.shape} and a {b.shape} are {apart:.3f} apart; expected {_GAP * self.setting.cell:.3f}")
        if not satisfies(self.objects, self.prompt, self.setting):
            raise InputError(f"the caption {self.caption!r} is not true of its scene")


def satisfies(objects: Sequence[SceneObject], prompt: Prompt, setting: SceneSetting) -> bool:
    """Whether objects are exactly what a prompt asks for.

    Every object is matched with one of the prompt's, so neither a missing nor an extra one is forgiven. As in GenEval, the
    relation needs a distance along its own axis only: at least half a cell between the centres. A place needs a quarter of a
    cell between the centre and the picture's middle lines.
    """
    if len(objects) != prompt.num_objects:
        return False
    wanted = [thing for thing in prompt.things for _ in range(thing.count)]
    for order in itertools.permutations(objects):
        if all(
            thing.shape == found.shape and thing.colour in (None, found.colour) and thing.size in (None, found.size)
            for thing, found in zip(wanted, order, strict=True)
        ):
            related = prompt.relation is None or shows_relation(order[0], prompt.relation, order[1], setting)
            if related and (prompt.place is None or _is_at(order[0], prompt.place, setting)):
                return True
    return False


def shows_relation(first: SceneObject, relation: str, second: SceneObject, setting: SceneSetting) -> bool:
    """Whether the first object is left of, or above, the second one by at least half a cell."""
    distance = second.x - first.x if relation == "left of" else second.y - first.y
    return distance >= setting.cell / 2


def _is_at(found: SceneObject, place: str, setting: SceneSetting) -> bool:
    vertical, horizontal = place.split()
    down = found.y - 0.5 if vertical == "bottom" else 0.5 - found.y
    across = found.x - 0.5 if horizontal == "right" else 0.5 - found.x
    return min(down, across) >= setting.cell / 4
