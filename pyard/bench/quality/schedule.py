"""In which order the benchmark's work is done: of all that has what it needs, whatever comes first in the plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pyard.bench.quality.plan import TEXT, Cell
from pyard.bench.quality.text_workshop import REFERENCES


@dataclass(frozen=True)
class Errand:
    """Something that several cells need, and that one process makes: a method of the subject's workshop.

    Args:
        subject: whose workshop.
        method: its name.
        arguments: of the method.
    """

    subject: str
    method: Literal["teacher_samples", "reference", "store"] = "teacher_samples"
    arguments: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """Unique; the subject's own where there is but one."""
        return " ".join([self.subject, self.method, *map(str, self.arguments)]) if self.arguments else self.subject


def needed_by(cell: Cell) -> list[Errand]:
    """The errands that have to be run before a cell is made."""
    if cell.subject != TEXT:
        return [Errand(cell.subject)]
    # Minutes each: were they left to the cells, all processes would wait for the one that begins.
    store = Errand(TEXT, "store", (cell.setting.num_steps, cell.seed, cell.setting.guided))
    return [Errand(TEXT, "reference", ("teacher",)), store]


def base_of(cell: Cell) -> str | None:
    """Name of the cell that a cell goes on from; None: it begins with the teacher."""
    base = cell.setting.base
    return None if base is None else f"{cell.subject}/{base}/seed-{cell.seed}"


def tasks_of(cells: Sequence[Cell]) -> dict[str, Errand | Cell]:
    """All work by name, in order of preference: each cell after the errands that nobody needed before it."""
    tasks: dict[str, Errand | Cell] = {}
    for cell in cells:
        tasks |= {errand.name: errand for errand in needed_by(cell) if errand.name not in tasks}
        tasks[cell.name] = cell
    if any(cell.subject == TEXT for cell in cells):  # for the report alone
        further = (Errand(TEXT, "reference", (name,)) for name in REFERENCES)
        tasks |= {errand.name: errand for errand in further if errand.name not in tasks}
    return tasks


def needs_of(tasks: Mapping[str, Errand | Cell]) -> dict[str, set[str]]:
    """The tasks that each task waits for."""
    needs: dict[str, set[str]] = {}
    for name, task in tasks.items():
        wanted = [] if isinstance(task, Errand) else [*(errand.name for errand in needed_by(task)), base_of(task)]
        needs[name] = {other for other in wanted if other is not None and other in tasks}
    return needs


class Schedule:
    """Work that is left.

    Args:
        needs: by name, in order of preference: the names of what has to be done before.
    """

    def __init__(self, needs: Mapping[str, Collection[str]]):
        self._missing = {name: set(them) for name, them in needs.items()}

    def take(self) -> str | None:
        """The name of what to do next, which is no longer left; None: nothing that has all it needs."""
        for name, missing in self._missing.items():
            if not missing:
                del self._missing[name]
                return name
        return None

    def done(self, name: str) -> None:
        """What was taken has been done."""
        for missing in self._missing.values():
            missing.discard(name)

    @property
    def left(self) -> dict[str, str]:
        """What was never taken, each with something that it waits for."""
        return {name: min(missing) for name, missing in self._missing.items() if missing}
