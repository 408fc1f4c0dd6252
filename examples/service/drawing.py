"""Labels or prompts in, pictures out, for either kind of exported student.

n pictures · C channels · h, w sides of the noise · H, W sides of a picture
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pyard.diffusion.noise import standard_normal
from pyard.errors import InputError
from pyard.runtime import OnnxPipeline, OnnxStudent

Noise = NDArray[np.float32]  # [n, C, h, w]


class Drawer:
    """Draws batches.

    Args:
        student: a student of classes, which draws grey or RGB pictures or has a decoder; or a text-to-image one.
        min_batch: a smaller batch is filled up with copies. The kernels for a batch of one round differently from those for
            more, so with 2 equal requests give equal bytes, whatever else is in their batches.

    Attributes:
        num_classes: of the student; None: it takes prompts.
        steps: of a picture, and so the number of its previews.

    Raises:
        InputError: a student of another kind, or without text encoders.
    """

    def __init__(self, student: OnnxStudent | OnnxPipeline, min_batch: int = 2):
        self.student, self.min_batch = student, min_batch
        if isinstance(student, OnnxPipeline):
            student.encode([""])  # text encoders are there, or their absence is known before the service runs
            self.num_classes, self.steps = None, student.num_steps
            self.sample_shape, self.has_previews = student.sizes[0].sample_shape, student.sizes[0].step is not None
            return
        info = student.info
        if info.num_classes is None:
            conditions = ", ".join(map(str, info.conditions))
            raise InputError(
                f"{student.path} is conditioned on {conditions}; this service takes classes, or the folder of a pipeline"
            )
        if not info.pictures and info.output_shape[0] not in (1, 3):
            raise InputError(f"{student.path} draws latents of {info.output_shape[0]} channels; export it with --vae")
        self.num_classes, self.steps = info.num_classes, info.num_steps
        self.sample_shape, self.has_previews = info.sample_shape, info.form == "step"

    def about(self) -> dict[str, Any]:
        """What the student says of itself."""
        if isinstance(self.student, OnnxStudent):
            return dataclasses.asdict(self.student.info)
        return {name: value for name, value in self.student.config.items() if name not in ("files", "text")}

    def noise(self, seed: int, index: int) -> Noise:
        """Noise number `index` of a seed, [1, C, h, w]; InputError: the seed is out of range."""
        return standard_normal(seed, [index], self.sample_shape)

    def draw(self, what: Sequence[int | str], noise: Noise) -> list[NDArray[Any]]:
        """A picture for each label or prompt."""
        filled, begin = self._fill(what, noise)
        return list(self.student.sample(filled, noise=begin)[: len(what)])

    def previews(self, what: Sequence[int | str], noise: Noise) -> Iterator[list[NDArray[Any]]]:
        """The pictures after each step; InputError: the student was exported in the form `sampler` alone."""
        filled, begin = self._fill(what, noise)
        for pictures in self.student.stream(filled, noise=begin):
            yield list(pictures[: len(what)])

    def _fill(self, what: Sequence[int | str], noise: Noise) -> tuple[list[Any], Noise]:
        rows = [*range(len(what)), *[0] * (self.min_batch - len(what))]
        return [what[row] for row in rows], noise[rows]


def open_student(path: str | Path, threads: int | None = None) -> OnnxStudent | OnnxPipeline:
    """A student's file, or a text-to-image student's folder."""
    return OnnxPipeline(path, threads=threads) if Path(path).is_dir() else OnnxStudent(path, threads=threads)


def png(*pictures: NDArray[Any]) -> bytes:
    """Pictures side by side as the bytes of a PNG file; each float32 [C, H, W] from -1 to 1, or uint8 [H, W, C]."""
    sheet = np.concatenate([_levels(picture) for picture in pictures], axis=1)
    file = io.BytesIO()
    Image.fromarray(sheet[..., 0] if sheet.shape[2] == 1 else sheet).save(file, "PNG")
    return file.getvalue()


def _levels(picture: NDArray[Any]) -> NDArray[np.uint8]:
    if picture.dtype == np.uint8:
        return picture
    return np.round((picture.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
