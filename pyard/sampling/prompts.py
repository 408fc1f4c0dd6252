"""Encodes prompts as conditions of a text-to-image student, with the text encoders of its teacher's pipeline."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pyard.conditions import Condition
from pyard.conditions.prompt_encoding import cut_texts
from pyard.conditions.prompt_file import read_prompts
from pyard.conditions.prompts import TextEncoder
from pyard.errors import InputError
from pyard.storage.numbers import whole_number

if TYPE_CHECKING:
    from pyard.models.student import Student
    from pyard.teachers.text_to_image import PipelineTextEncoder

_BATCH = 16
# A single word with a suffix, which is rather a name that was misspelt than a prompt.
_FILE_NAME = re.compile(r"\S+\.[A-Za-z]\w{1,4}")


def texts_of(prompts: str | Path | Sequence[str]) -> list[str]:
    """Return prompts as a list of texts: a given list, the prompts of a file (`read_prompts`), or one text.

    Raises:
        InputError: the file cannot be read, or there are no prompts.
    """
    if isinstance(prompts, str) and not prompts.strip():
        raise InputError("prompts: the text is empty; expected a text or a file of prompts")
    if isinstance(prompts, str) and Path(prompts).suffix.lower() not in (".txt", ".jsonl") and not _exists(prompts):
        if _FILE_NAME.fullmatch(prompts):
            raise InputError(
                f"prompts: no such file: {prompts}; give a prompt that looks like the name of a file in a list or a file"
            )
        return [prompts]
    return [line.prompt for line in read_prompts(prompts)]


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a prompt may be longer than any name
        return False


def encode_prompts(encoder: TextEncoder, texts: Sequence[str], constants: Mapping[str, float]) -> Condition:
    """Encode texts as a condition with one row each; repeated texts are encoded once.

    Args:
        encoder: text encoder of the student's pipeline.
        texts: at least one.
        constants: further conditions that are the same for every prompt, by name.

    Raises:
        InputError: there are no texts.

    Warns:
        UserWarning: texts were cut at the encoder's limit.
    """
    if not texts:
        raise InputError("prompts: the list is empty; expected at least one prompt")
    distinct = list(dict.fromkeys(texts))
    rows: dict[str, Condition] = {}
    cut: list[str] = []
    for begin in range(0, len(distinct), _BATCH):
        batch = distinct[begin : begin + _BATCH]
        for text, encoded in zip(batch, encoder.encode(batch), strict=True):
            tensors = {name: tensor[None] for name, tensor in encoded.tensors.items()}
            tensors["mask"] = torch.ones(tensors["tokens"].shape[:2], dtype=torch.bool)
            cut += [text] if encoded.cut else []
            rows[text] = Condition({**tensors, **{name: torch.tensor([value]) for name, value in constants.items()}})
    if cut:
        warnings.warn(cut_texts(cut, len(distinct)), stacklevel=3)
    return Condition.cat([rows[text] for text in texts])


def condition_of_prompts(student: Student, texts: Sequence[str], *, folder: str | Path | None = None) -> Condition:
    """Encode texts as a condition for a student; its text encoders are loaded, used and freed.

    Args:
        student: a student made from a text-to-image pipeline.
        texts: at least one.
        folder: the pipeline's folder; None: its path during training.
    """
    encoder = text_encoder_of(student, folder=folder, device=student.embed_times.device)
    assert student.config.text is not None
    try:
        return encode_prompts(encoder, texts, student.config.text.constants)
    finally:
        encoder.free()


def text_encoder_of(
    student: Student,
    *,
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    leave_out: Container[str] = (),
) -> PipelineTextEncoder:
    """The text encoder of a student's pipeline, read as it was for the student's trajectories.

    Args:
        student: a student made from a text-to-image pipeline.
        folder: the pipeline's folder; None: its path during training.
        device: the device to encode on.
        dtype: dtype of the encoders' weights; None: that of the trajectories, or if it is not known, the student's.
        leave_out: names of components that are not read, because they are replaced by others.

    Raises:
        InputError: the student does not draw from prompts, or its pipeline's folder is missing.
    """
    from pyard.teachers.text_to_image import PIPELINES, PipelineTextEncoder

    text = student.config.text
    if text is None:
        raise InputError("prompts: this student was not made from a text-to-image pipeline; give labels or a condition")
    place = Path(folder or text.folder)
    if not place.is_dir():
        raise InputError(
            f"prompts: this student uses the text encoders of the pipeline in {place}, which does not exist; "
            "restore it, or give another copy of it: pipeline=PATH, --pipeline PATH"
        )
    told = text.read_with.get("dtype")
    return PipelineTextEncoder(
        place,
        PIPELINES[text.pipeline],
        max_sequence_length=text.max_sequence_length,
        dtype=dtype or (next(student.trunk.parameters()).dtype if told is None else getattr(torch, told)),
        variant=text.read_with.get("variant") if folder is None else None,
        device=device,
        transformer=getattr(student.config.network, "transformer", None),
        leave_out=leave_out,
    )


def shape_of_pixels(student: Student, height: int | None, width: int | None) -> tuple[int, ...] | None:
    """The sample shape for pictures of a size in pixels; None if neither height nor width is given.

    Raises:
        InputError: the student has no samples of this size.
    """
    if height is None and width is None:
        return None
    usual = student.sample_shape
    factor = getattr(student.config.network, "pixels", None) or _pixels_of(student)
    sides = []
    for name, pixels, side in (("height", height, usual[-2]), ("width", width, usual[-1])):
        if pixels is not None and whole_number(name, pixels, 1, 2**20) % factor:
            raise InputError(f"{name} is {pixels} pixels; expected a multiple of {factor}")
        sides.append(side if pixels is None else pixels // factor)
    return student.trained_shape((*usual[:-2], *sides))


def _pixels_of(student: Student) -> int:
    """Number of pixels per element along one side of a sample."""
    if student.codec is None:
        return 1
    return student.codec.image_shape(student.sample_shape)[1] // student.sample_shape[-2]
