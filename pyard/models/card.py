"""The README.md of a saved model: front matter for the Hugging Face hub, how to load it, its settings and its scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict, cast

from pyard.errors import InputError
from pyard.models.families import FAMILIES, backbone_class
from pyard.models.fingerprint import weights_digest
from pyard.models.student_config import StudentConfig
from pyard.storage.files import write_text
from pyard.storage.reading import read_object

if TYPE_CHECKING:
    from pyard.models.student import Student

CARD_NAME = "README.md"
SCORES_NAME = "pyard-scores.json"
PROMPT = "a red circle above a blue square"
_MARK = "<!-- pyard wrote this file and replaces it at each save. To keep changes of your own, delete this line. -->"
_ARD = "autoregressive distillation ([arXiv 2504.11295](https://arxiv.org/abs/2504.11295))"
_FAMILY_NAMES = {"dit": "DiT", "lightning_dit": "LightningDiT"}


class Scores(TypedDict):
    """What an evaluation found: sha256 of the measured weights, how, rows of cells with the headings first, and all else."""

    weights: str
    about: str
    table: list[list[str]]
    evaluation: NotRequired[dict[str, object]]


def may_write_card(folder: Path) -> bool:
    """True if a folder has no README.md, or one that pyard wrote and nobody has claimed since."""
    file = folder / CARD_NAME
    if not file.exists() and not file.is_symlink():
        return True
    return file.is_file() and not file.is_symlink() and is_own_card(file.read_text(encoding="utf-8", errors="replace"))


def is_own_card(text: str) -> bool:
    """True for a README that pyard wrote and may replace."""
    return _MARK in text


def front_matter(
    *, library: str, task: str, tags: list[str], base: str | Path | None = None, relation: str | None = None
) -> list[str]:
    """The lines that the hub reads, and the mark by which pyard knows its own cards again.

    Args:
        library: `library_name`, the package that loads the model.
        task: `pipeline_tag`.
        tags: further words that it is found by.
        base: folder of the model that it was made from; named if it is a download from the hub.
        relation: of the model to its base: `adapter` or `finetune`.
    """
    import yaml

    fields: dict[str, object] = {"library_name": library, "pipeline_tag": task, "tags": ["pyard", *tags]}
    name = None if base is None else hub_name(base)
    if name is not None:
        fields |= {"base_model": name, **({} if relation is None else {"base_model_relation": relation})}
    return ["---", *yaml.safe_dump(fields, sort_keys=False).splitlines(), "---", "", _MARK, ""]


def hub_name(folder: str | Path) -> str | None:
    """`owner/name` of a folder in the hub's cache; None: any other folder."""
    found = re.search(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots/", Path(folder).as_posix() + "/")
    return None if found is None else f"{found[1]}/{found[2]}"


def student_card(student: Student, name: str | None = None, *, pipeline: bool = False) -> str:
    """The card of a student's folder, or of a pipeline's.

    Args:
        student: the student.
        name: of its repository on the hub; None: the lines load the folder that they are run in.
        pipeline: the folder is what `ARDPipeline.save_pretrained` writes.
    """
    config = student.config
    of_text = config.text is not None
    lines = front_matter(
        library="pyard",
        task="text-to-image" if of_text else "unconditional-image-generation",
        tags=["diffusion", "distillation", "few-step", *(["lora"] if config.base is not None and not pipeline else [])],
        base=None if config.text is None else config.text.folder,
        relation="finetune" if pipeline or config.base is None else "adapter",
    )
    steps = f"{student.num_steps}-step"
    origin = Path(config.text.folder).name if config.text is not None else f"a {_family(config)}"
    lines += [
        f"# A {steps} student of {origin}",
        "",
        f"A diffusion transformer that draws in {student.num_steps} network passes. It was distilled with pyard, by {_ARD}.",
        "",
        "## How to load it",
        "",
        *(["Run this in the folder of this file, or put the folder's path in place of `.`:", ""] if name is None else []),
        "```python",
        *_code(student, name or ".", pipeline=pipeline, on_hub=name is not None),
        "```",
        "",
        "## Settings",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _settings(student)),
        "",
    ]
    if student.scores is not None:
        lines += ["## Scores", "", *_table(student.scores["table"]), "", student.scores["about"], ""]
    return "\n".join(lines)


