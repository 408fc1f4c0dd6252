"""What the quality benchmark trains: settings, each with all that distinguishes it, and the cells (subject, setting, seed).

S num_steps · N history_layers · L depth of the teacher
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pyard.training.adversarial_config import DIGITS_DISCRIMINATORS

Scale = Literal["cpu", "gpu"]
Layers = Literal["0", "L/4", "L/2", "L"]

NUM_STEPS = 4
# Two accounts of how ARD's students are trained: what the authors' code does, and what the paper's text and figure say.
AUTHORS_CODE = {"target": "denoised", "output": "direct"}
PAPERS_TEXT = {"target": "state", "output": "direct"}
STRONG = {"target": "state", "output": "jump"}  # starts as the teacher's own sampler of S steps


@dataclass(frozen=True)
class Budget:
    """What every student of a subject gets.

    Args:
        trajectories: of the teacher, for each seed.
        updates: of a student.
        batch_size: trajectories an update.
        learning_rate: of AdamW, falling along a cosine.
        samples: drawn by each row of the tables.
        held_out: trajectories for the exposure-bias curves.
        train: further settings of `pyard.train`.
        adversarial: settings of the adversarial stage.
    """

    trajectories: int = 4096
    updates: int = 800
    batch_size: int = 32
    learning_rate: float = 1e-3
    samples: int = 10_000
    held_out: int = 1024
    train: dict[str, Any] = field(default_factory=dict)
    adversarial: dict[str, Any] = field(default_factory=lambda: dict(DIGITS_DISCRIMINATORS))


@dataclass(frozen=True)
class Setting:
    """A way to train a student.

    Args:
        name: of its folder and in the results; unique.
        title: in tables.
        layers: N, as a share of the teacher's layers.
        train: settings of `pyard.train` beside the budget's.
        factor: what it varies: the name of a table.
        updates: as a multiple of the budget's.
        base: name of the setting whose student it goes on from (the adversarial stage).
    """

    name: str
    title: str
    layers: Layers
    train: dict[str, Any]
    factor: str
    updates: float = 1.0
    base: str | None = None

    @property
    def num_steps(self) -> int:
        """S."""
        return int(self.train.get("num_steps", NUM_STEPS))

    @property
    def but_for_its_history(self) -> tuple[Any, ...]:
        """Equal for two settings that differ in their history alone."""
        own = ("mask", "window", "history_bias")
        return self.updates, self.base, sorted((k, str(v)) for k, v in self.train.items() if k not in own)

    def history_layers(self, depth: int) -> int:
        """N for a teacher of L layers."""
        return {"0": 0, "L/4": max(1, depth // 4), "L/2": max(1, depth // 2), "L": depth}[self.layers]


@dataclass(frozen=True)
class Cell:
    """One student: a setting on a subject, from one seed."""

    subject: str
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.subject}/{self.setting.name}/seed-{self.seed}"


def corner(family: dict[str, Any], layers: Layers) -> Setting:
    """A setting of the main table."""
    name = prefix(family)
    return Setting(f"{name}-{slug(layers)}", f"{FAMILIES[name]}, N = {layers}", layers, dict(family), "main")


def prefix(family: dict[str, Any]) -> str:
    """`denoised-direct`, `state-direct` or `state-jump`."""
    return f"{family['target']}-{family['output']}"


def slug(layers: Layers) -> str:
    """`N0`, `N-quarter`, `N-half`, `N-all`."""
    return {"0": "N0", "L/4": "N-quarter", "L/2": "N-half", "L": "N-all"}[layers]


ENDS: tuple[Layers, Layers] = ("0", "L")
# Titles by prefix.
FAMILIES = {
    "denoised-direct": "the authors' code (x̂0 targets, direct)",
    "state-direct": "the paper's text (state targets, direct)",
    "state-jump": "state targets, jump",
}
_LAYERS: tuple[tuple[dict[str, Any], tuple[Layers, ...]], ...] = (
    (AUTHORS_CODE, ("0", "L/4", "L")),
    (PAPERS_TEXT, ENDS),
    (STRONG, ("0", "L/4", "L")),
)
MAIN = tuple(corner(family, layers) for family, numbers in _LAYERS for layers in numbers)


def varied(
    family: dict[str, Any], layers: Layers, factor: str, suffix: str, title: str, updates: float = 1.0, **more: Any
) -> Setting:
    """A corner of the main table with one thing changed."""
    start = corner(family, layers)
    return replace(
        start,
        name=f"{start.name}-{suffix}",
        title=f"{start.title}, {title}",
        factor=factor,
        train={**start.train, **more},
        updates=updates,
    )


def one_factor_at_a_time() -> Iterator[Setting]:
    """Settings that differ in one thing from a row of the main table."""
    both = (AUTHORS_CODE, STRONG)
    for family in both:
        yield replace(corner(family, "L/2"), factor="N")
        for steps in (1, 2, 3, 6):
            for layers in ENDS if steps > 1 else ENDS[:1]:  # one step has no history
                yield varied(family, layers, "S", f"S{steps}", f"S = {steps}", num_steps=steps)
        yield varied(family, "L", "mask", "window2", "window of 2 steps", mask="window", window=2)
        yield varied(family, "L", "mask", "anchor", "anchor: own step and x_T", mask="anchor")
        yield varied(family, "L", "mask", "diagonal", "diagonal: own step alone", mask="diagonal")
        yield varied(family, "L", "heads", "shared", "a shared head", heads="shared")
    for layers in ENDS:
        yield varied(PAPERS_TEXT, layers, "S", "S2", "S = 2", num_steps=2)
    for family, layers in ((AUTHORS_CODE, "L"), (STRONG, "0")):
        yield varied(family, layers, "learning rate", "lr0.002", "lr 0.002", learning_rate=2e-3)  # type: ignore[arg-type]
    yield varied(STRONG, "0", "loss", "huber", "pseudo-Huber", loss="pseudo_huber")
    yield varied(STRONG, "0", "loss", "min-snr", "min-SNR weights", step_weights="min_snr")
    yield adversarial(corner(STRONG, "0"))


OWN = "own rollout in the second half"
SWITCHED_OFF = "history bias from -4"
LONGER = "4 times the updates"
ROLLOUT: dict[str, Any] = {"rollout_probability": 1.0}  # the first half of the updates is teacher-forced, see `train_settings`


def own_rollouts() -> Iterator[Setting]:
    """The strong baseline fine-tuned on its own history."""
    for layers in ("0", "L/4", "L"):
        yield varied(STRONG, layers, "history", "rollout", OWN, **ROLLOUT)  # type: ignore[arg-type]


def switched_off() -> Iterator[Setting]:
    """The strong baseline with a history that is switched off at first."""
    yield varied(STRONG, "L/4", "history", "bias", SWITCHED_OFF, history_bias=-4.0)


def longer() -> Iterator[Setting]:
    """Four times the updates, the second half on the student's own history; without one and with one."""
    for layers in ENDS:
        yield varied(STRONG, layers, "history", "long-rollout", f"{LONGER}, {OWN}", 4.0, **ROLLOUT)


