"""`pyard convert --to lora|transformer`: a text-to-image student as what diffusers and ComfyUI load, without pyard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from pyard.diffusion.scheduler_solvers import load_scheduler
from pyard.errors import InputError
from pyard.models.card import CARD_NAME, may_write_card
from pyard.models.folder import CONFIG_NAME, WEIGHTS_NAME
from pyard.models.hub import local_folder
from pyard.models.lora import merge_lora
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig, TextSource
from pyard.models.wrapped.checkpoint import read_transformer
from pyard.models.wrapped.low_rank import Factors, LowRank
from pyard.models.wrapped.stock_folder import (
    ADAPTER_NAMES,
    LORA_NAME,
    backbone_of,
    save_adapter,
    save_lora,
    save_transformer,
    student_additions,
    with_targets,
)
from pyard.models.wrapped.stock_lora import add_stock_lora
from pyard.storage.folders import new_folder
from pyard.storage.reading import read_object
from pyard.storage.units import format_bytes
from pyard.teachers.text_to_image.model_card import Card, Kind
from pyard.teachers.text_to_image.pipelines import PIPELINES
from pyard.teachers.text_to_image.stock_sampling import StockSampling, stock_samplings

_INDEX = "model_index.json"
_SCHEDULER = "scheduler"
_TRANSFORMER = "diffusion_pytorch_model"
# What stock sampling with a velocity or noise network is, and nothing else.
_STOCK = {"history_layers": 0, "output": "jump", "heads": "shared", "target": "state"}


def convert_student(
    source: str | Path,
    out: Path,
    *,
    to: Literal["lora", "transformer"],
    rank: int | None = None,
    pipeline: Path | None = None,
) -> None:
    """Write a student as a diffusers transformer or a LoRA, with the scheduler and the lines of Python that draw with it.

    Args:
        source: a run's or student's folder.
        out: the folder to write; files in it that are none of a converted student stay.
        to: `transformer`, what diffusers' class of it reads; `lora`, a file for the pipeline's `load_lora_weights`, or an
            adapter folder of PEFT for pipelines without.
        rank: of a LoRA that approximates a student that was trained in full; None: the LoRA must be exact.
        pipeline: folder of the pipeline that it is used with; None: its teacher's, at its path during training.

    Raises:
        InputError: a student that stock sampling cannot draw with, or that is no LoRA.
    """
    path = local_folder(source)
    folder = path / "student" if (path / "student").is_dir() else path
    student = Student.from_pretrained(path, base=pipeline)
    text = _check(student.config, source)
    read = _read_with(student.config)
    _check_out(out)
    merge_lora(student)
    family, backbone = PIPELINES[text.pipeline], backbone_of(student)
    base = Path(pipeline or text.folder)
    samplings = stock_samplings(
        {shape: student.config.grid_of(shape) for shape in _shapes(student)},
        student.config.schedule,
        family,
        own=load_scheduler(base / _SCHEDULER)[0] if (base / _SCHEDULER).is_dir() else None,
        patch=backbone.patch,
    )
    sampling = samplings[student.sample_shape]
    kind: Kind = "transformer"
    additions: LowRank | None = None
    about: list[str] = [f"weights | {sum(t.numel() for t in student.parameters()):,} numbers in {_dtype(student)}"]
    if to == "lora":
        kind, additions = _additions(student, folder, base, read, rank)
        about = [_about(additions)]
        if "lora" in read:
            about.append(f"contains | {Path(read['lora']).name}, the LoRA that the teacher was drawn with")
    card = Card(
        kind, out, student.config, text, family, backbone.transformer_name, base, sampling, _dtype(student),
        {_pixels(student, shape): one for shape, one in samplings.items()},
        tuple(about), hasattr(_pipeline_class(family.pipeline), "load_lora_into_text_encoder"),
        Path(read["transformer"]) if "transformer" in read and additions is not None else None,
    )  # fmt: skip
    owned = {CONFIG_NAME, LORA_NAME, *ADAPTER_NAMES, _SCHEDULER, *(p.name for p in out.glob(f"{_TRANSFORMER}*"))}
    with new_folder(out, owned=owned) as building:
        if additions is None:
            save_transformer(student, building)
        elif kind == "lora":
            save_lora(additions, _pipeline_class(family.pipeline), building)
        else:
            save_adapter(additions, building)
        sampling.scheduler.save_pretrained(str(building / _SCHEDULER))
        writes_card = may_write_card(out)
        if writes_card:
            (building / CARD_NAME).write_text(card.render(), encoding="utf-8")
    _report(out, card, additions, sampling, writes_card)


def _check(config: StudentConfig, source: str | Path) -> TextSource:
    """What encodes the student's texts, if stock sampling can draw with it."""
    differing = [f"{name} {getattr(config, name)}" for name, wanted in _STOCK.items() if getattr(config, name) != wanted]
    if config.text is None:
        differing.append("no text-to-image pipeline")
    if differing:
        flags = " ".join(f"--{name} {value}" for name, value in _STOCK.items())
        raise InputError(
            f"{source}: a student with {', '.join(differing)}, which stock pipelines cannot draw with; draw with "
            f"pyard.ARDPipeline, or train a student of a text-to-image pipeline with {flags}"
        )
    assert config.text is not None
    return config.text