def _code(student: Student, place: str, *, pipeline: bool, on_hub: bool) -> list[str]:
    config = student.config
    options = ""
    if config.family not in FAMILIES:
        options += f", network={json.dumps(config.family)}"
    if config.text is not None and on_hub and not pipeline:
        options += f', pipeline="path/to/{Path(config.text.folder).name}"'
    lines = ["import pyard", ""]
    if config.text is not None:
        return [
            *lines,
            f"pipe = pyard.ARDPipeline.from_pretrained({json.dumps(place)}{options})",
            f"image = pipe({json.dumps(PROMPT)}).images[0]",
        ]
    labels = [] if student.conditions is None else list(range(min(4, student.num_conditions)))
    if pipeline:
        lines.append(f"pipe = pyard.ARDPipeline.from_pretrained({json.dumps(place)}{options})")
        argument = "condition_numbers" if student.num_classes is None else "class_labels"
        latent = "" if student.codec is not None or student.sample_shape[0] in (1, 3) else ', output_type="latent"'
        drawn = f"images = pipe({argument}={labels}{latent}).images"
        return [*lines, drawn if labels else "# images = pipe(condition=...).images, with a pyard.conditions.Condition"]
    lines.append(f"student = pyard.Student.from_pretrained({json.dumps(place)}{options})")
    if not labels:
        return [*lines, "# samples = pyard.sample(student, condition=...), with a pyard.conditions.Condition"]
    kind = "images" if student.codec is not None else "samples"
    return [*lines, f"{kind} = pyard.sample(student, labels={labels}, seed=0)  # float32, [{len(labels)}, C, ...]"]


def _settings(student: Student) -> list[tuple[str, str]]:
    config = student.config
    grid = config.grid
    shapes = ", ".join(f"[{', '.join(map(str, shape))}]" for shape in student.sample_shapes)
    count = sum(parameter.numel() for parameter in student.parameters())
    rows = [
        ("steps", str(student.num_steps)),
        ("times", ", ".join(f"{time:.6g}" for time in grid.times)),
        (
            "network",
            f"{_family(config)}, {config.network.depth} layers, {count:,} parameters",
        ),
        ("samples", f"{shapes}{', latents of the VAE in `vae/`' if student.codec is not None else ''}"),
        ("history", _history(config)),
        ("target, output, heads", f"`{config.target}`, `{config.output}`, `{config.heads}`"),
    ]
    if config.base is not None:
        rows.append(("LoRA", f"rank {config.base.rank} over weights with sha256 `{config.base.fingerprint}`"))
    settings = config.teacher_settings
    if settings is not None:
        channels = "" if config.cfg_channels is None else f" on {config.cfg_channels} channels"
        interval = "" if config.cfg_interval is None else " at times {:g} to {:g}".format(*config.cfg_interval)
        guidance = "none" if config.cfg_scale == 1 else f"{config.cfg_scale:g}{channels}{interval}"
        rows.append(("guidance of the trajectories", f"{guidance}; the student needs none"))
        rows.append(("solver of the trajectories", f"{config.solver}, {grid.teacher_steps} steps"))
    if config.text is not None:
        rows.append(("teacher", f"a {config.text.pipeline} ({Path(config.text.folder).name})"))
    rows.append(("sha256 of the teacher", f"`{config.teacher_fingerprint}`"))
    if student.num_classes is not None:
        rows.append(("classes", str(student.num_classes)))
    return rows


def _history(config: StudentConfig) -> str:
    if not config.history_layers:
        return "none (step distillation)"
    window = "" if config.window is None else f" of {config.window} steps"
    return f"lowest {config.history_layers} of {config.network.depth} layers, mask `{config.mask}`{window}"


def _family(config: StudentConfig) -> str:
    family = FAMILIES.get(config.family)
    if family is None or config.family in _FAMILY_NAMES:
        return _FAMILY_NAMES.get(config.family, config.family.rpartition(":")[2])
    name: str = backbone_class(config.family, None, "the card").transformer_name  # type: ignore[attr-defined]
    return name


def _table(rows: list[list[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body]


def write_card(student: Student, building: Path, place: Path | None, name: str | None) -> None:
    """Put a student's scores into a folder that is being written, and its card.

    Args:
        student: the student.
        building: the folder.
        place: where it will be; a README.md there that is the user's own stays. None: no card.
        name: of its repository on the hub, if any.
    """
    if student.scores is not None:
        (building / SCORES_NAME).write_text(json.dumps(student.scores, indent=2) + "\n", encoding="utf-8")
    if place is not None and may_write_card(place):
        (building / CARD_NAME).write_text(student_card(student, name), encoding="utf-8")


def read_scores(folder: Path) -> Scores | None:
    """The scores in a student's folder; None: it was not evaluated, or the file is not one that pyard wrote."""
    try:
        found = read_object(folder / SCORES_NAME)
    except InputError:
        return None
    table, texts = found.get("table"), [found.get("weights"), found.get("about")]
    rows = table if isinstance(table, list) and all(isinstance(row, list) and row for row in table) else []
    if not rows or not all(isinstance(text, str) for text in [*texts, *(cell for row in rows for cell in row)]):
        return None
    return cast(Scores, found)


def record_scores(student: Student, folder: Path, scores: Scores) -> None:
    """Put scores into a student's folder and its card; a card that is the user's own stays as it is.

    Args:
        student: as it was read from the folder.
        folder: of the student.
        scores: what was measured.
    """
    student.scores = scores
    write_text(folder / SCORES_NAME, json.dumps(scores, indent=2) + "\n")
    if may_write_card(folder):
        write_text(folder / CARD_NAME, student_card(student))


def drop_foreign_scores(student: Student) -> None:
    """Forget scores that were measured of other weights than the student has now."""
    if student.scores is not None and student.scores["weights"] != weights_digest(student):
        student.scores = None