def further_ways() -> Iterator[Setting]:
    """Other ways in which a history might help."""
    through: dict[str, Any] = {**ROLLOUT, "rollout_gradient": "backprop"}
    for layers in ENDS:
        yield varied(STRONG, layers, "history", "through", f"{OWN}, backpropagated", **through)
        yield varied(AUTHORS_CODE, layers, "history", "rollout", OWN, **ROLLOUT)
    yield varied(STRONG, "L", "history", "bias", SWITCHED_OFF, history_bias=-4.0)
    yield varied(STRONG, "L", "history", "bias-rollout", f"{SWITCHED_OFF}, {OWN}", history_bias=-4.0, **ROLLOUT)
    yield varied(AUTHORS_CODE, "L", "history", "long", LONGER, 4.0)


def ways_for_fast_students() -> Iterator[Setting]:
    """Still others, tried where a student takes half a minute."""
    for layers in ENDS:
        yield varied(STRONG, layers, "history", "S2-rollout", f"S = 2, {OWN}", num_steps=2, **ROLLOUT)
        yield varied(STRONG, layers, "history", "long", LONGER, 4.0)
    yield varied(STRONG, "L", "history", "anchor-rollout", f"anchor mask, {OWN}", mask="anchor", **ROLLOUT)


def longer_by_other_histories() -> Iterator[Setting]:
    """The way that helps, with other histories than `longer` has."""
    yield varied(STRONG, "L/4", "history", "long-rollout", f"{LONGER}, {OWN}", 4.0, **ROLLOUT)
    yield varied(
        STRONG, "L", "history", "long-rollout-bias", f"{LONGER}, {OWN}, {SWITCHED_OFF}", 4.0, history_bias=-4.0, **ROLLOUT
    )  # fmt: skip