def _read_with(config: StudentConfig) -> dict[str, str]:
    """The arguments `dtype`, `variant`, `transformer` and `lora` with which the teacher was read, if they were given."""
    assert config.text is not None
    if config.base is None:
        return config.text.read_with
    found = {name: getattr(config.base, name) for name in ("dtype", "variant", "transformer", "lora")}
    return {name: value for name, value in found.items() if value is not None}


def _check_out(out: Path) -> None:
    """Raises InputError for a folder that holds another kind of model, which a converted student would spoil."""
    file = out / CONFIG_NAME
    kind = read_object(file).get("_class_name") if file.is_file() else None
    if (out.resolve().parent / _INDEX).exists():
        raise InputError(f"out {out} is a component of the pipeline {out.resolve().parent}; choose a folder outside it")
    if (out / WEIGHTS_NAME).exists() or kind == "Student" or (out / _INDEX).exists():
        raise InputError(f"out {out} holds a {'pipeline' if kind is None else kind}; choose another folder")


def _additions(student: Student, folder: Path, base: Path, read: Mapping[str, str], rank: int | None) -> tuple[Kind, LowRank]:
    """The student's difference from the transformer that it is used with: the pipeline's, or one in place of it.

    A LoRA that was part of the teacher is part of it, beside what was trained.
    """
    if "transformer" not in read and not (base / "transformer").is_dir():
        raise InputError(
            f"a LoRA is the difference from the transformer in {base}, which does not exist; restore it, or give another copy "
            "of that pipeline: --pipeline PATH"
        )
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}; expected at least 1")
    import diffusers

    backbone = backbone_of(student)
    kind = getattr(diffusers, backbone.transformer_name)
    transformer = read_transformer(
        kind,
        base / "transformer",
        dtype=getattr(torch, read["dtype"]) if "dtype" in read else backbone.dtype,
        variant=read.get("variant"),
        replacement=Path(read["transformer"]) if "transformer" in read else None,
    )
    pipeline = _pipeline_class(student.config.text.pipeline)  # type: ignore[union-attr]
    began_with: Mapping[str, Factors] = {}
    if "lora" in read:
        merged = add_stock_lora(transformer, pipeline, Path(read["lora"]))
        if merged.others:
            raise InputError(
                f"the teacher's LoRA {read['lora']} changes {merged.others[0]}, which a low-rank addition to a linear "
                "layer cannot express, and the student contains it: use --to transformer"
            )
        began_with = merged.factors
    if transformer.dtype != backbone.dtype:  # training went on in more digits; diffusers' own `to` would warn of it
        torch.nn.Module.to(transformer, backbone.dtype)
    try:
        additions = student_additions(student, transformer, folder / WEIGHTS_NAME, rank)
    except InputError as error:
        raise InputError(f"{folder}, base {base}: {error}") from None
    if not additions.factors:
        raise InputError(f"{folder}: no matrix of the student differs from {base}; there is nothing for a LoRA to hold")
    additions = additions.beside(began_with)
    if hasattr(pipeline, "load_lora_weights"):
        return "lora", additions
    return "adapter", with_targets(additions, transformer)


def _about(additions: LowRank) -> str:
    ranks = sorted(set(additions.ranks.values()))
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    said = f"LoRA | rank {span}, {len(additions.factors)} layers"
    if additions.left_out:
        said += f", without {len(additions.left_out)} tensors that a LoRA cannot hold"
    return f"{said}; relative error of the student's difference from its base {additions.error:.1g}"


def _report(out: Path, card: Card, additions: LowRank | None, sampling: StockSampling, has_card: bool) -> None:
    size = format_bytes(sum(file.stat().st_size for file in out.rglob("*") if file.is_file()))
    if additions is not None:
        print(f"{out}: {_about(additions).replace(' |', ':', 1)}")
    passed = "".join(f", {name}={values}" for name, values in sampling.arguments.items())
    print(f"{out}: {size}; {type(sampling.scheduler).__name__}, {card.config.grid.num_steps} steps{passed}")
    if has_card:
        print(f"{out / CARD_NAME}: shows how to draw with it in Python")
    else:
        print("\n".join([f"{out / CARD_NAME} is your own and was left unchanged. To draw:", *card.code()]))


def _shapes(student: Student) -> list[tuple[int, ...]]:
    """[C, h, w] of the student's samples, the usual one first."""
    return [student.sample_shape, *(shape for shape in student.sample_shapes if shape != student.sample_shape)]


def _pixels(student: Student, sample_shape: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of a sample's picture."""
    factor = backbone_of(student).config.pixels
    return sample_shape[-2] * factor, sample_shape[-1] * factor


def _dtype(student: Student) -> str:
    return str(backbone_of(student).dtype).removeprefix("torch.")


def _pipeline_class(name: str) -> type[Any]:
    import diffusers

    found: type[Any] = getattr(diffusers, name)
    return found