def adversarial(base: Setting) -> Setting:
    """The adversarial stage after a setting."""
    return replace(
        base, name=f"{base.name}-gan", title=f"{base.title}, + adversarial", factor="adversarial", base=base.name,
        train={"stage": "adversarial", "learning_rate": 3e-4},
    )  # fmt: skip


def not_judged(base: Setting) -> Setting:
    """The control of `adversarial`: as many further updates, in which what the discriminators say counts for nothing."""
    return replace(
        base, name=f"{base.name}-further", title=f"{base.title}, + as many updates without", factor="adversarial",
        base=base.name, train={**adversarial(base).train, "adversarial": {"weight": 0.0, "feature_matching": 0.0}},
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """All that a benchmark trains, and with what.

    Args:
        budgets: of each subject.
        cells: in the order in which they are trained: the main table first.
    """

    budgets: dict[str, Budget]
    cells: tuple[Cell, ...]


QUICK = Budget(
    trajectories=256, updates=40, samples=200, held_out=64, adversarial={**DIGITS_DISCRIMINATORS, "warmup_steps": 10}
)
BUDGETS = {
    "digits": Budget(),
    "mixture-2d": Budget(),
    "mixture-16": Budget(updates=500),
    "scenes": Budget(
        trajectories=65_536,
        updates=8000,
        batch_size=256,
        learning_rate=3e-4,
        train={"mixed_precision": "bf16"},
        adversarial={"warmup_steps": 1000},
    ),
}
SUBJECTS: dict[Scale, tuple[str, ...]] = {"cpu": ("digits", "mixture-2d", "mixture-16"), "gpu": ("scenes",)}


def full_plan(subjects: Sequence[str], seeds: int) -> Plan:
    """The main table with every seed; then, with as many as two hours of two cores allow, what else might matter.

    Students of `mixture-2d` take half a minute each, so that there every way to use a history is tried, and the one that helps
    there with twice the seeds; those of other subjects take up to two. One factor at a time is for the first subject alone.
    Scenes, for a GPU and half an hour of it, get that way from one seed.
    """
    first, one, every = subjects[0], range(1), range(seeds)
    cells = [Cell(subject, setting, seed) for seed in every for subject in subjects for setting in MAIN]
    judged = [stage(corner(AUTHORS_CODE, "L")) for stage in (adversarial, not_judged)]
    cells += [Cell(first, setting, seed) for seed in every for setting in judged]
    for subject in subjects:
        fast, large = subject == "mixture-2d", subject == "mixture-16"
        cells += [Cell(subject, setting, seed) for seed in (one if large else every) for setting in switched_off()]
        cells += [Cell(subject, setting, seed) for seed in (every if fast else one) for setting in own_rollouts()]
        long_seeds = range(2 * seeds) if fast else one if subject == "scenes" else every
        cells += [Cell(subject, setting, seed) for seed in long_seeds for setting in longer()]
        if large:
            continue
        cells += [Cell(subject, setting, 0) for setting in further_ways()]
        if fast:
            cells += [Cell(subject, setting, 0) for setting in ways_for_fast_students()]
            cells += [Cell(subject, setting, seed) for seed in every for setting in longer_by_other_histories()]
    cells += [Cell(first, setting, 0) for setting in one_factor_at_a_time()]
    return Plan({subject: BUDGETS[subject] for subject in subjects}, tuple(cells))


def quick_plan(subjects: Sequence[str]) -> Plan:
    """Two settings and one factor with next to no budget: that everything runs, not how good it is."""
    settings = [corner(AUTHORS_CODE, "0"), corner(AUTHORS_CODE, "L"), corner(STRONG, "0"), corner(STRONG, "L")]
    settings += [varied(STRONG, "0", "S", "S2", "S = 2", num_steps=2), adversarial(corner(AUTHORS_CODE, "L"))]
    return Plan(dict.fromkeys(subjects, QUICK), tuple(Cell(subjects[0], setting, 0) for setting in settings))
